"""Names to tasks: the built-in table, installed packages, plugins. Imports nothing heavy.

Three sources, as of attentions (:mod:`astbench_registry.registry`):

1. the table of built-ins (:mod:`astbench.tasks.table`);
2. installed packages that declare the entry-point group `astbench.tasks` (`mine = "my_package.tasks:MyTask"`); loaded
   only when their name is used, so that a broken one hurts nobody else;
3. plugins named on the command line (`--plugins=./mine.py`, `--task=./mine.py:MyTask`), whose LightningModules carry
   `@register_task`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from astbench.errors import NameOrPluginError
from astbench.tasks.table import TASKS, Task
from astbench_registry.errors import PluginError
from astbench_registry.plugins import (
    check_name,
    claimed_by,
    clashes_in,
    entry_points,
    entry_source,
    import_plugin,
    load_entry_point,
    roll_back,
    running_plugin,
    sole_entry_point,
)
from astbench_registry.registry import attentions_of
from astbench_registry.transforms.registry import transforms_of

if TYPE_CHECKING:
    from astbench.tasks.base import TaskData
    from astbench.training.module import TaskModule

ENTRY_POINT_GROUP = "astbench.tasks"

T = TypeVar("T", bound="type[TaskModule]")


@dataclass(frozen=True)
class RegisteredTask:
    """One name: where it comes from and, once loaded or built in, its row.

    Attributes:
        name: What `--task` takes.
        source: "astbench", a distribution's name, or a plugin's path.
        row: The task; None for an entry point not loaded yet.
    """

    name: str
    source: str
    row: Task | None = None

    @property
    def summary(self) -> str:
        """What the task is, in one line."""
        return self.row.summary if self.row else "(not loaded)"


_decorated: dict[str, RegisteredTask] = {}
roll_back(lambda: _decorated)


def register_task(
    name: str, *, data: type[TaskData], config: type[Any], summary: str, sources: tuple[str, ...], **row: Any
) -> Callable[[T], T]:
    """Decorator of a LightningModule: make `name` available as `--task=name`.

    Args:
        name: Lower-case letters, digits, `_` and `-`.
        data: LightningDataModule derived from :class:`astbench.tasks.base.TaskData`.
        config: Frozen dataclass of the options under `--task.`; every field has a default.
        summary: One line for `astbench list`.
        sources: What `--data.source` takes, the default first.
        row: The other fields of :class:`Task`: `metric`, and those with defaults.

    Raises:
        PluginError: a name that is taken (by whom), or a class, option or row of the wrong kind.
    """

    def register(cls: T) -> T:
        source = running_plugin() or cls.__module__
        check_name("task", name, source)
        what = f"task '{name}' from {source}"
        _check_classes(what, cls, data, config)
        taken = _taken_by(name)
        if taken and taken != source:
            raise PluginError(f"task '{name}' is registered twice: by {taken} and by {source}; rename one")
        module, dataset, options = (f"{c.__module__}:{c.__qualname__}" for c in (cls, data, config))
        try:
            made = Task(name, summary, module, dataset, options, sources, **{"real": "", **row})
        except TypeError as error:
            raise PluginError(f"{what}: {str(error).replace('Task.__init__', 'register_task')}") from error
        _decorated[name] = RegisteredTask(name, source, made)
        return cls

    return register


def _check_classes(what: str, module: Any, data: Any, config: Any) -> None:
    from astbench.tasks.base import TaskData
    from astbench.training.module import TaskModule

    if not (isinstance(module, type) and issubclass(module, TaskModule)):
        raise PluginError(f"{what} must be a subclass of astbench.training.module.TaskModule")
    if not (isinstance(data, type) and issubclass(data, TaskData)):
        raise PluginError(f"{what}: its data must be a subclass of astbench.tasks.base.TaskData")
    if not (isinstance(config, type) and is_dataclass(config)):
        raise PluginError(f"{what}: its config must be a dataclass")
    required = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    if required:
        raise PluginError(f"{what}: config fields without a default: {required}")
    lacking = [f"{module.__name__}.head"] if not hasattr(module, "head") else []
    lacking += [
        f"{data.__name__}.{n}" for n in ("length_option", "pads", "check_model", "describe") if not hasattr(data, n)
    ]
    if lacking:
        raise PluginError(f"{what} does not define {', '.join(lacking)}")
    inside = [c.__qualname__ for c in (module, data, config) if "." in c.__qualname__]
    if inside:
        raise PluginError(f"{what}: {inside[0]} must stand at the top of its file, where a resumed run finds it")


def _taken_by(name: str) -> str | None:
    if name in TASKS:
        return "astbench"
    if name in _decorated:
        return _decorated[name].source
    return claimed_by(ENTRY_POINT_GROUP, name)


def registered_tasks() -> dict[str, RegisteredTask]:
    """Every name that can be asked for, built-ins first, without importing anybody's code.

    Two installed packages that claim one name are both left out here (:func:`task_clashes` names them).
    """
    found = {name: RegisteredTask(name, "astbench", row) for name, row in TASKS.items()}
    for name, eps in sorted(entry_points(ENTRY_POINT_GROUP).items()):
        if name not in found and len(eps) == 1:
            found[name] = RegisteredTask(name, entry_source(eps[0]))
    return {**found, **_decorated}


def task_clashes() -> dict[str, list[str]]:
    """Names that several claim, with all of them: installed packages, or one and a built-in, which wins."""
    return clashes_in(ENTRY_POINT_GROUP, TASKS)


def find_task(name: str) -> Task:
    """The task of a name; an installed package's is imported now.

    Raises:
        NameOrPluginError: with the nearest name and all of them.
        PluginError: the plugin that supplies it does not load.
    """
    if name in TASKS:
        return TASKS[name]
    if name not in _decorated:
        _load(name)
    row = _decorated[name].row
    assert row is not None, f"{name} was loaded without a row"
    return row


def _load(name: str) -> None:
    ep = sole_entry_point("task", ENTRY_POINT_GROUP, name)
    if ep is None:
        names = list(registered_tasks())
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ";"
        raise NameOrPluginError(f"unknown task '{name}'{hint} registered: {', '.join(names)}")
    load_entry_point("task", ep)
    if name not in _decorated:
        raise PluginError(f"task '{name}' from {entry_source(ep)}: {ep.value} must carry @register_task('{name}', ...)")


def load_plugin(target: str) -> list[str]:
    """Import a plugin, `path/to/file.py` or `package.module`; the attentions, transforms and tasks it registered.

    Raises:
        PluginError: the file is missing, raises at import, or registers none of them.
    """
    module = import_plugin(target)
    own = f"{module.__name__}:"
    tasks = [name for name, task in _decorated.items() if task.source == target or _module_of(task).startswith(own)]
    names = [*attentions_of(target, module), *transforms_of(target, module), *sorted(tasks)]
    if not names:
        raise PluginError(
            f"plugin {target} registers no attention, no task and no transform; decorate a class with "
            "@register_attention, @register_task or @register_transform"
        )
    return names


def task_of_class(reference: str) -> str:
    """The name under which `./mine.py:Mine` registers that LightningModule; loads the plugin.

    Raises:
        PluginError: it does not load, or registers no such class.
    """
    target, _, cls = reference.rpartition(":")
    wanted = f"{import_plugin(target).__name__}:{cls}"
    for name, task in _decorated.items():
        if _module_of(task) == wanted:
            return name
    raise PluginError(f"{reference}: no class '{cls}' with @register_task in {target}")


def _module_of(task: RegisteredTask) -> str:
    return task.row.module if task.row else ""

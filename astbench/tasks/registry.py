"""Names to tasks: the built-in table, installed packages, plugins. Imports nothing heavy.

Three sources, as of attentions (:mod:`astbench_registry.registry`):

1. the table of built-ins (:mod:`astbench.tasks.table`);
2. installed packages that declare the entry-point group `astbench.tasks` (`mine = "my_package.tasks:MyTask"`); loaded
   only when their name is used, so that a broken one hurts nobody else;
3. plugins named on the command line (`--plugins=./mine.py`, `--task=./mine.py:MyTask`), whose LightningModules carry
   `@register_task`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from astbench.errors import NameOrPluginError
from astbench.tasks.table import TASKS, Task
from astbench_registry.depth.registry import depths_of
from astbench_registry.errors import PluginError
from astbench_registry.name_table import NameTable, require_defaults
from astbench_registry.plugins import import_plugin
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
    def target(self) -> str:
        """`module:Class` of the LightningModule; empty until it is loaded."""
        return self.row.module if self.row else ""

    @property
    def summary(self) -> str:
        """What the task is, in one line."""
        return self.row.summary if self.row else "(not loaded)"


_names: NameTable[RegisteredTask] = NameTable(
    "task",
    ENTRY_POINT_GROUP,
    {name: partial(RegisteredTask, name, "astbench", row) for name, row in TASKS.items()},
    lambda name, source, target: RegisteredTask(name, source),
    NameOrPluginError,
    alphabetical=False,
)


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
        source = _names.source_of(name, cls)
        what = f"task '{name}' from {source}"
        _check_classes(what, cls, data, config)
        module, dataset, options = (f"{c.__module__}:{c.__qualname__}" for c in (cls, data, config))
        try:
            made = Task(name, summary, module, dataset, options, sources, **{"real": "", **row})
        except TypeError as error:
            raise PluginError(f"{what}: {str(error).replace('Task.__init__', 'register_task')}") from error
        _names.add(name, RegisteredTask(name, source, made))
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
    require_defaults(what, config)
    lacking = [f"{module.__name__}.head"] if not hasattr(module, "head") else []
    lacking += [
        f"{data.__name__}.{n}" for n in ("length_option", "pads", "check_model", "describe") if not hasattr(data, n)
    ]
    if lacking:
        raise PluginError(f"{what} does not define {', '.join(lacking)}")
    inside = [c.__qualname__ for c in (module, data, config) if "." in c.__qualname__]
    if inside:
        raise PluginError(f"{what}: {inside[0]} must stand at the top of its file, where a resumed run finds it")


def registered_tasks() -> dict[str, RegisteredTask]:
    """Every name that can be asked for, built-ins first, without importing anybody's code.

    Two installed packages that claim one name are both left out here (:func:`task_clashes` names them).
    """
    return _names.rows()


def task_clashes() -> dict[str, list[str]]:
    """Names that several claim, with all of them: installed packages, or one and a built-in, which wins."""
    return _names.clashes()


def find_task(name: str) -> Task:
    """The task of a name; an installed package's is imported now.

    Raises:
        NameOrPluginError: with the nearest name and all of them.
        PluginError: the plugin that supplies it does not load.
    """
    if name in TASKS:
        return TASKS[name]
    row = _names.load(name).row
    assert row is not None, f"{name} was loaded without a row"
    return row


def load_plugin(target: str) -> list[str]:
    """Import a plugin, `path/to/file.py` or `package.module`; the names of any kind that it registered.

    Raises:
        PluginError: the file is missing, raises at import, or registers none of them.
    """
    module = import_plugin(target)
    names = [
        *attentions_of(target, module),
        *transforms_of(target, module),
        *depths_of(target, module),
        *_names.registered_by(target, module),
    ]
    if not names:
        raise PluginError(
            f"plugin {target} registers no attention, task, transform or depth policy; decorate a class with "
            "@register_attention, @register_task, @register_transform or @register_depth"
        )
    return names


def task_of_class(reference: str) -> str:
    """The name under which `./mine.py:Mine` registers that LightningModule; loads the plugin.

    Raises:
        PluginError: it does not load, or registers no such class.
    """
    return _names.of_class(reference)

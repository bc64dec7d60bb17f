"""Names to attention classes: the built-in table, installed packages, loose files. Imports no torch.

Three sources, in this order:

1. the table of built-ins (:mod:`astbench_registry.table`);
2. installed packages that declare the entry-point group `astbench.attention`
   (`mine = "my_package.attention:MyAttention"`); loaded only when their name is used, so that a broken one
   hurts nobody else;
3. plugins named on the command line (`--plugins=./mine.py`, `--plugins=my_package.attention`,
   `--attention=./mine.py:MyAttention`), whose classes carry `@register_attention`.

Plugins are code: loading one runs it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from astbench_registry.capabilities import AttentionConfig, Capabilities
from astbench_registry.errors import PluginError, UnknownAttentionError
from astbench_registry.table import BUILTIN

if TYPE_CHECKING:
    from astbench_registry.interface import Attention, AttentionShape

ENTRY_POINT_GROUP = "astbench.attention"

T = TypeVar("T", bound="type[Attention]")


@dataclass(frozen=True)
class Registered:
    """One name: where it comes from and, once loaded or built in, its options.

    Attributes:
        name: What `--attention` takes.
        source: "astbench", a distribution's name, or a plugin's path.
        target: `module:Class`.
        config: The options' class; None for an entry point not loaded yet.
        cls: The attention class; None until loaded.
    """

    name: str
    source: str
    target: str
    config: type[AttentionConfig] | None = None
    cls: type[Attention] | None = None

    @property
    def summary(self) -> str:
        """First line of the options' docstring."""
        return (self.config.__doc__ or "").strip().splitlines()[0] if self.config else "(not loaded)"


_decorated: dict[str, Registered] = {}
_loading: list[str] = []  # the plugin whose code is running, innermost last


def register_attention(name: str, config: type[AttentionConfig]) -> Callable[[T], T]:
    """Class decorator: make `name` available as `--attention=name`.

    Args:
        name: Lower-case letters, digits, `_` and `-`.
        config: Frozen dataclass derived from :class:`AttentionConfig`; every field has a default.

    Raises:
        PluginError: a name that is taken (by whom), or a class or config of the wrong kind.
    """

    def register(cls: T) -> T:
        from astbench_registry.interface import Attention

        source = _loading[-1] if _loading else cls.__module__
        if not name or not name.replace("_", "").replace("-", "").isalnum() or name != name.lower():
            raise PluginError(f"attention name {name!r} from {source}: use lower-case letters, digits, _ and -")
        if not (isinstance(cls, type) and issubclass(cls, Attention)):
            raise PluginError(f"attention '{name}' from {source} must be a subclass of astbench_registry.Attention")
        if "forward" not in vars(cls) and cls.forward is Attention.forward:
            raise PluginError(f"attention '{name}' from {source} does not implement forward()")
        _check_config(name, source, config)
        taken = _taken_by(name)
        if taken and taken != source:
            raise PluginError(f"attention '{name}' is registered twice: by {taken} and by {source}; rename one")
        cls.config_class = config
        cls.name = name
        _decorated[name] = Registered(name, source, f"{cls.__module__}:{cls.__qualname__}", config, cls)
        return cls

    return register


def _taken_by(name: str) -> str | None:
    if name in BUILTIN:
        return "astbench"
    if name in _decorated:
        return _decorated[name].source
    # While an installed plugin loads, its own entry point is not a clash.
    others = [ep for ep in _entry_points() if ep.name == name and _entry_source(ep) not in _loading]
    return _entry_source(others[0]) if others else None


def _check_config(name: str, source: str, config: Any) -> None:
    if not (isinstance(config, type) and issubclass(config, AttentionConfig) and is_dataclass(config)):
        raise PluginError(f"attention '{name}' from {source}: its config must be a dataclass of AttentionConfig")
    missing = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise PluginError(f"attention '{name}' from {source}: config fields without a default: {missing}")
    if not isinstance(getattr(config, "capabilities", None), Capabilities):
        raise PluginError(f"attention '{name}' from {source}: its config must set `capabilities = Capabilities(...)`")


def _entry_points() -> list[metadata.EntryPoint]:
    return list(metadata.entry_points(group=ENTRY_POINT_GROUP))


def _entry_source(ep: metadata.EntryPoint) -> str:
    return ep.dist.name if ep.dist else "an installed package"


def registered() -> dict[str, Registered]:
    """Every name that can be asked for, sorted, without importing anybody's code.

    Two installed packages that claim one name are both left out here (:func:`clashes` names them).
    """
    found = {name: Registered(name, "astbench", row.target, row.config) for name, row in BUILTIN.items()}
    for name, eps in _claims().items():
        if name not in found and len(eps) == 1:
            found[name] = Registered(name, _entry_source(eps[0]), eps[0].value)
    found.update(_decorated)
    return dict(sorted(found.items()))


def clashes() -> dict[str, list[str]]:
    """Names that several claim, with all of them: installed packages, or one and a built-in, which wins."""
    claimed = {name: [_entry_source(ep) for ep in eps] for name, eps in _claims().items()}
    for name in BUILTIN.keys() & claimed.keys():
        claimed[name].insert(0, "astbench")
    return {name: sorted(sources) for name, sources in sorted(claimed.items()) if len(sources) > 1}


def _claims() -> dict[str, list[metadata.EntryPoint]]:
    """Installed packages' entry points by name."""
    claims: dict[str, list[metadata.EntryPoint]] = {}
    for ep in _entry_points():
        claims.setdefault(ep.name, []).append(ep)
    return claims


def load_plugin(target: str) -> list[str]:
    """Import a plugin, `path/to/file.py` or `package.module`, and return the names it registered.

    Raises:
        PluginError: the file is missing, raises at import, or registers nothing.
    """
    before = set(_decorated)
    module = _import_plugin(target)
    new = sorted(set(_decorated) - before)
    known = [n for n, r in _decorated.items() if r.target.startswith(module.__name__ + ":")]
    if not (new or known):
        raise PluginError(f"plugin {target} registers no attention; decorate a class with @register_attention")
    return new or known


@contextmanager
def _running(source: str) -> Iterator[None]:
    """Whatever registers meanwhile comes from `source`; when it raises, nothing of it stays."""
    before = dict(_decorated)
    _loading.append(source)
    try:
        yield
    except BaseException:
        _decorated.clear()
        _decorated.update(before)
        raise
    finally:
        _loading.pop()


def _import_plugin(target: str) -> Any:
    try:
        with _running(target):
            return _import(target)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # whatever a plugin raises is reported under its name
        raise PluginError(f"plugin {target} does not load: {type(error).__name__}: {_one_line(error)}") from error


def _import(target: str) -> Any:
    if not target.endswith(".py"):
        return importlib.import_module(target)
    path = Path(target).expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"plugin file {target} does not exist")
    name = f"astbench_plugin_{path.stem}_{zlib.crc32(str(path).encode()):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin file {target} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def config_class(name: str) -> type[AttentionConfig]:
    """The options of an attention; for built-ins without importing torch.

    Raises:
        UnknownAttentionError: with the nearest name and all registered ones.
        PluginError: when the plugin that supplies it does not load.
    """
    if name in BUILTIN:
        return BUILTIN[name].config
    config = _load(name).config
    assert config is not None, f"{name} was loaded without a config"
    return config


def attention_class(name: str) -> type[Attention]:
    """The class of an attention, imported now. Raises as :func:`config_class`."""
    if name in BUILTIN:
        cls: type[Attention] = _attribute(BUILTIN[name].target)
        cls.config_class, cls.name = BUILTIN[name].config, name
        return cls
    loaded = _load(name).cls
    assert loaded is not None, f"{name} was loaded without a class"
    return loaded


def build_attention(name: str, options: Mapping[str, Any] | AttentionConfig, shape: AttentionShape) -> Attention:
    """Build an attention module for one layer from plain options.

    Raises:
        ValueError: an option that does not exist or holds a bad value, by name.
    """
    config = options if isinstance(options, AttentionConfig) else make_config(name, options)
    cls = attention_class(name)
    if name in BUILTIN:
        return cls(config, shape)
    try:
        return cls(config, shape)
    except ValueError:
        raise  # an option that does not go with this layer
    except Exception as error:  # whatever a plugin raises is reported under its name
        source = _load(name).source
        raise PluginError(
            f"attention '{name}' from {source} cannot be built: {type(error).__name__}: {_one_line(error)}"
        ) from error


def make_config(name: str, options: Mapping[str, Any]) -> AttentionConfig:
    """Plain options to the variant's frozen dataclass. Raises as :func:`build_attention`."""
    cls = config_class(name)
    known = [f.name for f in fields(cls)]
    try:
        types = get_type_hints(cls)
    except NameError:
        types = {}  # a plugin's annotation of something imported for type checkers only
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"attention '{name}' has no option '{option}'{hint} options: {', '.join(known) or 'none'}")
        if not _of_type(value, types.get(option, Any)):
            raise ValueError(f"--attention.{option} must be {_type_name(types[option])}, got {value!r}")
    return cls(**options)


def _of_type(value: Any, hint: Any) -> bool:
    """Plain types, literals, unions and lists of them; what else a variant declares is its own to check."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_of_type(value, part) for part in parts)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and all(_of_type(v, parts[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)


def _load(name: str) -> Registered:
    if name in _decorated:
        return _decorated[name]
    if ".py:" in name or (":" in name and "." in name):
        return _load_reference(name)
    eps = [ep for ep in _entry_points() if ep.name == name]
    if len(eps) > 1:
        sources = " and by ".join(sorted(_entry_source(ep) for ep in eps))
        raise PluginError(f"attention '{name}' is registered twice: by {sources}; uninstall one")
    if not eps:
        names = list(registered())
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ";"
        raise UnknownAttentionError(f"unknown attention '{name}'{hint} registered: {', '.join(names)}")
    source = _entry_source(eps[0])
    try:
        with _running(source):
            cls = eps[0].load()
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # whatever a plugin raises is reported under its name
        raise PluginError(
            f"attention '{name}' from {source} ({eps[0].value}) does not load: "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from error
    if getattr(cls, "name", None) != name or name not in _decorated:
        raise PluginError(
            f"attention '{name}' from {source}: {eps[0].value} must carry @register_attention('{name}', ...)"
        )
    return _decorated[name]


def _load_reference(reference: str) -> Registered:
    """`./mine.py:Mine` or `package.module:Mine`: a class by its address."""
    target, _, attribute = reference.rpartition(":")
    module = _import_plugin(target)
    cls = getattr(module, attribute, None)
    name = getattr(cls, "name", None)
    if name not in _decorated or _decorated[name].cls is not cls:
        raise PluginError(f"{reference}: no class '{attribute}' with @register_attention in {target}")
    return _decorated[name]


def _attribute(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)

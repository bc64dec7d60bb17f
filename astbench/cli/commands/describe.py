"""`astbench describe NAME`: options, abilities and paper of an attention, a transform, or a depth policy."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from astbench.cli.explain_call import KEYS, explain_call
from astbench.cli.names import current_options, kind_of, read_names
from astbench.errors import ConfigError
from astbench_registry import AttentionConfig, DepthConfig, TransformConfig
from astbench_registry.depth.registry import depth_of_class, make_depth_config, registered_depths
from astbench_registry.registry import config_class, make_config, option_types, registered, type_name
from astbench_registry.transforms.registry import (
    attentions_with_probabilities,
    make_transform_config,
    registered_transforms,
    transform_of_class,
)


def run(words: list[str]) -> int:
    """Print one attention, or with `--explain` which kernel a call of it would run."""
    line = read_names(words)
    explain = line.has("--explain")
    names = line.words
    if line.help or not names:
        print("usage: astbench describe NAME [--attention.OPTION=VALUE...] [--plugins=FILE.py|MODULE]")
        print("       astbench describe TRANSFORM [--transform.OPTION=VALUE...] [--plugins=FILE.py|MODULE]")
        print("       astbench describe POLICY [--depth.OPTION=VALUE...] [--plugins=FILE.py|MODULE]")
        print(f"       astbench describe NAME --explain N=32768 [KEY=VALUE...]   keys: {', '.join(KEYS)}")
        if not line.help:
            raise ConfigError("astbench describe needs a name; `astbench list` shows them")
        return 0
    if len(names) > 1 and not explain:
        if "=" in names[1]:
            raise ConfigError(f"astbench describe takes {names[1]} only with --explain")
        raise ConfigError(f"astbench describe takes one name, got {' '.join(names)}")
    kind = kind_of(names[0])
    if kind != "attention":
        what = {"transform": "a transform of their weights", "depth": "a depth policy"}[kind]
        if explain:
            raise ConfigError(f"--explain is for attentions; {names[0]} is {what}")
        describe = {"transform": _transform, "depth": _depth}[kind]
        print(describe(names[0], line.attention_options("describe", group=kind)))
        return 0
    config = config_class(names[0])
    options = current_options(names[0], line.attention_options("describe", "--explain"))
    chosen = make_config(names[0], options)
    if explain:
        print(explain_call(names[0], chosen, list(names[1:])))
        return 0
    rows = registered()
    source = rows[names[0]].source if names[0] in rows else names[0]
    print(_head(names[0], source, chosen))
    print("\noptions (--attention.OPTION=VALUE)")
    print(_options(chosen, options, config.renamed))
    return 0


def _options(
    chosen: AttentionConfig | TransformConfig | DepthConfig,
    given: Mapping[str, Any],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Two lines an option: type, default and what was given; its help."""
    config = type(chosen)
    help_of, types, lines = option_help(config), option_types(config), []
    for field in fields(config):
        kind = type_name(types[field.name]) if field.name in types else str(field.type)
        here = f", here {getattr(chosen, field.name)!r}" if field.name in given else ""
        lines.append(f"  {field.name:<20} {kind:<44} default {getattr(config(), field.name)!r}{here}")
        former = [old for old, new in renamed.items() if new == field.name]
        formerly = f" (formerly {', '.join(former)})" if former else ""
        lines.append(f"  {'':<20} {help_of.get(field.name, '')}{formerly}")
    return "\n".join(lines)


def _transform(name: str, options: Mapping[str, Any]) -> str:
    """A transform: what it is, which attentions it works on, its options."""
    name = transform_of_class(name) if ":" in name else name
    chosen = make_transform_config(name, options)
    row = registered_transforms()[name]
    text = inspect.cleandoc(type(chosen).__doc__ or "").split("\nArgs:")[0].strip()
    facts = {
        "from": row.source,
        "paper": chosen.paper or "-",
        "looks at values first": "yes, set --backbone.calibrate=N" if chosen.calibrated else "no",
        "different values": str(chosen.most_values or "any number"),
        "works on": ", ".join(attentions_with_probabilities()),
    }
    head = f"{name}: {text}\n\n" + "\n".join(f"  {key:<22} {value}" for key, value in facts.items())
    return f"{head}\n\noptions (--transform.OPTION=VALUE)\n{_options(chosen, options)}"


def _depth(name: str, options: Mapping[str, Any]) -> str:
    """A depth policy: what it is, whether it learns, its options."""
    name = depth_of_class(name) if ":" in name else name
    chosen = make_depth_config(name, options)
    row = registered_depths()[name]
    text = inspect.cleandoc(type(chosen).__doc__ or "").split("\nArgs:")[0].strip()
    facts = {
        "from": row.source,
        "paper": chosen.paper or "-",
        "learned": "yes, by fit" if chosen.learns else "no",
        "looks after": f"{chosen.first_layers} layers, which always run" if chosen.first_layers else "the embedding",
        "works on": "encoders and decoders, with any attention",
    }
    head = f"{name}: {text}\n\n" + "\n".join(f"  {key:<22} {value}" for key, value in facts.items())
    return f"{head}\n\noptions (--depth.OPTION=VALUE)\n{_options(chosen, options)}"


def _head(name: str, source: str, config: AttentionConfig) -> str:
    can = config.can
    lengths = [f"multiples of {can.length_multiple}"] if can.length_multiple > 1 else []
    lengths += [f"at most {can.max_length} tokens"] if can.max_length is not None else []
    facts = {
        "from": source,
        "paper": config.paper or "-",
        "time": config.complexity or "-",
        "patterns": ", ".join(can.patterns),
        "causality": "strict" if can.strictly_causal else "not strict: a choice may depend on the future",
        "decoding": "with a KV cache" if can.decode else "no",
        "grouped heads": "yes" if can.gqa else "no",
        "padding": "yes" if can.padding else "no",
        "lengths": ", ".join(lengths) or "any",
        "own parameters": "yes" if can.owns_parameters else "no",
        "dtypes": ", ".join(can.dtypes),
        "head sizes": ", ".join(map(str, can.head_dims)) or "any",
    }
    text = inspect.cleandoc(config.__doc__ or "").split("\nArgs:")[0].strip()
    return f"{name}: {text}\n\n" + "\n".join(f"  {k:<15} {v}" for k, v in facts.items())


def option_help(config: type[Any]) -> dict[str, str]:
    """Option -> its line in the docstrings' `Args`, base classes included."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        section = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.M | re.S):
            found[name] = " ".join(text.split())
    return found

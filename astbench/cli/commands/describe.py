"""`astbench describe NAME`: an attention's options, abilities and paper."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

from astbench.cli.explain_call import KEYS, explain_call
from astbench.cli.names import current_options, read_names
from astbench.errors import ConfigError
from astbench_registry import AttentionConfig
from astbench_registry.registry import config_class, make_config, option_types, registered, type_name


def run(words: list[str]) -> int:
    """Print one attention, or with `--explain` which kernel a call of it would run."""
    line = read_names(words)
    explain = line.has("--explain")
    names = line.words
    if line.help or not names:
        print("usage: astbench describe NAME [--attention.OPTION=VALUE...] [--plugins=FILE.py|MODULE]")
        print(f"       astbench describe NAME --explain N=32768 [KEY=VALUE...]   keys: {', '.join(KEYS)}")
        if not line.help:
            raise ConfigError("astbench describe needs a name; `astbench list` shows them")
        return 0
    if len(names) > 1 and not explain:
        if "=" in names[1]:
            raise ConfigError(f"astbench describe takes {names[1]} only with --explain")
        raise ConfigError(f"astbench describe takes one name, got {' '.join(names)}")
    config = config_class(names[0])
    options = current_options(names[0], line.attention_options("describe", "--explain"))
    chosen = make_config(names[0], options)
    if explain:
        print(explain_call(names[0], chosen, list(names[1:])))
        return 0
    rows = registered()
    source = rows[names[0]].source if names[0] in rows else names[0]
    print(_head(names[0], source, chosen))
    help_of, types = option_help(config), option_types(config)
    print("\noptions (--attention.OPTION=VALUE)")
    for field in fields(config):
        kind = type_name(types[field.name]) if field.name in types else str(field.type)
        given = f", here {getattr(chosen, field.name)!r}" if field.name in options else ""
        print(f"  {field.name:<20} {kind:<44} default {getattr(config(), field.name)!r}{given}")
        former = [old for old, new in config.renamed.items() if new == field.name]
        formerly = f" (formerly {', '.join(former)})" if former else ""
        print(f"  {'':<20} {help_of.get(field.name, '')}{formerly}")
    return 0


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


def option_help(config: type[AttentionConfig]) -> dict[str, str]:
    """Option -> its line in the docstrings' `Args`, base classes included."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        section = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.M | re.S):
            found[name] = " ".join(text.split())
    return found

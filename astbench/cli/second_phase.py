"""The command line as the parser of the second phase takes it: configs that fit the names, then what was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astbench import console
from astbench.cli.command_line import CommandLine
from astbench.cli.config_files import CODE, NAMED, ConfigFile, config_arguments

_LONG = {"--seed": "--seed_everything", "--backbone": "--backbone.name"}
_KNOWN_ALREADY = (
    *(f"--{kind}{name}" for kind in CODE for name in ("", ".name")),
    "--resume",
)


def parser_arguments(line: CommandLine, folder: Path) -> list[str]:
    """Arguments for LightningCLI; the configs are written to `folder`, with a note on what does not fit."""
    arguments = config_arguments((_fitted(config, line) for config in line.configs), folder)
    for word in line.arguments(*_KNOWN_ALREADY):
        option, equals, value = word.partition("=")
        arguments.append(_LONG.get(option, option) + equals + value)
    if line.resume:
        arguments.append(f"--run_dir={line.resume}")
    return arguments


def _fitted(config: ConfigFile, line: CommandLine) -> dict[str, Any]:
    """The options of a config that the chosen attention and task know, under the parser's names."""
    options = {key: value for key, value in config.data.items() if key not in ("plugins", "plugins+", "run_dir")}
    for kind in NAMED:
        if isinstance(options.get(kind), str):
            options[kind] = {"name": options[kind]}
    for kind in CODE:
        name = getattr(line, kind)
        given = (options.get(kind) or {}).get("name")
        if given is not None and given == line.value(f"{kind}.name"):
            options[kind] = {**options[kind], "name": name}  # ./mine.py:Mine by the name that its class registered
        elif given not in (None, name):
            console.say(f"{kind} {name} replaces {given} of {config.path}: the options of {given} are dropped")
            del options[kind]
            if kind == "task":
                options.pop("data", None)
    if "seed" in options:
        options["seed_everything"] = options.pop("seed")
    return options

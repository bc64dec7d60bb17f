"""`astbench bench`: time and memory of attention layers over the length, on the CPU or a CUDA device."""

from __future__ import annotations

import json
import tempfile
from argparse import ArgumentError
from dataclasses import fields
from pathlib import Path

from astbench.bench.config import BenchConfig
from astbench.cli.bounds import check_attention_sizes, check_numbers
from astbench.cli.command_line import read_command_line
from astbench.cli.config_files import config_arguments
from astbench.cli.messages import explain
from astbench.errors import ConfigError


def run(words: list[str]) -> int:
    """Measure, print, and leave record, CSV and plots in the run folder; 1 when an attention's gate is red."""
    config = _parse(words)
    from astbench.bench.processes import Worker
    from astbench.bench.run import run_bench

    with Worker() as worker:
        _, record = run_bench(config, words, worker)
    return 1 if record["red"] else 0


def _parse(words: list[str]) -> BenchConfig:
    from jsonargparse import ArgumentParser

    line = read_command_line(words)
    parser = ArgumentParser(prog="astbench bench", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_class_arguments(BenchConfig)
    plugins = [f"--plugins={json.dumps(line.plugins)}"] if line.plugins else []
    known = {option.name for option in fields(BenchConfig)}
    for config in line.configs:  # the parser takes a group without options for nothing at all
        for name in config.data:
            if name not in known:
                raise ConfigError(f"--config={config.path}: astbench bench has no option '{name}'")
    with tempfile.TemporaryDirectory(prefix="astbench-") as folder:
        configs = config_arguments((config.data for config in line.configs), Path(folder))
        try:
            given = parser.parse_args([*configs, *line.arguments(), *plugins]).as_dict()
        except ArgumentError as error:
            raise ConfigError(f"astbench bench: {explain(str(error))}") from error
    check_numbers(given, "--")
    for options in given["options"].values():
        check_attention_sizes(options, max(given["lengths"], default=0))
    return BenchConfig(**{k: v for k, v in given.items() if k != "config"})

"""`astbench bench`: time and memory of attention layers over the length, on the CPU or a CUDA device."""

from __future__ import annotations

from astbench.bench.config import BenchConfig
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

    parser = ArgumentParser(prog="astbench bench", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_class_arguments(BenchConfig)
    try:
        given = parser.parse_args(words).as_dict()
        return BenchConfig(**{k: v for k, v in given.items() if k != "config"})
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"astbench bench: {explain(str(error))}") from error

"""What a row is called, from its record's options and from the runs that it started from. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from astbench.backbones.presets import PRESETS
from astbench.tables.records import Group, Run


def name(run: Run) -> str:
    """The attention, and what is said of the run beside its record."""
    said = f", {run.entry.said}" if run.entry.said else ""
    return f"`{run.attention['name']}`{said}"


def learned(run: Run) -> str:
    """What was trained: nothing, predictors (the attention's own parameters) or all weights."""
    if run.record["command"] != "fit":
        return "nothing"
    return "predictors" if run.record["config"]["optim"]["train"] == "attention" else "all weights"


def described(run: Run) -> str:
    """Name and the options that tables of language models compare; some came later than some records."""
    options = run.attention
    said = [] if options.get("block_size", 16) == 16 else [f"blocks of {options['block_size']}"]
    if options.get("lists", "own") == "carried":
        said.append(f"carried in tiles of {options['query_tile']}")
    if options["name"] == "ast":
        said += _ast(run)
    return ", ".join([name(run), *said])


def _ast(run: Run) -> list[str]:
    options = run.attention
    said = []
    if learned(run) == "all weights" and options.get("distill_weight") and not options.get("detach"):
        said.append("distillation moves all weights")
    if options.get("sub_blocks", 1) > 1:
        said.append(f"{options['sub_blocks']} means a block")
    if options.get("index_dim"):
        calibrated = run.record["config"]["backbone"].get("calibrate")
        said.append(f"{'an index' if calibrated else 'a random index'} of {options['index_dim']} dimensions")
        if options.get("index_pool", 1) > 1:
            said.append(f"the largest of {options['index_pool']} tokens")
    if options.get("budget") == "adaptive":
        said.append("as many as have their share")
    if options.get("budget") == "calibrated":
        said.append(f"calibrated to {options['density']:g}")
    if options.get("patterns"):
        said.append("with patterns")
    if options.get("coarse_stride"):
        said.append("with coarse tokens")
    if options.get("rest"):
        said.append("the rest as one token")
    return said


def origin(run: Run, groups: Mapping[str, Group]) -> Run | None:
    """The run whose weights it started from or evaluated: the latest that was kept in that folder before it.

    None where it started from no run, or from one that has no record.
    """
    config = run.record["config"]
    folder = config.get("ckpt_path") or config.get("init_from")
    if not folder:
        return None
    kept = [r for r in _all(groups) if r.record["config"].get("run_dir") == folder]
    before = [r for r in kept if r.record["started"] < run.record["started"]]
    return max(before, key=lambda r: str(r.record["started"]), default=None)


def start(run: Run, groups: Mapping[str, Group]) -> str:
    """What the weights had learned before."""
    config = run.record["config"]
    if not config.get("init_from"):
        return "from scratch" if config["backbone"]["name"] in PRESETS else "pretrained"
    source = origin(run, groups)
    if source is None:
        return "another run"
    task = {"squad": "SQuAD", "triviaqa": "TriviaQA"}.get(source.record["config"]["task"]["name"], "another task")
    whole = source.record["config"]["data"].get("whole_articles")
    return f"{task}{', whole articles' if whole else ', paragraphs'}, of {source.date}"


def _all(groups: Mapping[str, Group]) -> Iterable[Run]:
    return (run for group in groups.values() for run in group.runs)

"""A model card from a run's record: what it is, what it scored, how it is loaded, and the command that made it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from astbench.files.hub import HUB
from astbench.sharing.source import Source
from astbench.tables.records import ITEMS
from astbench.tables.repeat import Recipe, Repeat, repeat, written
from astbench.tables.verdict import over_items
from astbench.tasks import find_task
from astbench_registry.registry import config_class

_CLASSES = {
    "question_answering": "AutoModelForQuestionAnswering",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
_PLACES = ("data.path", "data.prompt_file", "init_from")
"""Options that say where something lies on one machine."""


def card(source: Source, name: str, recipes: Sequence[Recipe], *, adapter: bool, license: str) -> str:
    """The text of `README.md`.

    Args:
        source: The run and its model.
        name: `owner/name` of the repository.
        recipes: What the command that made it may refer to.
        adapter: The repository holds the attention's own weights alone.
        license: Identifier; empty to say none.
    """
    record, attention = source.run.record, source.handle.name
    command, load = _command(source, recipes), _load(source, name, adapter=adapter)
    places = "FOLDER stands for folders of one machine. " if "FOLDER" in command + load else ""
    what = f"The attention's own weights of `{attention}`" if adapter else f"A model with the attention `{attention}`"
    parts = [
        _front(source, license),
        f"# {name}",
        f"{what}, trained with astbench {record['versions'].get('astbench', '')} on {_trained_on(record)}.".replace(
            "  ", " "
        ),
        _table(dict(_facts(source)), ("", "")),
        "## Scores",
        f"{_sentence(record.get('signature', ''))} {_split(record)}One run with seed {record['seed']}: the intervals "
        "are over what was scored, and say nothing of other seeds.",
        _scores(source),
        "## Load it",
        load,
        "## How it was made",
        f"```sh\n{command}\n```",
        f"{places}It ran on {_machine(record)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(source: Source, license: str) -> str:
    from huggingface_hub import ModelCardData

    base = source.base if "/" in source.base else None
    tags = ["astbench", f"attention:{source.handle.name}"]
    front = ModelCardData(library_name="astbench", tags=tags, base_model=base, license=license or None)
    return f"---\n{front.to_yaml()}\n---"


def _facts(source: Source) -> Iterator[tuple[str, str]]:
    record = source.run.record
    data, counts = record["data"], record["parameters"]
    scratch = f"none: the preset {source.backbone.name}, from scratch" if source.from_scratch else ""
    yield "base model", scratch or source.base or "a folder with pretrained weights"
    yield "attention", f"`{source.handle.name}`, in {record['attached']['layers']} layers"
    options = source.run.attention
    shown = (f"`{key}={value}`" for key, value in options.items() if key not in ("name", "backend"))
    yield "its options", " ".join(shown)
    own = f"{counts['attention']:,} of them the attention's own"
    yield "parameters", f"{counts['total']:,}, {own}; {counts['trainable']:,} were trained"
    yield "task", record["config"]["task"]["name"]
    yield "data", _data(data)
    if source.run.steps:
        yield "training", f"{source.run.steps:,} steps"
    density = record.get("density") or {}
    if density.get("mean") is not None:
        tiles = "" if density.get("tiles") is None else f"; {density['tiles']:.3f} of the tiles"
        yield "density", f"{density['mean']:.3f} of the visible (query, key) pairs{tiles}"
    yield "kernel", ", ".join(record.get("backends") or [])


def _trained_on(record: dict[str, Any]) -> str:
    """The task, and that its data are generated where they are."""
    task, made = record["config"]["task"]["name"], record["data"]["source"] in ("demo", "generated")
    return f"generated data of the task {task}" if made else str(task)


def _split(record: dict[str, Any]) -> str:
    return f"Scored on the {record['split']} split. " if record.get("split") else ""


def _data(data: dict[str, Any]) -> str:
    prints = dict(data.get("fingerprints") or {})
    if "fingerprint" in data:
        prints["evaluated"] = data["fingerprint"]
    marks = ", ".join(f"{split} `{mark}`" for split, mark in prints.items())
    real = " (generated, not the real data set)" if data["source"] == "demo" else ""
    return f"source {data['source']}{real}{f', fingerprints: {marks}' if marks else ''}"


def _scores(source: Source) -> str:
    run = source.run
    items = run.items() if (run.folder / ITEMS).is_file() else {}
    rows = {}
    for name, value in run.metrics.items():
        found = over_items(name, value, items)
        ends = "" if found is None else f"{found[0]:.4g} to {found[1]:.4g} ({found[2]} items)"
        rows[name] = f"{value:.4g} | {ends}"
    return _table(rows, ("metric", "value | 95% interval"))


def _table(rows: dict[str, str], head: tuple[str, str]) -> str:
    columns = head[1].count("|") + 2
    lines = [f"| {head[0]} | {head[1]} |", "|" + " --- |" * columns]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items() if value)])


def _load(source: Source, name: str, *, adapter: bool) -> str:
    attention, where = source.handle.name, list(source.handle.where)
    options = " ".join(_options(source))
    record = source.run.record
    task, data = record["config"]["task"]["name"], record["data"]["source"]
    backbone = source.base if adapter else name
    start = f" --init_from={HUB}{name}" if adapter else ""
    names = f"--attention={attention}{' ' + options if options else ''} --task={task}"
    command = "validate" if record.get("split") == "validation" else "test"
    where_data = f" --data.source={data}" + (" --data.path=FOLDER" if data == "local" else "")
    shell = f"pip install astbench\nastbench {command} {names} --backbone={backbone}{start}{where_data}"
    model = f"{_CLASSES[source.head]}.from_pretrained({backbone!r})"
    if adapter:
        lines = [
            "from astbench import load_adapter",
            f"model = {model}",
            f"handle = load_adapter(model, {HUB + name!r})",
        ]
    else:
        lines = [
            "from astbench import swap_attention",
            f"model = {model}",
            "said = model.config.astbench  # attention, options and places, as it was trained",
            f'handle = swap_attention(model, said["attention"], said["options"], where={where})',
        ]
    python = "\n".join([f"from transformers import {_CLASSES[source.head]}", "", *lines])
    told = "Without the swap this model runs dense attention, which it was not trained for."
    pretrained = find_task(task).load()[1].takes_pretrained
    lines_of_shell = f"```sh\n{shell}\n```\n\n" if pretrained else ""
    return f"{told}\n\n{lines_of_shell}```python\n{python}\n```"


def _options(source: Source) -> Iterator[str]:
    """The attention's options as one types them, but for those that are the defaults whatever the data are."""
    plain = config_class(source.handle.name)().as_dict()
    of_demo = find_task(source.run.record["config"]["task"]["name"]).demo
    chosen = {
        key: value
        for key, value in source.handle.options.items()
        if key != "backend" and (plain[key] != value or f"attention.{key}" in of_demo)
    }
    yield from (f"--attention.{key}={written(value)}" for key, value in chosen.items())


def _command(source: Source, recipes: Sequence[Recipe]) -> str:
    found = repeat(source.run, recipes)
    options = {key: "/" if key in _PLACES and value else value for key, value in found.options.items()}
    if source.base and "backbone.name" in options:
        options["backbone.name"] = source.base
    elif "backbone.name" in options and not source.from_scratch:
        options["backbone.name"] = "/"
    return Repeat(found.command, found.recipe, options).line(without=("trainer.threads",))


def _machine(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    where = ", ".join(hardware.get("gpus") or [hardware["cpu"]])
    commit = (record.get("git") or {}).get("commit", "")
    return f"{where} with torch {versions.get('torch')} and transformers {versions.get('transformers')}" + (
        f", astbench at commit {commit[:12]}" if commit else ""
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""

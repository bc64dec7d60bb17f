"""`astbench analyze`: what an attention chose beside dense attention, or which values its weights have."""

from __future__ import annotations

from pathlib import Path

from astbench.cli.names import check_names, read_names
from astbench.cli.processes import check_interpreter, drop_strays
from astbench.errors import ConfigError
from astbench.files.writing import sha256
from astbench.runs.folder import RunFolder, checkpoint_file, kept_step
from astbench_registry.registry import config_class
from astbench_registry.transforms.registry import require_probabilities

_USAGE = """usage: astbench analyze --ckpt_path=RUN [--batches N] [--rows N] [--drift] [--linguistics] [...]
       astbench analyze --attention=NAME --task=NAME --backbone=FOLDER [...]
       astbench analyze --values --attention=NAME --task=NAME --backbone=FOLDER [--transform=NAME] [...]

Evaluates as `astbench validate`, then runs the first batches again and looks at what was kept, by layer, head,
distance, place and kind of token: share of keys, mass on them, what the best choice of as many blocks would hold,
overlaps.

  --batches N     evaluation batches that are looked at (default: 4)
  --rows N        queries looked at in each sequence, at most, spread evenly (default: 64)
  --drift         the same inputs under the weights that `fit --keep_every=N` kept of the run: how the choice changed.
                  --drift=PATH,PATH names checkpoints of the same model instead, the run's own comes last
  --linguistics   what is chosen by part of speech, named entity, borders of sentences and paragraphs (English).
                  --linguistics=PIPELINE takes another installed pipeline of spaCy

  --values        instead: how attention values are distributed, by layer and head, on a log axis; entropy; shares below
                  powers of ten; after a transform where --transform names one

The run folder holds analysis.json (values.json) and the pictures. For attentions that choose blocks; --values is for
those that yield probabilities. See docs/analysis.md."""

_DEFAULTS = {"--batches": 4, "--rows": 64}
_MAY_HAVE_VALUE = ("--drift", "--linguistics")


def run(words: list[str]) -> int:
    """Evaluate and analyze."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    if valued := next((word for word in words if word.startswith("--values=")), None):
        raise ConfigError(f"--values takes no value, got {valued.partition('=')[2]}")
    of_values = "--values" in words
    numbers, asked, rest = _own([word for word in words if word != "--values"])
    if of_values and asked:
        raise ConfigError(f"--values looks at attention values alone; leave out {' and '.join(asked)}")
    line = read_names(rest)
    check_names(line)
    files = [] if "--drift" not in asked else _drifting(asked["--drift"], line.value("ckpt_path"))
    check_interpreter()
    drop_strays()
    assert line.attention is not None
    if line.depth is not None:
        raise ConfigError(f"analyze looks at every layer of every input; --depth={line.depth} leaves some out")
    if of_values:
        able = config_class(line.attention)().can.yields_probabilities
        require_probabilities(line.attention, able=able, what="analyze --values")
        from astbench.cli.analysing_values import AnalysingValues
        from astbench.cli.lightning import run as run_lightning

        return run_lightning("validate", line, analysing=AnalysingValues(numbers["--batches"]))
    from astbench_registry.registry import attention_class

    if line.transform is not None:
        raise ConfigError(
            f"analyze looks at what is chosen, which --transform={line.transform} does not change; leave "
            "it out, or add --values"
        )
    if not attention_class(line.attention).block_sparse:
        raise ConfigError(f"--attention={line.attention} chooses no blocks; analyze is for attentions that do")
    from astbench.cli.analysing import Analysing
    from astbench.cli.lightning import run as run_lightning

    pipeline = asked.get("--linguistics")
    return run_lightning("validate", line, Analysing(numbers["--batches"], numbers["--rows"], files, pipeline))


def _own(words: list[str]) -> tuple[dict[str, int], dict[str, str], list[str]]:
    """This command's own options, numbers and others, and those of validate."""
    numbers, asked, rest = dict(_DEFAULTS), {}, []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name in _MAY_HAVE_VALUE:
            asked[name] = value
        elif name in numbers:
            text = value if equals else next(left, "")
            if not text.isdecimal() or not 0 < int(text) <= 1_000_000:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {text or 'nothing'}")
            numbers[name] = int(text)
        else:
            rest.append(word)
    return numbers, asked, rest


def _drifting(named: str, checkpoint: str | None) -> list[Path]:
    """Checkpoints that are compared with the run's own, each whole: those named, else those kept before it.

    Raises:
        ConfigError: there are none, or no run to compare them with.
        CheckpointError: one is missing or damaged.
    """
    if not checkpoint:
        raise ConfigError("--drift compares the weights of a run's steps; name the run with --ckpt_path=RUN")
    last = checkpoint_file(checkpoint)
    if named:
        return [checkpoint_file(path) for path in named.split(",") if path]
    folder = RunFolder(last.parent)
    steps = {file: kept_step(file) for file in folder.kept()}
    step = folder.manifest().get(sha256(last), {}).get("step")
    files = [checkpoint_file(file) for file, at in steps.items() if step is None or at < step]
    if not files:
        raise ConfigError(
            f"{folder.path} keeps no weights of earlier steps: train with --keep_every=N, or name checkpoints, "
            "--drift=PATH,PATH"
        )
    return files

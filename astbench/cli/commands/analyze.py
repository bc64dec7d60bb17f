"""`astbench analyze`: what an attention chose beside dense attention, or which values its weights have."""

from __future__ import annotations

from astbench.cli.names import check_names, read_names
from astbench.cli.processes import check_interpreter, drop_strays
from astbench.errors import ConfigError
from astbench_registry.registry import config_class
from astbench_registry.transforms.registry import require_probabilities

_USAGE = """usage: astbench analyze --ckpt_path=RUN [--batches N] [--rows N] [options of validate]
       astbench analyze --attention=NAME --task=NAME --backbone=FOLDER [...]
       astbench analyze --values --attention=NAME --task=NAME --backbone=FOLDER [--transform=NAME] [...]

Evaluates as `astbench validate`, then runs the first batches again and looks at what was kept, by layer, head,
distance, place and kind of token: share of keys, mass on them, what the best choice of as many blocks would hold,
overlaps.

  --batches N     evaluation batches that are looked at (default: 4)
  --rows N        queries looked at in each sequence, at most, spread evenly (default: 64)

  --values        instead: how attention values are distributed, by layer and head, on a log axis; entropy; shares below
                  powers of ten; after a transform where --transform names one

The run folder holds analysis.json (values.json) and the pictures. For attentions that choose blocks; --values is for
those that yield probabilities. See docs/analysis.md."""

_DEFAULTS = {"--batches": 4, "--rows": 64}


def run(words: list[str]) -> int:
    """Evaluate and analyze."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    if valued := next((word for word in words if word.startswith("--values=")), None):
        raise ConfigError(f"--values takes no value, got {valued.partition('=')[2]}")
    of_values = "--values" in words
    own, rest = _own([word for word in words if word != "--values"])
    line = read_names(rest)
    check_names(line)
    check_interpreter()
    drop_strays()
    assert line.attention is not None
    if of_values:
        able = config_class(line.attention)().can.yields_probabilities
        require_probabilities(line.attention, able=able, what="analyze --values")
        from astbench.cli.analysing_values import AnalysingValues
        from astbench.cli.lightning import run as run_lightning

        return run_lightning("validate", line, analysing=AnalysingValues(own["--batches"]))
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

    return run_lightning("validate", line, analysing=Analysing(own["--batches"], own["--rows"]))


def _own(words: list[str]) -> tuple[dict[str, int], list[str]]:
    """This command's own options, and the others."""
    own, rest = dict(_DEFAULTS), []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name not in own:
            rest.append(word)
            continue
        text = value if equals else next(left, "")
        if not text.isdecimal() or not 0 < int(text) <= 1_000_000:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {text or 'nothing'}")
        own[name] = int(text)
    return own, rest

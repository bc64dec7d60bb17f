"""The README's tables, made from the records beside this file: `python results/tables.py [--write]`.

Every measured cell comes from a `record.json`, the table of attentions from the registry and torch's FLOP
counter; a test holds that the README's tables are what this prints.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"

Record = dict[str, Any]


def records(folder: str) -> dict[str, Record]:
    """Run name -> record, of finished runs."""
    found = {}
    for file in sorted((HERE / folder).glob("*/record.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        assert record["schema"] == 1, f"{file}: unknown schema {record['schema']}"
        if record["state"] == "done":
            found[file.parent.name] = record
    return found


def markdown(head: list[str], rows: Iterable[list[str]], words: int = 1) -> str:
    """A Markdown table; all columns but the first `words` are numbers, right-aligned."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def attention(record: Record) -> dict[str, Any]:
    """The attention's options as they ran."""
    return dict(record["config"]["attention"])


def demo() -> str:
    """Generated questions, from scratch."""
    rows = []
    for record in sorted(records("demo").values(), key=lambda r: (attention(r)["name"], r["seed"])):
        rows.append(
            [
                f"`{attention(record)['name']}`",
                f"{record['metrics']['f1']:.1f}",
                f"{record['metrics']['em']:.1f}",
                f"{record['density']['mean']:.2f}",
                f"{record['train']['steps']}",
                f"{record['seed']}",
            ]
        )
    return markdown(["attention", "F1", "EM", "density", "steps", "seed"], rows)


STARTS = {None: "pretrained", "runs/squad-dense": "SQuAD, paragraphs", "runs/squad-long": "SQuAD, articles"}
"""What the weights had learned before."""


def triviaqa() -> str:
    """Real questions over whole Wikipedia articles."""
    rows = []
    found = records("triviaqa")
    by_f1 = sorted(found.items(), key=lambda one: (one[1].get("train", {}).get("steps", 0), -one[1]["metrics"]["f1"]))
    for name, record in by_f1:
        train = record.get("train")
        start = STARTS[record["config"].get("init_from")] + (", trained again" if name.endswith("-again") else "")
        rows.append(
            [
                f"`{attention(record)['name']}`",
                start,
                f"{record['metrics']['f1']:.1f}",
                f"{record['metrics']['em']:.1f}",
                f"{record['density']['mean']:.2f}",
                str(train["steps"]) if train else "0",
                f"{train['wall_seconds'] / 60:.0f} min" if train else "-",
            ]
        )
    if found:
        title = next(iter(found.values()))["metrics"]["title_f1"]
        rows.append(["always the article's title", "", f"{title:.1f}", "", "", "", ""])
    return markdown(["attention", "start", "F1", "EM", "density", "steps", "training"], rows)


def wikitext() -> str:
    """A pretrained causal model, no training."""
    rows = []
    for record in sorted(records("wikitext2").values(), key=lambda r: r["metrics"]["perplexity"]):
        options = attention(record)
        window = f", window {options['window']}" if "window" in options else ""
        rows.append(
            [
                f"`{options['name']}`{window}",
                str(options.get("query_group", "")),
                f"{options['density']:g}" if "density" in options else "",
                f"{record['density']['mean']:.3f}",
                f"{record['metrics']['perplexity']:.2f}",
            ]
        )
    return markdown(["attention", "query group", "density asked", "density measured", "perplexity"], rows)


def tuned() -> str:
    """A pretrained causal model: untrained, only the predictors taught, all weights tuned."""
    found = records("smollm2")
    dense = {_learned(r): name for name, r in found.items() if attention(r)["name"] == "dense"}
    rows = []
    for name, record in sorted(found.items(), key=lambda item: _tuned_order(item[1])):
        learned = _learned(record)
        other = dense["all weights" if learned == "all weights" else "nothing"]
        rows.append(
            [
                _described(record),
                learned,
                f"{record['density']['mean']:.3f}",
                f"{record['metrics']['perplexity']:.2f}",
                "" if name == other else _over("smollm2", name, other),
            ]
        )
    return markdown(["attention", "what learned", "density", "perplexity", "over dense (95%)"], rows, words=2)


def _learned(record: Record) -> str:
    if record["command"] != "fit":
        return "nothing"
    return "predictors" if record["config"]["optim"]["train"] == "attention" else "all weights"


def _tuned_order(record: Record) -> tuple[Any, ...]:
    stage = ("nothing", "predictors", "all weights").index(_learned(record))
    return stage, record["metrics"]["perplexity"]


def _described(record: Record) -> str:
    """Name and the options that the tables compare; `detach` came later than some records."""
    options = attention(record)
    name = f"`{options['name']}`"
    said = [] if options.get("block_size", 16) == 16 else [f"blocks of {options['block_size']}"]
    if options["name"] != "ast":
        return ", ".join([name, *said])
    if _learned(record) == "all weights" and options["distill_weight"] and not options.get("detach"):
        said.append("distillation moves all weights")
    if options.get("sub_blocks", 1) > 1:
        said.append(f"{options['sub_blocks']} means a block")
    if options["budget"] == "adaptive":
        said.append("as many as have their share")
    if options.get("patterns"):
        said.append("with patterns")
    if options["coarse_stride"]:
        said.append("with coarse tokens")
    if options.get("rest"):
        said.append("the rest as one token")
    return ", ".join([name, *said])


def _over(folder: str, name: str, other: str) -> str:
    """By how much perplexity lies above another run's, with Student's interval over the windows both scored."""
    from scipy import stats

    nll = [json.loads((HERE / folder / run / "items.json").read_text(encoding="utf-8")) for run in (name, other)]
    assert nll[0].keys() == nll[1].keys(), f"{name} and {other} scored different windows"
    gaps = [nll[0][window]["nll"] - nll[1][window]["nll"] for window in nll[0]]
    low, high = stats.ttest_1samp(gaps, 0.0).confidence_interval()
    middle, low, high = (100 * math.expm1(x) for x in (sum(gaps) / len(gaps), low, high))
    return f"{middle:+.1f}% ({low:+.1f} to {high:+.1f})"


def scratch() -> str:
    """Small language models from scratch, all seeds of an attention in one row."""
    found: dict[str, list[Record]] = {}
    for record in records("wikitext2-scratch").values():
        found.setdefault(_described(record), []).append(record)
    rows = []
    for name, runs in found.items():
        perplexities = [run["metrics"]["perplexity"] for run in runs]
        spread = f"{min(perplexities):.1f} to {max(perplexities):.1f}" if len(runs) > 1 else "-"
        density = _mean(run["density"]["mean"] for run in runs)
        own = runs[0]["parameters"]["attention"]
        rows.append([name, f"{density:.3f}", f"{own:,}", f"{len(runs)}", f"{_mean(perplexities):.1f}", spread])
    rows.sort(key=lambda row: float(row[-2]))
    return markdown(["attention", "density", "its parameters", "seeds", "perplexity", "over the seeds"], rows)


def multi30k() -> str:
    """Small translation models from scratch, all seeds of an attention in the same places in one row."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records("multi30k").values():
        where = record["config"]["task"]["where"].replace("_", " ").replace(",", ", ")
        found.setdefault((_described(record), where), []).append(record)
    rows = []
    for (name, where), runs in found.items():
        bleu = [run["metrics"]["bleu"] for run in runs]
        rows.append(
            [
                name,
                where,
                f"{_mean(run['density']['mean'] for run in runs):.3f}",
                f"{runs[0]['parameters']['attention']:,}",
                f"{len(runs)}",
                f"{_mean(bleu):.1f}",
                f"{min(bleu):.1f} to {max(bleu):.1f}" if len(runs) > 1 else "-",
                f"{_mean(run['metrics']['chrf'] for run in runs):.1f}",
            ]
        )
    rows.sort(key=lambda row: -float(row[5]))
    head = ["attention", "replaced", "density", "its parameters", "seeds", "BLEU", "over the seeds", "chrF"]
    return markdown(head, rows, words=2)


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return sum(values) / len(values)


def mqar() -> str:
    """Associative recall: how AST's predictor learns, and what else there is."""
    rows = []
    for record in sorted(records("mqar").values(), key=_mqar_order):
        options, data = attention(record), record["config"]["data"]
        ast = options["name"] == "ast"
        rows.append(
            [
                f"`{options['name']}`",
                f"{data['num_pairs']} in {data['length']}",
                options["estimator"].replace("_", " ") if ast else "",
                ("yes" if options["distill_weight"] else "no") if ast else "",
                f"{record['density']['mean']:.3f}",
                f"{record['metrics']['accuracy']:.1f}",
                f"{list(record['accuracy_by_distance'].values())[-1]['accuracy']:.1f}",
            ]
        )
    head = ["attention", "pairs in tokens", "estimator", "distilled", "density", "accuracy", "at the farthest distance"]
    return markdown(head, rows, words=4)


def _mqar_order(record: Record) -> tuple[int, int, float]:
    data = record["config"]["data"]
    return -data["length"], -data["num_pairs"], -record["metrics"]["accuracy"]


def needle() -> str:
    """Needles in a haystack, near the end of the text and farther back."""
    rows = []
    for record in sorted(records("needle").values(), key=lambda r: -r["metrics"]["accuracy"]):
        options, depths = attention(record), record["accuracy_by_depth"]
        said = f", window {options['window']}" if options["name"] == "local" else ""
        if options["name"] == "ast" and options["density_start"] is None:
            said = ", sparse from the start"
        far = [cell["accuracy"] for depth, cell in depths.items() if int(depth) < 50]
        rows.append(
            [
                f"`{options['name']}`{said}",
                f"{record['density']['mean']:.3f}",
                f"{record['metrics']['accuracy']:.1f}",
                f"{_mean(far):.1f}",
            ]
        )
    return markdown(["attention", "density", "accuracy", "needle in the first half"], rows)


def cost() -> str:
    """Time and memory of a layer over the length."""
    from astbench.bench import analysis

    cells = next(iter(records("cost").values()))["cells"]
    rows = []
    for name in dict.fromkeys(cell["attention"] for cell in cells):
        row = [f"`{name}`"]
        for mode in PASSES:
            times, peaks = analysis.medians(cells, name, mode), analysis.peaks(cells, name, mode)
            row += [f"{1000 * times[n]:,.1f}" if n in times else "-" for n in COST_LENGTHS]
            row += [_fit(analysis.exponent(times))]
            last = COST_LENGTHS[-1]
            row += [f"{peaks[last] / 2**20:,.0f} MiB" if last in peaks else "-", _fit(analysis.exponent(peaks))]
        row += [analysis.against_dense(cells, name, mode) if name != "dense" else "" for mode in PASSES]
        rows.append(row)
    head = [f"{n:,}" for n in COST_LENGTHS] + ["growth", f"peak at {COST_LENGTHS[-1]:,}", "growth"]
    ends = ["forward", "with backward"]
    return markdown(["attention", *(f"{e}: {h}" for e in ends for h in head), *(f"{e}: verdict" for e in ends)], rows)


def decode() -> str:
    """Time of one token with a KV cache."""
    from astbench.bench import analysis

    cells = next(iter(records("decode").values()))["cells"]
    rows = []
    for name in dict.fromkeys(cell["attention"] for cell in cells):
        times = analysis.medians(cells, name, "decode")
        verdict = "" if name == "dense" else analysis.against_dense(cells, name, "decode")
        rows.append([f"`{name}`", *(f"{1000 * times[n]:.1f}" for n in DECODE_LENGTHS), verdict])
    return markdown(["attention", *(f"{n:,} keys" for n in DECODE_LENGTHS), "verdict"], rows, words=1)


DECODE_LENGTHS = (1024, 4096, 16384, 65536)


def kernel() -> str:
    """R of AST's kernel and layer against dense."""
    from astbench.bench import analysis

    rows = []
    for record in records("kernel").values():
        cells, causal = record["cells"], record["config"]["pattern"] == "causal_self"
        for name in dict.fromkeys(cell["attention"] for cell in cells):
            if name == "dense":
                continue
            options = record["config"]["options"]["ast"]
            lists = "causal, a list a token" if causal else f"{options.get('query_group', 64)} tokens share a list"
            if options["block_size"] != 64:
                lists += f", blocks of {options['block_size']}"
            row = [f"`{name}`", lists]
            at = next(c for c in cells if (c["attention"], c["length"]) == (name, KERNEL_LENGTHS[1]))
            row += [f"{at['kernel']['density']:.3f}"]
            for mode in (*KERNEL_PASSES, *PASSES):
                found = analysis.ratio(cells, name, mode)
                row += [f"{found[n]:.2f}" if n in found else "-" for n in KERNEL_LENGTHS]
            row += [analysis.against_dense(cells, name, mode) for mode in PASSES]
            rows.append(row)
    ends = ["kernel", "kernel with backward", "layer", "layer with backward"]
    head = [f"{end}: {n:,}" for end in ends for n in KERNEL_LENGTHS]
    verdicts = ["layer: verdict", "layer with backward: verdict"]
    return markdown(["attention", "lists", "density at 8,192", *head, *verdicts], rows, words=2)


KERNEL_LENGTHS = (2048, 8192, 16384)
PASSES, KERNEL_PASSES = ("forward", "training"), ("kernel", "kernel_training")


def _fit(exponent: float | None) -> str:
    return "-" if exponent is None else f"{exponent:.2f}"


COST_LENGTHS = (512, 2048, 16384)
"""Of the lengths measured, those in the README's table; all are in the record beside it."""

LENGTH, HEADS, HEAD_DIM = 2048, 8, 64
"""The layer whose work is counted in the table of attentions."""


def attentions() -> str:
    """Every built-in attention: what it can do and what one layer of it costs, counted."""
    from astbench_registry import registered

    marks = {"bidirectional_self": "bi", "causal_self": "causal", "bidirectional_cross": "cross"}
    rows = []
    for name, row in registered().items():
        if row.source != "astbench" or row.config is None:
            continue
        can = row.config().can
        parameters, flops, state = counted(name, can.patterns[0])
        causal = ("strictly" if can.strictly_causal else "not strictly") if "causal_self" in can.patterns else "-"
        rows.append(
            [
                f"`{name}`",
                row.config.paper,
                ", ".join(mark for pattern, mark in marks.items() if pattern in can.patterns),
                causal,
                "yes" if can.decode else "-",
                row.config.complexity,
                f"{flops / 1e9:.2f}",
                f"{parameters:,}" if parameters else "0",
                f"{state:,}" if state is not None else "-",
            ]
        )
    head = ["attention", "paper", "patterns", "causal", "decodes", "time", "GFLOPs", "parameters", "state"]
    return markdown(head, rows, words=6)


def counted(name: str, pattern: Any) -> tuple[int, int, int | None]:
    """Parameters, operations of one forward call by torch's counter, and numbers kept for decoding."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention

    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    shape = AttentionShape(HEADS, HEADS, HEAD_DIM, hidden_size=width, max_positions=LENGTH)
    module = build_attention(name, {}, shape).eval()
    q, k, v = (torch.randn(1, HEADS, LENGTH, HEAD_DIM) for _ in range(3))
    context = AttentionContext(hidden_states=torch.randn(1, LENGTH, width))
    # The counter knows no operations of torch's fused CPU attention; of the same call by matmuls it does.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(q, k, v, AttentionMask(pattern), context=context)
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops(), module.state_size(LENGTH)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "triviaqa": triviaqa,
    "wikitext2": wikitext,
    "smollm2": tuned,
    "decode": decode,
    "wikitext2-scratch": scratch,
    "multi30k": multi30k,
    "mqar": mqar,
    "needle": needle,
    "attentions": attentions,
    "cost": cost,
    "kernel": kernel,
}
"""Folder of records -> its table; `attentions` is counted on the spot."""


def main() -> None:
    """Print the tables, or put them into the README between their markers."""
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        if name != "attentions" and not records(name):
            continue
        block = f"<!-- {name} -->\n{make()}<!-- end -->"
        if "--write" in sys.argv:
            text = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, b=block: b, text, flags=re.S)
        else:
            print(block)
    if "--write" in sys.argv:
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

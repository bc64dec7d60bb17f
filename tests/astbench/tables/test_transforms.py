"""Tables of transforms: relative loss against the same run without one, paired over the items."""

import json
import math
from statistics import fmean

import pytest

from astbench.errors import DataError
from astbench.tables.pages.sweeps import NAMES, SCORES
from astbench.tables.pages.transforms import tables
from astbench.tables.records import Entry, Group, Run

NLL = [3.0, 2.0, 2.5, 3.5]


def run(folder, attention, nll, transform=None, zeros=0.0, values=None, density=1.0):
    name = f"{attention}-{len(list(folder.iterdir()))}"
    place = folder / name
    place.mkdir()
    (place / "items.json").write_text(json.dumps({str(i): {"nll": x} for i, x in enumerate(nll)}))
    record = {
        "config": {"attention": {"name": attention}, "task": {"name": "wikitext103"}},
        "metrics": {"perplexity": math.exp(fmean(nll))},
        "density": {"mean": density},
    }
    if transform is not None:
        record["config"]["transform"] = transform
        record["transform"] = {"name": transform["name"], "zeros": zeros, "values": values, "row_sum": 0.97}
    return Run("g", name, place, record, Entry("0"))


def log3bit(threshold, bits):
    return {"name": "log3bit", "threshold": threshold, "zeros": None, "scope": "model", "bits": bits, "layers": None}


def made(*runs):
    return {t.name: t for t in tables(Group("g", "transforms", "Title", "", (), (), {}, tuple(runs), {}), {})}


def test_losses_are_paired_over_the_items(tmp_path):
    dense = run(tmp_path, "dense", NLL)
    pruned = run(tmp_path, "dense", [x + 0.01 for x in NLL], log3bit(0.001, 0), zeros=0.8)
    harder = run(tmp_path, "dense", [x + 0.5 for x in NLL], log3bit(0.01, 0), zeros=0.95)
    quantised = run(
        tmp_path, "dense", [x + d for x, d in zip(NLL, (0.1, 0.2, 0.3, 0.4), strict=True)], log3bit(0.001, 3), 0.8, 8
    )
    plain = run(tmp_path, "dense", NLL, log3bit(0, 3), 0.4, 8)
    hard = run(tmp_path, "dense", NLL, {"name": "hard", "layers": None, "top_k": 4, "weights": "raw"}, 0.9)
    (table,) = made(hard, quantised, harder, plain, pruned, dense).values()
    rows = [row.cells for row in table.rows]
    assert rows[0][:4] == ("`dense`", "none", "0.000", "")
    assert rows[1][1:4] == ("log3bit, threshold 0.001", "0.800", "more than 64")
    assert rows[1][-1] == "+1.0% (+1.0 to +1.0)" and rows[2][2] == "0.950"
    bits = rows[3:5]
    assert [row[1] for row in bits] == ["log3bit, no threshold, 3 bits", "log3bit, threshold 0.001, 3 bits"]
    assert bits[1][3] == "8"
    half = 3.18245 * 0.129099 / 2  # Student's at 3 degrees of freedom
    ends = [100 * math.expm1(0.25 + sign * half) for sign in (0, -1, 1)]
    assert bits[1][-1] == "{:+.1f}% ({:+.1f} to {:+.1f})".format(*ends)
    assert rows[5][1] == "hard, top k 4, weights raw"


def test_each_attention_has_its_own_comparison(tmp_path):
    dense, ast = run(tmp_path, "dense", NLL), run(tmp_path, "ast", [x + 1 for x in NLL], density=0.25)
    on_ast = run(tmp_path, "ast", [x + 1.1 for x in NLL], log3bit(0.001, 0), zeros=0.85)
    rows = [row.cells for row in made(dense, ast, on_ast)["g"].rows]
    assert rows[0][:3] == ("`ast`", "none", "0.750") and rows[1][-1].startswith("+10.5%")
    with pytest.raises(DataError, match="needs a run of ast without a transform"):
        made(dense, on_ast)


def test_other_items_are_refused(tmp_path):
    with pytest.raises(DataError, match="scored other items"):
        made(run(tmp_path, "dense", NLL[:3]), run(tmp_path, "dense", NLL, log3bit(0.001, 0)))


@pytest.mark.parametrize("metric", SCORES)
def test_every_metric_that_heads_a_table_has_its_words(tmp_path, metric):
    base, changed = run(tmp_path, "dense", NLL), run(tmp_path, "dense", NLL, log3bit(0.001, 0))
    for one, each in ((base, 0.5), (changed, 0.4)):
        one.record["metrics"] = {metric: each}
        (one.folder / "items.json").write_text(json.dumps({str(i): {SCORES[metric]: each} for i in range(4)}))
    (table,) = made(base, changed).values()
    assert table.head[-2] == NAMES[metric]
    assert table.rows[1].cells[-1].startswith("-9.5%" if metric == "perplexity" else "+20.0%")

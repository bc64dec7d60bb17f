"""Tables of sweeps: settings over seeds, against dense on the same items."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from scipy import stats

from astbench.errors import DataError
from astbench.tables.pages.sweeps import differences, settings_of, short, tables
from astbench.tables.records import Entry, Group, Run

ITEMS = [60.0, 80.0, 100.0, 40.0]


def run(folder, attention, seed, scores, **options):
    """A run with these items' accuracies."""
    name = f"{attention}-{'-'.join(map(str, options.values()))}-{seed}"
    place = folder / name
    place.mkdir()
    (place / "items.json").write_text(json.dumps({str(i): {"accuracy": s} for i, s in enumerate(scores)}))
    config = {"attention": {"name": attention, **options}, "task": {"name": "mqar"}, "seed_everything": seed}
    data = {"fingerprints": {"validation": str(len(scores))}}
    record = {
        "config": config,
        "seed": seed,
        "data": data,
        "metrics": {"accuracy": fmean(scores)},
        "density": {"mean": 0.25},
    }
    return Run("g", name, place, record, Entry("0"))


def group(*runs):
    return Group("g", "sweep", "Title", "", (), (), {}, tuple(runs), {})


def rows(*runs):
    return [row.cells for row in tables(group(*runs), {})[0].rows]


def moved(by):
    return [score + by for score in ITEMS]


def test_a_row_a_setting(tmp_path):
    dense = [run(tmp_path, "dense", seed, moved(seed)) for seed in (0, 1)]
    few = [run(tmp_path, "ast", seed, moved(seed - 10), density=0.25, block_size=4) for seed in (0, 1)]
    many = [run(tmp_path, "ast", 0, moved(-4), density=0.5, block_size=4)]
    found = rows(*few, *many, *dense)
    assert [row[0] for row in found] == ["`dense`", "`ast`, density 0.5", "`ast`, density 0.25"]
    assert [row[2:4] for row in found] == [("70.50", "± 6.35 (2)"), ("66.00", "(1)"), ("60.50", "± 6.35 (2)")]
    assert found[0][4:] == ("", "", "1")
    assert found[1][4:] == ("-4.0 (-4.0 to -4.0)", "< 0.001", "2"), "against the seed that both have"


def test_items_are_paired_and_tests_adjusted(tmp_path):
    dense = run(tmp_path, "dense", 0, ITEMS)
    one = run(tmp_path, "ast", 0, [50.0, 79.0, 93.0, 39.0], density=0.25)
    two = run(tmp_path, "ast", 0, [61.0, 78.0, 102.0, 40.0], density=0.5)
    settings = {setting.label: setting for setting in settings_of([dense, one, two])}
    gaps = differences(settings["`ast`, density 0.25"], settings["`dense`"], "accuracy")
    assert gaps == [-10.0, -1.0, -7.0, -1.0]
    found = {row[0]: row for row in rows(dense, one, two)}
    first = 2 * stats.ttest_1samp(gaps, 0.0).pvalue
    assert found["`ast`, density 0.25"][5] == f"{first:.3f}"
    low, high = stats.ttest_1samp(gaps, 0.0).confidence_interval()
    assert found["`ast`, density 0.25"][4] == f"-4.8 ({low:+.1f} to {high:+.1f})"
    assert float(found["`ast`, density 0.5"][5]) == pytest.approx(
        max(first, stats.ttest_1samp([1.0, -2.0, 2.0, 0.0], 0.0).pvalue), abs=1e-3
    )


def test_settings_are_called_by_what_differs_within_an_attention(tmp_path):
    runs = [run(tmp_path, "dense", 0, ITEMS), run(tmp_path, "local", 0, ITEMS, window=8)]
    runs += [run(tmp_path, "ast", 0, ITEMS, estimator=name, window=3) for name in ("soft", "straight_through")]
    labels = [setting.label for setting in settings_of(runs)]
    assert labels == ["`dense`", "`local`", "`ast`, estimator soft", "`ast`, estimator straight through"]


def test_each_is_compared_on_its_own_examples_and_task(tmp_path):
    few = [run(tmp_path, name, 5, [score, 20.0]) for name, score in (("dense", 30.0), ("ast", 10.0))]
    many = [run(tmp_path, name, 6, scores) for name, scores in (("dense", ITEMS), ("ast", moved(1.0)))]
    for one in (*few, *many):
        one.record["config"]["data"] = {"length": 64 if one in few else 128}
    found = {row[0]: row for row in rows(*few, *many)}
    assert found["`ast`, length 64"][4].startswith("-10.0") and found["`ast`, length 128"][4].startswith("+1.0")
    for one in few:
        one.record["config"]["task"]["name"] = "needle"
    names = [table.name for table in tables(group(*few, *many), {})]
    assert names == ["g.needle", "g.needle-budget", "g.mqar", "g.mqar-budget"]


def test_what_each_took(tmp_path):
    dense, *ast = (run(tmp_path, name, seed, ITEMS) for name, seed in (("dense", 0), ("ast", 0), ("ast", 1)))
    for one, seconds in zip(ast, (10.0, 20.0), strict=True):
        one.record["parameters"] = {"total": 1200, "attention": 200}
        one.record["train"] = {"steps": 3000, "wall_seconds": seconds}
        one.record["peak_memory"] = {"cpu_bytes": 2**21, "kind": "rss"}
    scores, took = tables(group(dense, *ast), {})
    assert (scores.name, took.name) == ("g.scores", "g.budget")
    found = {row.cells[0]: row.cells[1:] for row in took.rows}
    assert found == {"`ast`": ("1,200", "200", "3,000", "15", "2"), "`dense`": ("",) * 5}
    assert [row.runs for row in took.rows] == [row.runs for row in scores.rows]


def test_what_cannot_be_told_apart_shares_a_rank(tmp_path):
    g = random.Random(0)
    noise = [[g.gauss(0, 1) for _ in range(40)] for _ in range(4)]
    shifts = {"dense": 0.0, "ast": -0.1, "local": -5.0, "linear": -5.1}
    runs = [
        run(tmp_path, name, 0, [50 + by + x for x in noise[place]])
        for place, (name, by) in enumerate(shifts.items())
    ]  # fmt: skip
    found = {row[0]: row[6] for row in rows(*runs)}
    assert found == {"`dense`": "1", "`ast`": "1", "`local`": "3", "`linear`": "3"}


def test_the_short_table_has_a_row_an_attention_and_a_column_a_task(tmp_path):
    runs = [run(tmp_path, name, seed, moved(seed)) for name in ("dense", "ast", "local") for seed in (0, 1)]
    for one in runs:
        one.record["config"]["data"] = {"path": "data/mt/multi30k"}
    other = run(tmp_path, "ast", 7, moved(5))
    other.record["config"] |= {"task": {"name": "triviaqa"}, "data": {"source": "demo"}}
    whole = replace(group(*runs, other), short=("ast", "dense"))
    found = short(whole)
    assert found.head == (
        "attention", "multi30k: accuracy, % (density)", "triviaqa, generated: accuracy, % (density)",
    )  # fmt: skip
    assert [row.cells for row in found.rows] == [
        ("`ast`", "70.5 ± 6.4 (0.25)", "75.0 (0.25)"),
        ("`dense`", "70.5 ± 6.4 (0.25)", "-"),
    ]
    with pytest.raises(DataError, match="wants nsa, and no run"):
        short(replace(whole, short=("ast", "nsa")))
    twice = run(tmp_path, "ast", 0, ITEMS, density=0.5)
    twice.record["config"]["data"] = {}
    with pytest.raises(DataError, match="no one row for ast"):
        short(replace(group(*runs, twice), short=("ast",)))


def test_refusals(tmp_path):
    dense, ast = run(tmp_path, "dense", 0, ITEMS), run(tmp_path, "ast", 0, ITEMS)
    assert rows(ast)[0][4:] == ("", "", ""), "without any dense run there is nothing to compare with"
    other = run(tmp_path, "ast", 1, ITEMS[:2])
    with pytest.raises(DataError, match="no dense run on the same examples"):
        rows(dense, other)
    other.record["data"] = dense.record["data"]
    with pytest.raises(DataError, match="scored other items"):
        rows(dense, other)
    again = copy.deepcopy(ast)
    again = Run("g", "twice", ast.folder, again.record, ast.entry)
    with pytest.raises(DataError, match="repeat a seed"):
        rows(dense, ast, again)
    (ast.folder / "items.json").write_text(json.dumps({str(i): {"f1": 1} for i in range(4)}))
    with pytest.raises(DataError, match="hold no accuracy"):
        rows(dense, ast)


def test_perplexity_is_better_lower_and_compared_in_percent(tmp_path):
    runs = []
    for name, shift in (("dense", 0.0), ("ast", 0.1)):
        one = run(tmp_path, name, 0, [1.0, 2.0, 3.0])
        nll = {str(i): {"nll": i + 1.0 + shift + 0.01 * i} for i in range(3)}
        (one.folder / "items.json").write_text(json.dumps(nll))
        one.record["metrics"] = {"perplexity": 7.4 + shift}
        runs.append(one)
    found = rows(*runs)
    assert [row[0] for row in found] == ["`dense`", "`ast`"] and found[1][4] == "+10.5% (+10.5 to +10.5)"


def test_a_real_group_is_a_sweep():
    from astbench.tables.records import read_groups

    found = read_groups(Path(__file__).parents[3] / "results")["wikitext2-scratch"]
    table = tables(found, {})[0]
    by_label = {row.cells[0]: row.cells for row in table.rows}
    assert by_label["`dense`"][3].endswith("(3)") and any(label.startswith("`ast`") for label in by_label)

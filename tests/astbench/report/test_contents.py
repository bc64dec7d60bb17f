"""What the page holds: every record of the tree, its numbers as they are, and no text that could become markup."""

import json
import re
import shutil
from pathlib import Path

import pytest

from astbench.errors import DataError
from astbench.report.contents import contents
from astbench.report.page import page
from astbench.tables.documents import Book
from astbench.tables.records import read_groups

ROOT = Path(__file__).parents[3]


def book(root):
    return Book(root / "results", root / "docs", root / "recipes")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two groups: scored runs and a bench."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("needle", "cost"):
        shutil.copytree(ROOT / "results" / name, tree / "results" / name)
    shutil.copytree(ROOT / "recipes", tree / "recipes")
    return tree


def held(text):
    """The data of a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def test_every_record_of_the_real_tree_is_in_it():
    found = contents(book(ROOT), [])
    shown = {run["id"] for run in found["runs"]} | {bench["id"] for bench in found["benches"]}
    runs = [run for group in read_groups(ROOT / "results").values() for run in group.runs]
    served = [run for run in runs if run.record["command"] == "deploy-test"]  # shown in tables alone
    assert served and shown == {f"{run.group}/{run.name}" for run in runs if run not in served}
    for run in found["runs"]:
        record = json.loads((ROOT / "results" / run["id"] / "record.json").read_text())
        assert run["value"] == record["metrics"][run["metric"]]
        assert run["density"] == record["density"]["mean"]
        assert run["repeat"].startswith("astbench ")
    linked = {i for g in found["groups"] for t in g["tables"] for row in t["rows"] for i in row["runs"]}
    assert linked <= shown
    assert all(series["seconds"] for bench in found["benches"] for series in bench["series"])
    page(found, "all")  # numbers that JSON cannot say would raise


def test_a_run_beside_the_records_with_its_curves(tree, tmp_path):
    folder = shutil.copytree(tree / "results" / "needle" / "dense", tmp_path / "mine")
    (folder / "metrics.csv").write_text("step,train/loss,epoch,val/accuracy\n0,3.5,0.0,\n1,2.5,0.0,\n2,,1.0,40.0\n3,1.")
    found = contents(book(tree), [folder])
    run = next(run for run in found["runs"] if run["id"] == "runs/mine")
    assert run["curves"] == {"train/loss": [[0, 3.5], [1, 2.5], [3, 1.0]], "val/accuracy": [[2, 40.0]]}
    assert found["groups"][-1]["name"] == "runs"
    alone = contents(Book(tmp_path / "none", tmp_path, tmp_path), [folder], alone=True)
    assert [run["id"] for run in alone["runs"]] == ["runs/mine"]


def test_what_was_chosen_comes_along(tree, tmp_path):
    folder = shutil.copytree(tree / "results" / "needle" / "dense", tmp_path / "mine")
    (folder / "explorer.json").write_text('{"schema": 1, "layers": {}}')
    assert contents(book(tree), [folder])["patterns"] == {"runs/mine": {"schema": 1, "layers": {}}}
    for text, said in (("{", "is no JSON"), ("[]", "holds no mapping"), ('{"schema": 2}', "is none of what")):
        (folder / "explorer.json").write_text(text)
        with pytest.raises(DataError, match=rf"explorer\.json {said}"):
            contents(book(tree), [folder])


def test_no_text_of_a_record_becomes_markup(tree, tmp_path):
    evil = "</script><script>alert(1)</script><!-- {{script}}{{data}}"
    folder = shutil.copytree(tree / "results" / "needle" / "dense", tmp_path / "mine")
    record = json.loads((folder / "record.json").read_text())
    record["signature"] = evil
    (folder / "record.json").write_text(json.dumps(record))
    text = page(contents(book(tree), [folder]), evil)
    assert evil not in text and text.count("</script>") == 2 and "<title>&lt;/script&gt;" in text
    assert next(run for run in held(text)["runs"] if run["group"] == "runs")["signature"] == evil
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r'(src|href)="https?:', text), "it asks nothing of a network"


def test_refused(astbench, tree, tmp_path):
    for words, said in (
        (["nowhere"], "nowhere is not the folder of a run"),
        (["--results=nowhere"], "--results=nowhere is not a folder"),
        (
            ["--results=nowhere", str(tree / "results" / "needle" / "dense")],
            "--alone shows the given runs and needs none",
        ),
        (["--alone"], "--alone shows the given runs"),
        (["--style=x"], "unrecognized arguments: --style=x"),
    ):
        done = astbench("report", *words, f"--out={tmp_path / 'page.html'}")
        assert done.code in (2, 3) and said in done.err, done.err
    folder = shutil.copytree(tree / "results" / "needle" / "dense", tmp_path / "mine")
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "state": "failed"}))
    done = astbench("report", str(folder), f"--out={tmp_path / 'page.html'}")
    assert done.code == 3 and "only finished runs are shown" in done.err
    assert not (tmp_path / "page.html").exists()


def test_command(astbench, tree, tmp_path):
    out = tmp_path / "new" / "page.html"
    done = astbench("report", f"--results={tree / 'results'}", f"--recipes={tree / 'recipes'}", f"--out={out}")
    assert done.code == 0 and re.search(r"page\.html: 9 runs, 1 bench, \d+\.\d MB", done.out), done.out + done.err
    assert len(held(out.read_text())["runs"]) == 9

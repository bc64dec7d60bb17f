"""What `astbench table --check` must see: the real tree, and copies of it that somebody tampered with."""

import json
import shutil
from pathlib import Path

import pytest

from astbench.cli import main
from astbench.errors import DataError
from astbench.tables.documents import Book, first_difference, write

ROOT = Path(__file__).parents[3]
MARKED = "Some words.\n\n<!-- needle -->\nold\n<!-- end -->\n\nMore words.\n"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Records, pages and recipes as they are, and two documents that show one small table each."""
    tree = tmp_path_factory.mktemp("template")
    for folder in ("results", "recipes", "docs/results"):
        shutil.copytree(ROOT / folder, tree / folder)
    (tree / "README.md").write_text(MARKED)
    (tree / "docs" / "other.md").write_text("<!-- cost.memory -->\n<!-- end -->\n")
    write(book(tree), ["needle", "cost.memory"])
    assert first_difference(book(tree)) is None
    return tree


@pytest.fixture
def tree(template, tmp_path):
    """A copy to tamper with."""
    return shutil.copytree(template, tmp_path / "tree")


def book(tree):
    return Book(tree / "results", tree / "docs", tree / "recipes")


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_real_tree(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["table", "--check"]) == 0, capsys.readouterr().out


def test_edited_cell(tree):
    edit(tree / "docs" / "results" / "needle.md", "| 96.4 |", "| 97.4 |")
    found = first_difference(book(tree))
    assert "needle.md, line" in found and "97.4" in found and "96.4" in found


def test_edited_number_of_a_record(tree):
    file = tree / "results" / "mqar" / "dense" / "record.json"
    record = json.loads(file.read_text())
    record["density"]["mean"] -= 0.2
    file.write_text(json.dumps(record))
    assert "mqar.md, line" in first_difference(book(tree))


@pytest.mark.parametrize(
    "name, field",
    [
        ("mqar/dense", "metrics.accuracy"),
        ("needle/ast", "accuracy_by_depth.100.accuracy"),
        ("mqar/local", "accuracy_by_distance.4-7.accuracy"),
        ("demo/ast-0", "metrics.f1"),
        ("squad/minilm-dense", "metrics.em"),
        ("smollm2/moba-tuned", "metrics.perplexity"),
        ("smollm2/moba-tuned", "metrics.nll"),
        ("wikitext2-scratch/ast-0", "metrics.word_perplexity"),
    ],
)
def test_edited_score_is_held_against_the_items(tree, name, field):
    """Writing the page anew would show it as if it had been measured."""
    file = tree / "results" / name / "record.json"
    record = json.loads(file.read_text())
    *path, last = field.split(".")
    place = record
    for key in path:
        place = place[key]
    place[last] += 0.2
    file.write_text(json.dumps(record))
    shown = field if field.startswith("metrics") else path[0]
    with pytest.raises(DataError, match=f"{name}/record.json: {shown} is .* items.json beside it gives"):
        write(book(tree))
    (file.parent / "items.json").unlink()
    with pytest.raises(DataError, match=f"{name}/items.json"):
        write(book(tree))


@pytest.mark.parametrize("name", ["mqar", "needle"])
def test_probes_say_what_the_untrained_model_scores(name):
    """Induction heads are built in: what training added is the difference."""
    (table,) = book(ROOT).named(name)
    assert table.head[-1] == "untrained, %"
    for row in table.rows:
        trained, untrained = row.runs
        assert (trained.steps, untrained.steps) == (200, 1) and trained.attention["name"] == untrained.attention["name"]
        assert row.cells[-1] == f"{untrained.metrics['accuracy']:.1f}"


@pytest.mark.parametrize("name", ["needle/dense", "squad/minilm-dense", "decode/layers-cpu"])
def test_edited_option_does_not_fit_its_hash(tree, name):
    """Of new records and of those whose hash was made another way, of runs and of benches."""
    file = tree / "results" / name / "record.json"
    record = json.loads(file.read_text())
    record["config"]["seed" if "seed" in record["config"] else "seed_everything"] = 7
    file.write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"{name}/record.json: config_hash is "):
        write(book(tree))


def test_edited_option_of_a_record(tree):
    edit(tree / "results" / "needle" / "dense" / "record.json", '"max_steps": 200', '"max_steps": 300')
    assert "needle/dense/record.json: config_hash is" in first_difference(book(tree))


def test_edited_config_of_a_bench(tree):
    edit(tree / "results" / "decode" / "layers-cpu" / "record.json", '"repeats": 15', '"repeats": 16')
    assert "layers-cpu/record.json: config_hash is" in first_difference(book(tree))


def test_edited_items(tree):
    file = tree / "results" / "smollm2" / "moba-tuned" / "items.json"
    items = json.loads(file.read_text())
    items["0"]["nll"] += 1.0
    file.write_text(json.dumps(items))
    assert "moba-tuned/record.json: metrics.nll is" in first_difference(book(tree))


@pytest.mark.parametrize("name", ["needle/local", "multi30k/ast-1", "fox/ast-0", "demo/ast-0-make-demo"])
def test_removed_record(tree, name):
    shutil.rmtree(tree / "results" / name)
    found = first_difference(book(tree))
    assert f"{name}/record.json is not there" in found


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "results").iterdir() if p.is_dir()))
def test_removed_folder(tree, name):
    shutil.rmtree(tree / "results" / name)
    found = first_difference(book(tree))
    assert found and (name in found or "README.md" in found)


def test_removed_folder_with_its_page(tree):
    shutil.rmtree(tree / "results" / "needle")
    (tree / "docs" / "results" / "needle.md").unlink()
    assert first_difference(book(tree))
    (tree / "docs" / "results" / "README.md").unlink()
    assert first_difference(book(tree))
    edit(tree / "README.md", "<!-- needle -->", "")
    with pytest.raises(DataError, match="take its line out"):
        write(book(tree))
    sums = tree / "results" / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if "  needle/" not in line))
    write(book(tree))
    assert "needle" not in (tree / "docs" / "results" / "README.md").read_text()


def test_added_record(tree):
    shutil.copytree(tree / "results" / "needle" / "local", tree / "results" / "needle" / "another")
    found = first_difference(book(tree))
    assert "another/record.json stands in no table: add to" in found


def test_added_folder(tree):
    shutil.copytree(tree / "results" / "needle" / "local", tree / "results" / "mine" / "run")
    assert first_difference(book(tree)).endswith("mine.md is missing")


def test_swapped_record(tree):
    needle = tree / "results" / "needle"
    shutil.copy(needle / "dense" / "record.json", needle / "local" / "record.json")
    assert "its record" in first_difference(book(tree))


def test_missing_page(tree):
    (tree / "docs" / "results" / "squad.md").unlink()
    assert first_difference(book(tree)).endswith("squad.md is missing")


def test_page_of_nothing(tree):
    (tree / "docs" / "results" / "gone.md").write_text("# Gone\n")
    assert "gone.md shows a table that no records make" in first_difference(book(tree))


def test_edited_dagger(tree):
    edit(tree / "results" / "demo" / "table.yaml", "    stale:", "    said:")
    assert "demo.md, line" in first_difference(book(tree))


@pytest.mark.parametrize("file, old", [("README.md", "| 27.3 |"), ("docs/other.md", "| 12,304 |")])
def test_edited_table_in_a_document(tree, file, old):
    edit(tree / file, old, "| 1.0 |")
    assert f"{Path(file).name}, line" in first_difference(book(tree))


def test_marker_of_an_unknown_table(tree):
    edit(tree / "README.md", "<!-- needle -->", "<!-- needles -->")
    assert "has a marker for needles" in first_difference(book(tree))


def test_write_leaves_the_words_around_a_marker(tree):
    text = (tree / "README.md").read_text()
    assert text.startswith("Some words.\n\n<!-- needle -->\n| attention | density |")
    assert text.endswith("<!-- end -->\n\nMore words.\n")
    assert not write(book(tree)), "a second time nothing is left to write"


def test_names_limit_what_is_written_and_compared(tree):
    edit(tree / "docs" / "results" / "needle.md", "| 96.4 |", "| 97.4 |")
    edit(tree / "docs" / "results" / "mqar.md", "| 99.6 |", "| 99.7 |")
    assert first_difference(book(tree), ["demo"]) is None
    assert [file.name for file in write(book(tree), ["needle"])] == ["needle.md"]
    assert "mqar.md" in first_difference(book(tree))


def test_check_ends_with_one(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    assert main(["table", "--check", "needle", "squad"]) == 0
    shutil.rmtree("results/needle")
    assert main(["table", "--check"]) == 1
    assert "docs/results/needle.md shows a table that no records make" in capsys.readouterr().out

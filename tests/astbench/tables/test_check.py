"""What `astbench table --check` must see: the real tree, and copies of it that somebody tampered with."""

import json
import shutil
from pathlib import Path

import pytest

from astbench.cli import main
from astbench.errors import DataError
from astbench.runs.record import config_hash
from astbench.tables.documents import Book, first_difference, write
from astbench.tables.seals import SUMS

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


def edit_record(tree, name, change):
    file = tree / "results" / name / "record.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def test_edited_number_of_a_record(tree):
    edit_record(tree, "mqar/dense", lambda record: record["density"].update(mean=0.8, layers={"one": [0.8]}))
    assert "mqar.md, line" in first_difference(book(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["density"].update(mean=0.8), "density.mean is 0.8 and the mean of density.layers 1.0"),
        (lambda r: r.update(seed=1), "seed is 1 and config.seed_everything 0"),
        (lambda r: r["train"].update(steps=20), "train.steps is 20 and config.trainer.max_steps "),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_however_pages_are_written(tree, change, message):
    edit_record(tree, "mqar/dense", change)
    with pytest.raises(DataError, match=message):
        write(book(tree))


def test_one_run_is_no_second_seed(tree):
    """A copy whose seed says another everywhere: it began in the same second and took as many milliseconds."""
    shutil.copytree(tree / "results/demo/dense-0", tree / "results/mine/dense-0")
    shutil.copytree(tree / "results/demo/dense-0", tree / "results/mine/dense-1")

    def reseeded(record):
        record["seed"] = record["config"]["seed_everything"] = 1
        record["config_hash"] = config_hash(record["config"])

    edit_record(tree, "mine/dense-1", reseeded)
    assert "dense-0 and dense-1 are records of one run" in first_difference(book(tree))


def test_also_is_for_options_that_came_later(tree):
    file = tree / "results/demo/table.yaml"
    shown = f"  dense-0: '{json.loads((file.parent / 'dense-0/record.json').read_text())['config_hash']}'\n"
    assert shown in file.read_text()
    for key, refused in (("optim.lr", True), ("seed_everything", True), ("attention.later", False)):
        text = file.read_text()
        edit(file, shown, shown.replace(": '", ": {config_hash: '").replace("\n", f", also: {{{key}: 7}}}}\n"))
        found = first_difference(book(tree)) or ""
        assert (f"dense-0: also says {key}, which its record holds" in found) is refused
        file.write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(metrics=None), "metrics must be numbers by name, got None"),
        (lambda r: r["metrics"].update(accuracy="99"), "metrics must be numbers by name, got {'accuracy': '99'"),
        (lambda r: r.update(seed=None), "seed must be int, got None"),
        (lambda r: r.update(data=[]), "data must be dict, got "),
    ],
)
def test_a_record_without_what_tables_show_names_its_file(tree, change, message):
    edit_record(tree, "mqar/dense", change)
    found = first_difference(book(tree))
    assert message in found and "mqar/dense/record.json" in found


def test_a_sealed_record_comes_from_a_clean_tree(tree):
    (tree / "results" / SUMS).unlink()
    edit_record(tree, "mqar/dense", lambda record: record["git"].update(dirty=True))
    write(book(tree))
    assert first_difference(book(tree)) is None, "of somebody's own records nothing is asked"
    (tree / "results" / SUMS).touch()
    write(book(tree))
    assert "mqar/dense/record.json: it ran from a tree with changes" in first_difference(book(tree))


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
    gone = tree / "docs" / "results" / "gone.md"
    gone.write_text("<!-- Made from results/gone -->\n# Gone\n")
    assert "gone.md shows a table that no records make" in first_difference(book(tree))
    assert write(book(tree)) == ([], [gone]) and not gone.exists()


def test_a_page_written_by_hand_stays(tree):
    own = tree / "docs" / "results" / "mine.md"
    own.write_text("# Mine\n")
    assert first_difference(book(tree)) is None and write(book(tree)) == ([], []) and own.exists()


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
    assert write(book(tree)) == ([], []), "a second time nothing is left to write"


def test_names_limit_what_is_written_and_compared(tree):
    edit(tree / "docs" / "results" / "needle.md", "| 96.4 |", "| 97.4 |")
    edit(tree / "docs" / "results" / "mqar.md", "| 99.6 |", "| 99.7 |")
    assert first_difference(book(tree), ["demo"]) is None
    assert [file.name for file in write(book(tree), ["needle"])[0]] == ["needle.md"]
    assert "mqar.md" in first_difference(book(tree))


def test_check_ends_with_one(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    assert main(["table", "--check", "needle", "squad"]) == 0
    shutil.rmtree("results/needle")
    assert main(["table", "--check"]) == 1
    assert "docs/results/needle.md shows a table that no records make" in capsys.readouterr().out

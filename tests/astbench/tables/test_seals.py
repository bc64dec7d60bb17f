"""Records that are sealed: whatever is changed, removed, added or exchanged is seen."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from astbench.errors import DataError
from astbench.tables.documents import INDEX, Book, first_difference
from astbench.tables.page import index
from astbench.tables.seals import SUMS, broken, seal, sealed

ROOT = Path(__file__).parents[3]
GROUPS = ("needle", "smollm2-4k", "fox", "demo-wmt14")
"""Small ones: of a language model, of recall, of several kinds of runs, of what is on no page."""


def sealed_folder(folder):
    for name in ("a/one/record.json", "a/one/items.json", "b/two/record.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "a" / "table.yaml").write_text("title: x\n")
    (folder / SUMS).touch()
    seal(folder)
    return folder


def test_what_is_sealed_is_seen_when_it_changes(tmp_path):
    folder = sealed_folder(tmp_path)
    assert broken(folder) is None and not seal(folder)
    assert subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=folder).returncode == 0
    (folder / "a" / "table.yaml").write_text("title: y\n")
    assert broken(folder) is None
    (folder / "a/one/record.json").write_text("other")
    assert "a/one/record.json was changed" in broken(folder)
    with pytest.raises(DataError, match=r"a/one/record.json is not what was sealed; .* take its line out"):
        seal(folder)
    (folder / "a/one/record.json").unlink()
    assert "a/one/record.json is gone" in broken(folder)


def test_what_is_new_is_seen_and_sealed(tmp_path):
    folder = sealed_folder(tmp_path)
    before = sealed(folder)
    (folder / "a/three").mkdir()
    (folder / "a/three/record.json").write_text("new")
    assert "a/three/record.json is not in" in broken(folder)
    assert seal(folder) and broken(folder) is None and sealed(folder) != before


@pytest.mark.parametrize(
    "line", ["nonsense", "0" * 64 + "  ../../etc/passwd", "0" * 64 + "  /etc/passwd", "0" * 63 + "  a"]
)
def test_a_list_that_cannot_be_is_refused(tmp_path, line):
    folder = sealed_folder(tmp_path)
    (folder / SUMS).write_text((folder / SUMS).read_text() + line + "\n")
    with pytest.raises(DataError, match=f"{SUMS}:4 is no line"):
        broken(folder)


def test_nothing_is_sealed_in_a_folder_of_ones_own(tmp_path):
    assert broken(tmp_path) is None and sealed(tmp_path) == ""


# ----- random tampering, each caught


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    tree = tmp_path_factory.mktemp("sealed")
    for name in GROUPS:
        shutil.copytree(ROOT / "results" / name, tree / "results" / name)
    shutil.copytree(ROOT / "recipes", tree / "recipes")
    (tree / "results" / SUMS).touch()
    seal(tree / "results")
    from astbench.tables.documents import write

    write(Book(tree / "results", tree / "docs", tree / "recipes"))
    return tree


def leaves(data, kinds, path=()):
    """Paths of the values of some types."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        if isinstance(value, kinds) and not isinstance(value, bool):
            yield (*path, key)
        yield from leaves(value, kinds, (*path, key))


def edit_leaf(file, kinds, change, random_):
    data = json.loads(file.read_text())
    *path, last = random_.choice(list(leaves(data, kinds)))
    held = data
    for key in path:
        held = held[key]
    held[last] = change(held[last])
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def tamper(tree, random_):
    """Do one of many things to the tree; what it was."""
    results = tree / "results"
    runs = sorted(file.parent for file in results.glob("*/*/record.json"))
    run = random_.choice(runs)
    other = random_.choice([one for one in runs if one != run])
    page = random_.choice(sorted((tree / "docs" / "results").glob("*.md")))
    sidecar = run.parent / "table.yaml"

    def digit(file):
        text = file.read_text()
        found = random_.choice([m for m in re.finditer(r"\d", text)])
        new = random_.choice([c for c in "0123456789" if c != found[0]])
        file.write_text(text[: found.start()] + new + text[found.end() :])

    def exchange():
        one, two = ((place / "record.json").read_text() for place in (run, other))
        (run / "record.json").write_text(two)
        (other / "record.json").write_text(one)

    def covered():
        """A record changed, and its digest with it."""
        edit_leaf(run / "record.json", (int, float), lambda value: value + 1, random_)
        (results / SUMS).unlink()
        (results / SUMS).touch()
        seal(results)

    def line():
        lines = (results / SUMS).read_text().splitlines(keepends=True)
        lines.pop(random_.randrange(len(lines)))
        (results / SUMS).write_text("".join(lines))

    ways = {
        "a number of a record": lambda: edit_leaf(run / "record.json", (int, float), lambda value: value + 1, random_),
        "a word of a record": lambda: edit_leaf(run / "record.json", str, lambda value: value + "x", random_),
        "a digit of the items": lambda: digit(run / "items.json") if (run / "items.json").exists() else line(),
        "a record gone": lambda: shutil.rmtree(run),
        "a run twice": lambda: shutil.copytree(run, run.with_name(f"{run.name}-again")),
        "two records exchanged": exchange,
        "a digit of a page": lambda: digit(page),
        "a digit of a table.yaml": lambda: digit(sidecar),
        "a digit of the digests": lambda: digit(results / SUMS),
        "a line of the digests": line,
        "no digests": lambda: (results / SUMS).unlink(),
        "a record and its digest": covered,
    }
    what = random_.choice(list(ways))
    ways[what]()
    return what


def caught(tree):
    """What `astbench table --check` compares, but for documents that are not in this tree."""
    book = Book(tree / "results", tree / "docs", tree / "recipes")
    found = first_difference(book)
    if found is None and (book.pages / INDEX).read_text() != index(book.groups, sealed(book.results)):
        return "the index"
    return found


def tampered(template, folder, seed):
    random_ = random.Random(seed)
    tree = shutil.copytree(template, folder)
    what = tamper(tree, random_)
    found = caught(tree)
    shutil.rmtree(tree)
    return what, found


def test_the_tree_as_it_is_passes(template):
    assert caught(template) is None


@pytest.mark.parametrize("seed", range(24))
def test_tampering_is_caught(template, tmp_path, seed):
    what, found = tampered(template, tmp_path / "tree", seed)
    assert found, what


@pytest.mark.slow
def test_three_hundred_tamperings_are_caught(template, tmp_path):
    escaped = [
        (seed, what)
        for seed in range(300)
        if not (pair := tampered(template, tmp_path / "tree", seed))[1]
        for what in pair[:1]
    ]
    assert escaped == []

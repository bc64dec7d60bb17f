"""Groups of records: what a table.yaml may say, and what becomes of records without one."""

import json
import shutil
from pathlib import Path

import pytest

from astbench.errors import DataError
from astbench.tables.documents import Book, first_difference, write
from astbench.tables.records import read_groups

ROOT = Path(__file__).parents[3]


@pytest.fixture
def group(tmp_path):
    """Two real records in a group of one's own, without a table.yaml."""
    for name in ("dense", "local"):
        shutil.copytree(ROOT / "results" / "needle" / name, tmp_path / "results" / "mine" / name)
    return tmp_path / "results" / "mine"


def hash_of(folder):
    return json.loads((folder / "record.json").read_text())["config_hash"]


def say(group, text):
    (group / "table.yaml").write_text(text)
    return read_groups(group.parent)["mine"]


def test_records_without_a_table_yaml(group, tmp_path):
    found = read_groups(group.parent)["mine"]
    assert found.kind == "needle" and [run.name for run in found.runs] == ["dense", "local"]
    book = Book(tmp_path / "results", tmp_path / "docs", tmp_path / "recipes")
    assert {file.name for file in write(book)[0]} == {"mine.md", "README.md"}
    assert first_difference(book) is None
    page = (tmp_path / "docs" / "results" / "mine.md").read_text()
    assert "| 1 | `dense` | 1.000 | 99.1 | 100.0 |" in page
    assert "astbench fit --attention=local --task=needle" in page


def test_unfinished_run_is_left_out_and_said(group):
    file = group / "local" / "record.json"
    file.write_text(file.read_text().replace('"state": "done"', '"state": "failed"'))
    found = read_groups(group.parent)["mine"]
    assert found.left_out == {"local": "it ended as failed"}
    with pytest.raises(DataError, match="local cannot be a row, it ended as failed"):
        say(group, f"records:\n  dense: '{hash_of(group / 'dense')}'\n  local: '{hash_of(group / 'local')}'\n")


@pytest.mark.parametrize(
    "text, message",
    [
        ("titel: Mine\n", "takes no titel"),
        ("- one\n", "holds no mapping"),
        ("title: [\n", "is no YAML"),
        ("records:\n  dense: 17\n", "must be a config_hash in quotes"),
        ("records:\n  dense: {config_hash: 'a', stail: 'b'}\n", "must be a config_hash in quotes"),
        ("records:\n  dense: 'a'\n", "gives dense the config_hash a"),
        ("records:\n  gone: 'a'\n", "names gone, and"),
        ("left_out:\n  gone: no reason\n", "leaves out gone, and"),
        ("records: {}\n", "stands in no table"),
    ],
)
def test_table_yaml_that_does_not_fit(group, text, message):
    with pytest.raises(DataError, match=message):
        say(group, text)


def test_left_out_and_shown_at_once(group):
    text = f"records:\n  dense: '{hash_of(group / 'dense')}'\nleft_out:\n  local: why\n  dense: why\n"
    with pytest.raises(DataError, match="names dense under records and under left_out"):
        say(group, text)
    assert [run.name for run in say(group, text.replace("  dense: why\n", "")).runs] == ["dense"]


def test_stale_row_has_a_dagger_its_date_and_the_reason(group, tmp_path):
    text = f"records:\n  dense: '{hash_of(group / 'dense')}'\n  local:\n    config_hash: '{hash_of(group / 'local')}'\n"
    say(group, text + "    stale: of another age\n    said: mine\n")
    write(Book(tmp_path / "results", tmp_path / "docs", ROOT / "recipes"))
    page = (tmp_path / "docs" / "results" / "mine.md").read_text()
    assert "| 2 | `local`, mine, window 64 † 2026-11-29 |" in page
    assert "† row 2, measured 2026-11-29: of another age" in page


def test_other_schema(group):
    file = group / "local" / "record.json"
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(DataError, match="has schema 2; this astbench reads 1"):
        read_groups(group.parent)


def test_unknown_kind_and_records_without_its_numbers(group, tmp_path):
    book = Book(tmp_path / "results", tmp_path / "docs", tmp_path / "recipes")
    say(group, "kind: leaderboard\n")
    assert "kind must be one of questions" in first_difference(book)
    say(group, "kind: translation\n")
    book = Book(tmp_path / "results", tmp_path / "docs", tmp_path / "recipes")
    assert "a record of mine has no 'where'" in first_difference(book)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        read_groups(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no NAME/RUN/record\.json"):
        read_groups(tmp_path)

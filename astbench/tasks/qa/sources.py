"""Readers of question-answering data: TriviaQA's own files, and tables with the hub's columns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from os.path import exists, isfile  # of names that the system refuses pathlib's own raise
from pathlib import Path
from typing import Any

from astbench.errors import DataError, MissingPackageError
from astbench.files import fields
from astbench.files.hub import hub_rows
from astbench.files.paths import asked_path, file_inside, shown
from astbench.files.reading import check_unpacked, one_line
from astbench.files.text import json_lines, read_document, read_json
from astbench.tasks.qa.examples import QAExample, distinct_answers, document

TRIVIAQA_HUB = ("mandarjoshi/trivia_qa", "rc.wikipedia", "0f7faf33a3908546c6fd5b73a660e0f8ff173c2f")
"""Data set, configuration and revision on the Hugging Face hub."""

_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "dev", "valid"), "test": ("test",)}
_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def read_triviaqa(path: str | Path, split: str) -> list[QAExample]:
    """TriviaQA from a folder: official JSON plus evidence, or jsonl/parquet tables with the hub's columns.

    Official: `qa/wikipedia-<train|dev|test>.json` (or the same at the top) and `evidence/wikipedia/`. Tables:
    `<train|validation|dev|test>.jsonl[.gz]|.parquet`, one question a row: `question_id`, `question`,
    `answer.{value, aliases}`, `entity_pages.{title[], wiki_context[]}`.

    Raises:
        DataError: missing or damaged files, missing columns; names the file and the line.
    """
    folder = existing(path)
    for name in _SPLIT_NAMES[split]:
        for official in (folder / "qa" / f"wikipedia-{name}.json", folder / f"wikipedia-{name}.json"):
            if isfile(official):
                return list(_official_triviaqa(official, folder / "evidence" / "wikipedia"))
    table = _table(folder, split)
    if table is None:
        names = "|".join(_SPLIT_NAMES[split])
        looked = f"[qa/]wikipedia-{names}.json, {names}{'|'.join(_ENDINGS)}"
        other = {
            "test": "; astbench validate evaluates on the validation split",
            "validation": "; --data.eval_split=test evaluates on the test split",
        }.get(split, "")
        raise DataError(f"--data.path={folder} has no {split} split; looked for {looked}{other}")
    return [triviaqa_row(row, where) for where, row in _rows(table)]


def triviaqa_row(row: Any, where: str) -> QAExample:
    """One row with the hub's columns; all of its pages make one document."""
    answer, pages = fields.mapping(row, "answer", where), fields.mapping(row, "entity_pages", where)
    aliases = [fields.text(answer, "value", where), *fields.texts(answer, "aliases", where)]
    contexts, titles = fields.texts(pages, "wiki_context", where), fields.texts(pages, "title", where)
    return QAExample(
        question_id=fields.identity(row, "question_id", where),
        question=fields.text(row, "question", where),
        answers=distinct_answers(aliases, where),
        context=document(contexts, where),
        title=titles[0] if titles else "",
    )


def _official_triviaqa(file: Path, evidence: Path) -> Iterator[QAExample]:
    data = read_json(file)
    if not isinstance(data, dict) or not isinstance(data.get("Data"), list):
        raise DataError(f"{file}: no 'Data' list; not TriviaQA's official format")
    for number, item in enumerate(data["Data"], 1):
        where = f"{file}: question {number}"
        answer = fields.mapping(item, "Answer", where)
        aliases = [fields.text(answer, "Value", where), *fields.texts(answer, "Aliases", where)]
        if "HumanAnswers" in answer:
            aliases += fields.texts(answer, "HumanAnswers", where)
        pages = fields.rows(item, "EntityPages", where)
        names = [fields.raw(page, "Filename", where) for page in pages]
        titles = [fields.text(page, "Title", where) for page in pages]
        yield QAExample(
            question_id=fields.identity(item, "QuestionId", where),
            question=fields.text(item, "Question", where),
            answers=distinct_answers(aliases, where),
            context=document([_page(evidence, name, where) for name in names], where),
            title=titles[0] if titles else "",
        )


def _page(evidence: Path, name: str, where: str) -> str:
    """The text of an evidence file; its name comes from a file: it may not lead out of the folder."""
    file = file_inside(evidence, name)
    if file is None:
        raise DataError(f"{where}: evidence {shown(name)} does not exist in {evidence}")
    return read_document(file)


def read_hub(split: str) -> list[QAExample]:
    """A split of TriviaQA from the Hugging Face hub at a pinned revision; its offline cache is honoured.

    Raises:
        MissingPackageError: without the `datasets` package.
        DataError: the hub cannot be reached and nothing is cached.
    """
    name, configuration, revision = TRIVIAQA_HUB
    rows = hub_rows(name, configuration, split, revision)
    return [triviaqa_row(row, f"{name}/{split}: question {number}") for number, row in enumerate(rows, 1)]


def fingerprint(examples: list[QAExample]) -> str:
    """Short digest of everything in the examples, in order.

    Raises:
        DataError: text that cannot be encoded (JSON can hold half a surrogate pair).
    """
    digest = hashlib.sha256()
    for e in examples:
        text = "\x1f".join([e.question_id, e.question, *e.answers, e.title, e.context, "\x1e"])
        try:
            digest.update(text.encode())
        except UnicodeEncodeError as error:
            raise DataError(f"question {e.question_id}: its text is not valid Unicode ({error.reason})") from error
    return digest.hexdigest()[:16]


def existing(path: str | Path) -> Path:
    """The path, or a :class:`DataError` that says which option to set."""
    if not str(path):
        raise DataError("--data.source=local needs --data.path=FOLDER")
    path = asked_path(path)
    if not exists(path):
        raise DataError(f"--data.path={str(path)[:200]} does not exist")
    return path


def _table(folder: Path, split: str) -> Path | None:
    tables = (folder / f"{name}{ending}" for name in _SPLIT_NAMES[split] for ending in _ENDINGS)
    return next((table for table in tables if isfile(table)), None)


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of a table."""
    if file.suffix == ".parquet":
        return ((f"{file}: row {n + 1}", row) for n, row in enumerate(_parquet(file)))
    return json_lines(file)


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError("reading parquet needs pyarrow: pip install 'astbench[hub]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        about = table.metadata
        check_unpacked(file, sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups)))
        for batch in table.iter_batches(16):  # a long text may stand in every row and but once in the file
            yield from batch.to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:  # overflows: times far away
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error

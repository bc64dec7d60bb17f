"""Readers of question-answering data: the data sets' own files, and tables with the hub's columns."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astbench.errors import DataError, MissingPackageError
from astbench.files.hub import hub_rows
from astbench.files.reading import UNREADABLE, one_line, open_bytes, read_bytes, unreadable
from astbench.tasks.qa.examples import QAExample

log = logging.getLogger(__name__)

TRIVIAQA_HUB = ("mandarjoshi/trivia_qa", "rc.wikipedia", "0f7faf33a3908546c6fd5b73a660e0f8ff173c2f")
"""Data set, configuration and revision on the Hugging Face hub."""
SQUAD_HUB = ("rajpurkar/squad", "plain_text", "7b6d24c440a36b6815f21b70d25016731768db1f")

_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "dev", "valid"), "test": ("test",)}
_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def read_triviaqa(path: str | Path, split: str) -> list[QAExample]:
    """TriviaQA from a folder: official JSON plus evidence, or jsonl/parquet tables with the hub's columns.

    Official: `qa/wikipedia-<train|dev>.json` (or the same at the top) and `evidence/wikipedia/`. Tables:
    `<train|validation|dev|test>.jsonl[.gz]|.parquet`, one question a row: `question_id`, `question`,
    `answer.{value, aliases}`, `entity_pages.{title[], wiki_context[]}`.

    Raises:
        DataError: missing or damaged files, missing columns; names the file and the line.
    """
    folder = existing(path)
    for name in _SPLIT_NAMES[split]:
        for official in (folder / "qa" / f"wikipedia-{name}.json", folder / f"wikipedia-{name}.json"):
            if official.is_file():
                return list(_official_triviaqa(official, folder / "evidence" / "wikipedia"))
    table = _table(folder, split)
    if table is None:
        names = "|".join(_SPLIT_NAMES[split])
        looked = f"[qa/]wikipedia-{names}.json, {names}{'|'.join(_ENDINGS)}"
        raise DataError(f"--data.path={folder} has no {split} split; looked for {looked}")
    return [triviaqa_row(row, where) for where, row in _rows(table)]


def triviaqa_row(row: dict[str, Any], where: str) -> QAExample:
    """One row with the hub's columns; all of its pages make one document."""
    answer, pages = _column(row, "answer", dict, where), _column(row, "entity_pages", dict, where)
    aliases = [_column(answer, "value", str, where), *_texts(answer, "aliases", where)]
    contexts, titles = _texts(pages, "wiki_context", where), _texts(pages, "title", where)
    return QAExample(
        question_id=str(_column(row, "question_id", (str, int), where)),
        question=_column(row, "question", str, where),
        answers=_distinct(aliases, where),
        context="\n\n".join(contexts),
        title=titles[0] if titles else "",
    )


def _official_triviaqa(file: Path, evidence: Path) -> Iterator[QAExample]:
    data = _json(file)
    if not isinstance(data, dict) or not isinstance(data.get("Data"), list):
        raise DataError(f"{file}: no 'Data' list; not TriviaQA's official format")
    for number, item in enumerate(data["Data"]):
        where = f"{file}: question {number + 1}"
        answer = _column(item, "Answer", dict, where)
        aliases = [_column(answer, "Value", str, where), *_texts(answer, "Aliases", where)]
        if "HumanAnswers" in answer:
            aliases += _texts(answer, "HumanAnswers", where)
        question_id = str(_column(item, "QuestionId", (str, int), where))
        question = _column(item, "Question", str, where)
        names = [
            (_column(page, "Filename", str, where), _column(page, "Title", str, where))
            for page in _column(item, "EntityPages", list, where)
        ]
        texts = []
        for name, _ in names:
            # The name comes from a file: it may not lead out of the evidence folder.
            page_file = (evidence / name).resolve()
            if not page_file.is_relative_to(evidence.resolve()) or not page_file.is_file():
                raise DataError(f"{where}: evidence {evidence / name} does not exist")
            texts.append(page_file.read_text(encoding="utf-8", errors="replace"))
        yield QAExample(
            question_id=question_id,
            question=question,
            answers=_distinct(aliases, where),
            context="\n\n".join(texts),
            title=names[0][1] if names else "",
        )


PARAGRAPH_BREAK = "\n\n"


def read_squad(path: str | Path, whole_articles: bool = False) -> list[QAExample]:
    """SQuAD's official JSON: a question and its paragraph each, or its whole article.

    Raises:
        DataError: missing or damaged file, or another format; names the file.
    """
    file = existing(path)
    if file.is_dir():
        found = sorted(p for p in file.glob("*.json*"))
        if len(found) != 1:
            raise DataError(f"--data.path={file} must hold one SQuAD JSON file, found {len(found)}; name the file")
        file = found[0]
    data = _json(file)
    examples = []
    try:
        for number, article in enumerate(data["data"]):
            whole = PARAGRAPH_BREAK.join(p["context"] for p in article["paragraphs"])
            begin = 0
            for paragraph in article["paragraphs"]:
                shift = begin if whole_articles else 0
                begin += len(paragraph["context"]) + len(PARAGRAPH_BREAK)
                for question in paragraph["qas"]:
                    answers = question["answers"]
                    if not answers:
                        continue  # version 2 asks some questions without an answer
                    examples.append(
                        QAExample(
                            question_id=question["id"],
                            question=question["question"].strip(),
                            answers=_distinct([a["text"] for a in answers], str(file)),
                            context=whole if whole_articles else paragraph["context"],
                            title=article["title"],
                            answer_starts=tuple(sorted({a["answer_start"] + shift for a in answers})),
                            article=number,
                        )
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not SQuAD's official format ({error})") from error
    return examples


def read_hub(task: str, split: str) -> list[QAExample]:
    """A split from the Hugging Face hub at a pinned revision; its offline cache is honoured.

    Raises:
        MissingPackageError: without the `datasets` package.
        DataError: the hub cannot be reached and nothing is cached.
    """
    name, configuration, revision = TRIVIAQA_HUB if task == "triviaqa" else SQUAD_HUB
    rows = hub_rows(name, configuration, split, revision)
    if task == "triviaqa":
        return [triviaqa_row(row, f"{name}/{split}") for row in rows]
    return [
        QAExample(
            question_id=row["id"],
            question=row["question"].strip(),
            answers=_distinct(row["answers"]["text"], name),
            context=row["context"],
            title=row["title"],
            answer_starts=tuple(sorted(set(row["answers"]["answer_start"]))),
        )
        for row in rows
    ]


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
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"--data.path={path} does not exist")
    return path


def _column(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A row's value of the expected type, or a :class:`DataError` that says where it is not."""
    if not isinstance(row, dict) or name not in row:
        raise DataError(f"{where}: column {name!r} is missing")
    if not isinstance(row[name], kind):
        raise DataError(f"{where}: column {name!r} is of the wrong form: {str(row[name])[:60]!r}")
    return row[name]


def _texts(row: Any, name: str, where: str) -> list[str]:
    """A row's list of texts."""
    values = _column(row, name, (list, tuple), where)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: column {name!r} must be a list of texts")
    return list(values)


def _distinct(answers: list[str], where: str) -> tuple[str, ...]:
    kept = tuple(dict.fromkeys(a for a in answers if isinstance(a, str) and a.strip()))
    if not kept:
        raise DataError(f"{where}: no answer; a question needs a value or at least one alias")
    return kept


def _table(folder: Path, split: str) -> Path | None:
    for name in _SPLIT_NAMES[split]:
        for ending in _ENDINGS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    return None


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of a table."""
    if file.suffix == ".parquet":
        yield from ((f"{file}: row {n + 1}", row) for n, row in enumerate(_parquet(file)))
        return
    number = 0
    try:
        with open_bytes(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}:{number}", json.loads(line)
    except UNREADABLE as error:
        raise unreadable(f"{file}:{number + 1}", error) from error
    except (ValueError, RecursionError) as error:  # brackets within brackets within brackets
        raise DataError(f"{file}:{number} cannot be read: {one_line(error)}") from error


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError("reading parquet needs pyarrow: pip install 'astbench[hub]'") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(256):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:  # brackets within brackets within brackets
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error

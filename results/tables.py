"""The README's tables, made from the records beside this file: `python results/tables.py [--write]`.

Every cell comes from a `record.json`; a test holds that the README's tables are what this prints.
"""

from __future__ import annotations

import json
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


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
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
                f"{record['train']['wall_seconds']:.0f} s",
                f"{record['hardware']['threads']}",
                f"{record['seed']}",
            ]
        )
    return markdown(["attention", "F1", "EM", "density", "training", "threads", "seed"], rows)


STARTS = {None: "pretrained", "runs/squad-dense": "SQuAD, paragraphs", "runs/squad-long": "SQuAD, articles"}
"""What the weights had learned before."""


def triviaqa() -> str:
    """Real questions over whole Wikipedia articles."""
    rows = []
    found = records("triviaqa")
    for record in sorted(found.values(), key=lambda r: (r.get("train", {}).get("steps", 0), -r["metrics"]["f1"])):
        train = record.get("train")
        rows.append(
            [
                f"`{attention(record)['name']}`",
                STARTS[record["config"].get("init_from")],
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


TABLES: dict[str, Callable[[], str]] = {"demo": demo, "triviaqa": triviaqa, "wikitext2": wikitext}
"""Folder of records -> its table."""


def main() -> None:
    """Print the tables, or put them into the README between their markers."""
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        if not records(name):
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

"""`metrics.csv`, one row a step, that survives kills and resumes without lost or doubled rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from astbench import console
from astbench.files.writing import write_text


class MetricsLogger(Logger):
    """Appends rows; on a resume drops those after the restored step, which will be written again.

    (Lightning's own CSVLogger deletes the earlier file when it starts again in the same folder.)
    """

    def __init__(self, file: Path, folder: Path) -> None:
        super().__init__()
        self.file, self._folder = file, folder
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, str]] = []

    @property
    def name(self) -> str:
        """See Lightning."""
        return ""

    @property
    def version(self) -> str:
        """See Lightning."""
        return ""

    @property
    def save_dir(self) -> str:
        """See Lightning."""
        return str(self._folder)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in `config.yaml`."""

    def digest(self) -> dict[str, Any]:
        """What a checkpoint holds of the rows so far, so that a resume can see whether they are still there."""
        return {"rows": len(self._rows), "sha256": _digest(self._rows)}

    @rank_zero_only
    def forget_after(self, step: int, known: Mapping[str, Any] | None = None) -> None:
        """Start from the rows up to `step` that are in the file; say so if they are not what they were.

        Args:
            step: The restored one.
            known: What :meth:`digest` gave when it was saved; None for checkpoints that do not hold it.
        """
        columns, rows = self._read()
        if known is not None and known != {"rows": known["rows"], "sha256": _digest(rows[: known["rows"]])}:
            console.say(f"note: {self.file} is not as it was at step {step}: rows of it are lost or damaged")
        self._columns = columns
        self._rows = [r for r in rows if int(r["step"]) < step]
        self._rewrite()

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Columns and whole rows of the file; none where it is no such table."""
        try:
            reader = csv.DictReader(io.StringIO(self.file.read_text(encoding="utf-8", errors="replace"), newline=""))
            columns = list(reader.fieldnames or [])
            # A row cut by a kill has no whole number in front or too few fields; a damaged one may have too many.
            rows = [r for r in reader if (r.get("step") or "").isdecimal() and None not in (*r, *r.values())]
        except (FileNotFoundError, csv.Error):
            return ["step"], []
        return (columns, rows) if "step" in columns else (["step"], [])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """One row; a metric not seen before adds a column."""
        row = {"step": str(step or 0), **{k: repr(float(v)) for k, v in metrics.items()}}
        new = [name for name in row if name not in self._columns]
        self._rows.append(row)
        if new or not self.file.exists():
            self._columns += new
            self._rewrite()
        else:
            with open(self.file, "a", newline="", encoding="utf-8") as lines:
                csv.DictWriter(lines, self._columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.file, text.getvalue())


def _digest(rows: Sequence[Mapping[str, str]]) -> str:
    """Of what rows hold; columns that came later are empty in the earlier ones."""
    content = [[[name, value] for name, value in row.items() if value] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

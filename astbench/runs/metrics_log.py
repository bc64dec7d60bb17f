"""`metrics.csv`, one row a step, that survives kills and resumes without lost or doubled rows."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

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

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Start from the rows up to `step` that are in the file."""
        if self.file.is_file():
            with open(self.file, newline="", encoding="utf-8") as lines:
                reader = csv.DictReader(lines)
                self._columns = list(reader.fieldnames or ["step"])
                # A row cut by a kill has no whole number in front or too few fields.
                self._rows = [r for r in reader if (r["step"] or "").isdigit() and None not in r.values()]
        self._rows = [r for r in self._rows if int(r["step"]) < step]
        self._rewrite()

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

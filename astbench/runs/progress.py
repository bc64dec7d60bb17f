"""Progress of a run: a live bar, lines for a log, and the loggers that metrics go to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from astbench import console
from astbench.errors import MissingPackageError
from astbench.runs.folder import METRICS, RunFolder
from astbench.runs.metrics_log import MetricsLogger

EVERY_SECONDS = 5.0
"""Between two lines on an evaluation; a shorter one prints none."""


class LineProgress(ProgressBar):
    """Progress for logs: one line about every tenth of the training, and of an evaluation that takes long."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0
        self._started = time.monotonic()
        self._first = 0
        self._said = 0.0

    def disable(self) -> None:
        """Nothing to do: only the first process prints."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started, self._first = time.monotonic(), trainer.global_step
        self._next = trainer.global_step + trainer.max_steps / 10

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print when due."""
        step = trainer.global_step
        if trainer.is_global_zero and step >= self._next:
            self._next += trainer.max_steps / 10
            rate = (step - self._first) / max(1e-9, time.monotonic() - self._started)
            loss = trainer.callback_metrics.get("train/loss")
            shown = f", loss {float(loss):.3f}" if loss is not None else ""
            console.say(f"  step {step}/{trainer.max_steps}{shown}, {rate:.2f} steps/s")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of an evaluation."""
        self._said = time.monotonic()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """Print how far an evaluation is, every few seconds."""
        self._say_batch(trainer, arguments[3], trainer.num_val_batches)

    def on_test_batch_end(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """As for validation."""
        self._say_batch(trainer, arguments[3], trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """As for validation."""
        self._say_batch(trainer, arguments[3], trainer.num_predict_batches)

    def _say_batch(self, trainer: pl.Trainer, index: int, counts: Any) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and now - self._said >= EVERY_SECONDS:
            self._said = now
            console.say(f"  batch {index + 1}/{sum(counts) if isinstance(counts, list) else counts}")


def progress_bar() -> ProgressBar:
    """A live bar for a terminal, lines for a log."""
    return RichProgressBar() if console.interactive() else LineProgress()


def build_loggers(names: list[str], folder: RunFolder, *, resume: bool) -> list[Logger]:
    """The loggers asked for.

    Raises:
        MissingPackageError: a logger whose package is not installed.
    """
    found: list[Logger] = []
    path = folder.path
    step = None
    if resume and (newest := folder.newest_checkpoint()):
        step = newest[1].get("step")
    for name in dict.fromkeys(names):
        if name == "csv":
            found.append(MetricsLogger(folder / METRICS, folder.path))
        elif name == "tensorboard":
            found.append(TensorBoardLogger(str(path), name="tensorboard", version="", purge_step=step))
        else:
            found.append(_remote_logger(name, path))
    return found


def _remote_logger(name: str, path: Path) -> Logger:
    from lightning.pytorch import loggers

    try:
        if name == "wandb":
            return loggers.WandbLogger(project="astbench", name=path.name, save_dir=str(path))
        return loggers.MLFlowLogger(
            experiment_name="astbench", run_name=path.name, tracking_uri=f"sqlite:///{path.parent / 'mlflow.db'}"
        )
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"--loggers={name} needs a package: pip install 'astbench[{name}]'") from error

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


class LineProgress(ProgressBar):
    """Progress for logs: one line about every tenth of the training, none for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0
        self._started = time.monotonic()
        self._first = 0

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

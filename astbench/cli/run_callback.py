"""What surrounds a run, at Lightning's moments: first lines, checkpoints, stopping, record, last lines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from astbench.cli.attended import AttendedPairs, draw_attended
from astbench.cli.counted_work import CountedWork
from astbench.cli.first_lines import run_facts, say_first_lines
from astbench.cli.last_lines import say_last_lines
from astbench.cli.provenance import foreign_code
from astbench.cli.stopping import SIGNALS
from astbench.errors import Stopped
from astbench.files.writing import write_json
from astbench.runs.checkpoint_checks import check_restored
from astbench.runs.folder import DONE, LAST, TOKENIZER, RunFolder, kept_name
from astbench.runs.metrics_log import MetricsLogger
from astbench.runs.run_record import RunRecord
from astbench.runs.step_clock import StepClock
from astbench.tasks import Task
from astbench.training.module import TaskModule

_LOG = "metrics_log"
"""Where a checkpoint holds the digest of the log."""


class RunCallback(Callback):
    """Keeps the run folder: checkpoints while training, the record throughout.

    Args:
        folder: The run folder.
        command: fit, validate, test or predict.
        task: Row of the table of tasks.
        checkpoint_every: Optimizer steps between checkpoints.
        keep_every: Optimizer steps between weights that are kept for good; None keeps none.

    Attributes:
        goes: What there was to restore is restored.
        counted: Counts what the run costs; a callback of its own.
    """

    def __init__(
        self, folder: RunFolder, command: str, task: Task, checkpoint_every: int, keep_every: int | None = None
    ) -> None:
        self.folder, self.command, self.task = folder, command, task
        self.checkpoint_every, self.keep_every = checkpoint_every, keep_every
        self.record = RunRecord(folder)
        self.counted = CountedWork(self.record)
        self.clock = StepClock()
        self._evaluation = StepClock()
        self.saved_step = -1
        self.goes = False
        self._first_batch: Any = None
        self._attended = AttendedPairs()
        self._restored: dict[str, Any] | None = None
        self._logged: dict[str, Any] | None = None

    # -- before -----------------------------------------------------------------------------------------

    def begin(self, config: dict[str, Any], words: Sequence[str], checkpoint: str | None, *, writer: bool) -> None:
        """First version of the record; see :meth:`RunRecord.begin`."""
        transform, depth = ((config.get(group) or {}).get("name") for group in ("transform", "depth"))
        listed = config.get("plugins") or []
        plugins = foreign_code(config["attention"]["name"], self.task.name, listed, transform, depth)
        self.record.begin(self.command, config, words, checkpoint, writer=writer, plugins=plugins)

    def recording(self) -> AbstractContextManager[None]:
        """Write how it ended into the record, whatever happens."""
        return self.record.recording()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The tokenizer goes beside the checkpoint, so that the run can be used later."""
        SIGNALS.check()
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.tokenized and trainer.is_global_zero and stage == "fit" and not (self.folder / TOKENIZER).exists():
            self.folder.save_tokenizer(data.tokenizer.save_pretrained)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to run."""
        self._first_lines(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to run, unless training said it."""
        self.goes = True
        if self.command == "validate":
            self._first_lines(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING:
            self._attend(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to run."""
        self.goes = True
        self._first_lines(trainer, pl_module)
        self._attend(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to run."""
        self.goes = True
        self._first_lines(trainer, pl_module)
        self._attend(pl_module)

    def _first_lines(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TaskModule)
        if not trainer.is_global_zero or "parameters" in self.record.data:
            return
        facts = run_facts(trainer, module)
        self.record.data.update(facts)
        self.record.write()
        say_first_lines(self.command, self.task, trainer, module, facts, self.folder)

    # -- training ---------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint tells what the log held at its step."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                checkpoint[_LOG] = logger.digest()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember what was restored, to see that all of it is."""
        self._logged = checkpoint.get(_LOG)
        self._restored = {
            "global_step": checkpoint["global_step"],
            **{name: [None] * len(checkpoint.get(name, [])) for name in ("optimizer_states", "lr_schedulers")},
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here SIGTERM and Ctrl-C wait for the end of the step, so that a checkpoint can be written."""
        self._check_restored(trainer)
        SIGNALS.hold()
        # Lightning restores it one too high, and so would validate one batch earlier than an uninterrupted run.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total
        batches.ready = batches.completed
        self._continue_log(trainer)

    def _check_restored(self, trainer: pl.Trainer) -> None:
        if self._restored is not None:
            check_restored(trainer, self._restored)
        self.goes = True

    def _continue_log(self, trainer: pl.Trainer) -> None:
        self.saved_step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.forget_after(trainer.global_step, self._logged)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Checkpoint the step before when due; stop when told to; start the clock of this one.

        Not at the end of the step before: Lightning logs a step's metrics after that, and a kill in between
        would leave a checkpoint without them.
        """
        step = trainer.global_step
        stop = SIGNALS.came(trainer)
        # When and as which step metrics are logged; Lightning restores it one too high.
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        if step == self.clock.step:
            return  # in the middle of an accumulated step
        if (stop or step % self.checkpoint_every == 0) and step != self.saved_step:
            self._save(trainer)
        if stop:
            raise self._stopped(step)
        if self.keep_every and step % self.keep_every == 0:
            trainer.save_checkpoint(self.folder / kept_name(step), weights_only=True)
        self.clock.start(step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock when an optimizer step is done."""
        self.clock.stop(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last checkpoint holds the final weights."""
        if trainer.global_step != self.saved_step:
            self._save(trainer)
        if SIGNALS.came(trainer):
            raise self._stopped(trainer.global_step)
        SIGNALS.release()
        self.record.trained(trainer.global_step)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)
        self.saved_step = trainer.global_step
        self.record.trained(trainer.global_step)

    def _stopped(self, step: int) -> Stopped:
        return SIGNALS.error(f" at step {step}; continue with {self._go_on()}")

    def stopped_at_once(self) -> Stopped:
        """What to raise for a signal that could not wait for the end of the step."""
        if self.command != "fit" or not (self.folder / LAST).exists():
            return SIGNALS.error()
        return SIGNALS.error(f" after the checkpoint of step {self.saved_step}; continue with {self._go_on()}")

    def _go_on(self) -> str:
        """The options that continue the run."""
        plugins = "".join(f" --plugins={plugin}" for plugin in self.record.data["config"].get("plugins") or [])
        return f"--resume={self.folder.path}{plugins}"

    def evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        """The evaluation after training."""
        SIGNALS.check()
        if self.saved_step < 0:
            self._check_restored(trainer)  # killed after the last step: this process had nothing to train
            self._continue_log(trainer)
        self.record.training_done(trainer.global_step, self.clock.summary())
        trainer.validate(module, datamodule=data, verbose=False, weights_only=True)

    # -- evaluation -------------------------------------------------------------------------------------

    def _attend(self, module: pl.LightningModule) -> None:
        assert isinstance(module, TaskModule)
        self._attended.start(module)

    def _batch_begins(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        self._evaluation.start(self._attended.batches)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _batch_begins

    def _remember(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """Count the batch; keep the first one for the picture."""
        if trainer.state.fn == TrainerFn.FITTING:
            return
        self._evaluation.stop(-1)
        self._attended.batches += 1
        if self._first_batch is None:
            self._first_batch = arguments[2]

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _remember

    def _attended_to(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Later calls are no part of the evaluation."""
        self._attended.stop()

    on_validation_end = on_test_end = on_predict_end = _attended_to

    def finish(self, module: pl.LightningModule) -> None:
        """Statistics, picture, record, `done.json`, last lines."""
        assert isinstance(module, TaskModule)
        record = self.record.data
        record.update(self._attended.record(module))
        record.update(draw_attended(module, self._first_batch, self.folder))
        if not module.trainer.is_global_zero:
            return
        timed = self._evaluation.summary()
        record["evaluation"] = {"batch_ms": timed["step_ms"], "batches_timed": timed["steps_timed"]}
        self.counted.finish(module)
        record.update(getattr(module, "results", {}))
        items = record.pop("items", None)
        if items is not None:
            write_json(self.folder / "items.json", items)
        record["state"] = "done"
        self.record.write()
        write_json(self.folder / DONE, {"state": "done", "config_hash": record["config_hash"]})
        say_last_lines(self.task, module, record, self.folder)

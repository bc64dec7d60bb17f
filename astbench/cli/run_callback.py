"""What surrounds a run: first lines, checkpoints, SIGTERM, record, picture, last lines."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from astbench import console
from astbench.errors import Interrupted, NumericError, Stopped, Terminated
from astbench.files.writing import write_json
from astbench.runs.folder import DONE, LAST, RECORD, RunFolder
from astbench.runs.metrics_log import MetricsLogger
from astbench.runs.picture import draw_pattern
from astbench.runs.record import new_record, peak_memory, read_record
from astbench.tasks import Task
from astbench.training.module import TaskModule
from astbench.training.sharding import FullyShardedStrategy
from astbench_registry.registry import config_class

_STATES: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((NumericError,), "diverged"),
    ((Terminated,), "terminated"),
    ((Interrupted, KeyboardInterrupt), "interrupted"),
    ((torch.OutOfMemoryError, MemoryError), "out_of_memory"),
)
"""What ended a run, as its record calls it."""


class RunCallback(Callback):
    """Keeps the run folder: checkpoints while training, the record throughout.

    Args:
        folder: The run folder.
        command: fit, validate, test or predict.
        task: Row of the table of tasks.
        checkpoint_every: Optimizer steps between checkpoints.
    """

    def __init__(self, folder: RunFolder, command: str, task: Task, checkpoint_every: int) -> None:
        self.folder, self.command, self.task, self.checkpoint_every = folder, command, task, checkpoint_every
        self.record: dict[str, Any] = {}
        self.stop_signal: int | None = None
        self.saved_step = -1
        self.step_seconds: list[float] = []
        self._step_started = 0.0
        self._step_before = -1
        self._started = time.monotonic()
        self._first_batch: Any = None
        self._train_before = 0.0
        self._before: dict[str, Any] | None = None
        self._is_writer = True

    # -- before and after -------------------------------------------------------------------------------

    def begin(self, config: dict[str, Any], words: Sequence[str], checkpoint: str | None, *, writer: bool) -> None:
        """First version of the record: should the process be killed, it says that it was running."""
        self.record = new_record(self.command, config, config["seed_everything"], words)
        self.record["checkpoint"] = checkpoint
        self._is_writer = writer  # of several processes, one
        self._before = read_record(self.folder / RECORD)
        if self._before is None:
            self._write_record()
            return
        # A resumed run's record names the processes before, and counts their time.
        kept = ("argv", "started", "state", "git", "versions", "hardware", "wall_seconds", "train")
        earlier = {k: self._before[k] for k in kept if k in self._before}
        self.record["earlier"] = [*self._before.get("earlier", []), earlier]
        if "train" in self._before:
            self.record["train"] = self._before["train"]
            self._train_before = self._before["train"]["wall_seconds"]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write how it ended into the record, whatever happens."""
        try:
            yield
        except BaseException as error:
            self.record["state"] = next((state for kind, state in _STATES if isinstance(error, kind)), "failed")
            self.record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            if "parameters" in self.record:
                self._write_record()
            elif self._is_writer and self._before is not None:
                ended = {key: self.record[key] for key in ("state", "error")}
                write_json(self.folder / RECORD, {**self._before, **ended})
            elif self._is_writer:
                self.folder.discard()  # refused before anything ran: leave nothing behind
            raise

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The tokenizer goes beside the checkpoint, so that the run can be used later."""
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        if trainer.is_global_zero and stage == "fit" and not (self.folder / "tokenizer").exists():
            tokenizer.save_pretrained(str(self.folder / "tokenizer"))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to run."""
        self._first_lines(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to run, unless training said it."""
        if self.command == "validate":
            self._first_lines(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to run."""
        self._first_lines(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to run."""
        self._first_lines(trainer, pl_module)

    def _first_lines(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TaskModule)
        if not trainer.is_global_zero or "parameters" in self.record:
            return
        counts, data = module.counts(), trainer.datamodule.describe()  # type: ignore[attr-defined]
        handle = module.swapped
        self.record["parameters"] = counts
        self.record["data"] = data
        self.record["attached"] = {"layers": len(handle.slots), "patterns": sorted({s.pattern for s in handle.slots})}
        self.record["precision"] = str(trainer.precision)
        self.record["notes"] = [*handle.notes, *data["notes"]]
        self._write_record()
        usual = {field.name: field.default for field in fields(config_class(handle.name))}
        shown = {"block_size", "query_group", "density", "window"}
        shown |= {k for k, v in handle.options.items() if v != usual.get(k, v)}
        if handle.options.get("budget") == "adaptive":
            shown |= {"share", "min_blocks"}
            shown -= set() if handle.options.get("lambda_density") else {"density"}
        elif handle.options.get("top_k") is not None:
            shown -= {"density"}
        options = {k: v for k, v in handle.options.items() if k in shown}
        console.say(f"astbench {self.command}")
        console.table(
            {
                "attention": f"{handle.name} in {len(handle.slots)} layers "
                + " ".join(f"{k}={v}" for k, v in options.items()),
                "task": self.task.name,
                "source": _source(data),
                "backbone": f"{module.backbone.name}, {counts['total']:,} parameters, {counts['attention']:,} of them "
                f"the attention's own, {counts['trainable']:,} learn",
                "device": f"{trainer.strategy.root_device} x {trainer.world_size}, precision {trainer.precision}, "
                f"{torch.get_num_threads()} threads",
                "backend": _backend(module),
                "run folder": self.folder.path,
            }
        )
        for note in self.record["notes"]:
            console.say(f"  note: {note}")

    # -- training ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here SIGTERM and Ctrl-C wait for the end of the step, so that a checkpoint can be written."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        # Lightning restores it one too high, and so would validate one batch earlier than an uninterrupted run.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total
        batches.ready = batches.completed
        self._continue_log(trainer)

    def _continue_log(self, trainer: pl.Trainer) -> None:
        self.saved_step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.forget_after(trainer.global_step)

    def _on_signal(self, number: int, *_: Any) -> None:
        self.stop_signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Checkpoint the step before when due; stop when told to; start the clock of this one.

        Not at the end of the step before: Lightning logs a step's metrics after that, and a kill in between
        would leave a checkpoint without them.
        """
        step = trainer.global_step
        stop = self._anybody_stops(trainer)
        # When and as which step metrics are logged; Lightning restores it one too high.
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        if step != self._step_before:  # else in the middle of an accumulated step
            if (stop or step % self.checkpoint_every == 0) and step != self.saved_step:
                self._save(trainer)
            if stop:
                raise self._stopped(step)
            self._step_before = step
            self._step_started = time.perf_counter()

    def _anybody_stops(self, trainer: pl.Trainer) -> bool:
        """Whether a signal reached one of the run's processes: all must save, and stop, at the same step."""
        stop = self.stop_signal is not None
        return trainer.strategy.reduce_boolean_decision(stop, all=False) if trainer.world_size > 1 else stop

    def _stopped(self, step: int) -> Stopped:
        plugins = "".join(f" --plugins={plugin}" for plugin in self.record["config"].get("plugins") or [])
        go_on = f"at step {step}; continue with --resume={self.folder.path}{plugins}"
        if self.stop_signal == signal.SIGINT:
            return Interrupted(f"interrupted {go_on}")
        return Terminated(f"terminated by SIGTERM {go_on}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock when an optimizer step is done."""
        if trainer.global_step != self._step_before:
            self.step_seconds.append(time.perf_counter() - self._step_started)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)
        self.saved_step = trainer.global_step
        self._count_training(trainer)

    def _count_training(self, trainer: pl.Trainer) -> None:
        """Steps, and the training time of all processes of the run up to their last checkpoint."""
        spent = self._train_before + time.monotonic() - self._started
        self.record["train"] = {"steps": trainer.global_step, "wall_seconds": round(spent, 3)}
        self._write_record()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last checkpoint holds the final weights."""
        if trainer.global_step != self.saved_step:
            self._save(trainer)
        if self._anybody_stops(trainer):
            raise self._stopped(trainer.global_step)
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._count_training(trainer)

    def evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        """The evaluation after training."""
        if self.saved_step < 0:
            self._continue_log(trainer)  # killed after the last step: this process had nothing to train
        timed = {"step_ms": _quartiles(self.step_seconds), "steps_timed": len(self.step_seconds)}
        spent = self.record.get("train", {}).get("wall_seconds", self._train_before)
        self.record["train"] = {"steps": trainer.global_step, "wall_seconds": spent, **timed}
        trainer.validate(module, datamodule=data, verbose=False, weights_only=True)

    # -- evaluation -------------------------------------------------------------------------------------

    def _remember(self, *arguments: Any, **_: Any) -> None:
        """Keep the first batch for the statistics and the picture."""
        if self._first_batch is None:
            self._first_batch = arguments[3]

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _remember

    def finish(self, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        """Statistics, picture, record, `done.json`, last lines."""
        assert isinstance(module, TaskModule)
        sharded = isinstance(module.trainer.strategy, FullyShardedStrategy)
        if sharded:  # a pass needs every process
            self._first_batch = module.trainer.strategy.broadcast(self._first_batch)
        if sharded or module.trainer.is_global_zero:
            self._listen(module)
        if not module.trainer.is_global_zero:
            return
        self.record.update(getattr(module, "results", {}))
        items = self.record.pop("items", None)
        if items is not None:
            write_json(self.folder / "items.json", items)
        self.record["state"] = "done"
        self._write_record()
        write_json(self.folder / DONE, {"state": "done", "config_hash": self.record["config_hash"]})
        self._last_lines(module, data)

    @torch.no_grad()
    def _listen(self, module: TaskModule) -> None:
        """Density per layer and head, backend and pattern, on the first evaluation batch."""
        if self._first_batch is None:
            return
        module.eval()
        batch = module.trainer.strategy.batch_to_device(self._first_batch)
        with module.swapped.collecting_stats() as slots:
            module(batch)
            stats = {slot.path: slot.stats for slot in slots if slot.stats is not None}
            density = {path: [round(d, 5) for d in s.density.tolist()] for path, s in stats.items()}
            everything = [d for row in density.values() for d in row]
            self.record["density"] = {
                "mean": sum(everything) / len(everything) if everything else None,
                "layers": density,
                "measured_on": "the first evaluation batch",
            }
            self.record["backends"] = sorted({s.backend for s in stats.values()})
            real = {slot.path: module.real_lengths(batch, slot.pattern) for slot in slots}
            known = {path: lengths for path, lengths in real.items() if lengths is not None}
            if not module.trainer.is_global_zero:
                return
            self.record["picture"] = draw_pattern(
                self.folder / "pattern.png", list(stats.items()), module.swapped.name, known or None
            )

    def _write_record(self) -> None:
        if not self._is_writer:
            return
        self.record["wall_seconds"] = round(time.monotonic() - self._started, 3)
        self.record["peak_memory"] = peak_memory()
        write_json(self.folder / RECORD, self.record)

    def _last_lines(self, module: TaskModule, data: pl.LightningDataModule) -> None:
        rows: dict[str, object] = dict(module.answers)
        for name, value in self.record.get("metrics", {}).items():
            rows[name] = f"{value:.2f}" if isinstance(value, float) else value
        if (density := self.record.get("density", {}).get("mean")) is not None:
            rows["density"] = (
                f"{density:.3f} of the visible (query, key) pairs, on {', '.join(self.record['backends'])}"
            )
        if "train" in self.record:
            train = self.record["train"]
            wanted = module.trainer.max_steps
            short = f", of {wanted} asked for" if train["steps"] < wanted else ""
            rows["training"] = f"{train['steps']} steps in {train['wall_seconds']:.0f} s{short}"
        rows["record"] = self.folder / RECORD
        if (self.folder / "items.json").exists():
            rows["items"] = self.folder / "items.json"
        if (self.folder / LAST).exists():
            rows["checkpoint"] = self.folder / LAST
        if self.record.get("picture"):
            rows["picture"] = self.folder / str(self.record["picture"])
        console.say(f"done: {self.record.get('signature', self.command)}")
        console.table(rows)
        if self.command == "fit" and self.record["data"]["source"] == "demo":
            plugins = [f"--plugins={plugin}" for plugin in self.record["config"].get("plugins") or []]
            console.say(
                "  on the real data: astbench fit "
                + shlex.join([f"--attention={module.swapped.name}", f"--task={self.task.name}", *plugins])
                + f" {self.task.real}"
            )


def _source(data: dict[str, Any]) -> str:
    pairs = data.get("questions") or data.get("pairs") or data.get("examples") or {}
    counts = ", ".join(
        [f"{n} {split}" for split, n in pairs.items()]
        + [f"{n:,} {split} tokens" for split, n in data.get("split_tokens", {}).items()]
    )
    what = {"demo": "demo (generated, not the real data set)"}.get(data["source"], data["source"])
    return f"{what}{' ' + data['path'] if data['path'] else ''}{': ' + counts if counts else ''}"


def _backend(module: TaskModule) -> str:
    from astbench_kernels import choose_backend
    from astbench_registry.block_selection import BlockSelectingAttention
    from astbench_registry.table import BUILTIN

    chosen = module.swapped.options.get("backend", "auto")
    device = next(module.parameters()).device
    if isinstance(module.swapped.slots[0].attention, BlockSelectingAttention):
        return f"{choose_backend(chosen, device)} ({'asked for' if chosen != 'auto' else 'auto'})"
    if chosen != "auto":
        return f"{chosen} on {device.type} (asked for)"
    return f"{'torch' if module.swapped.name in BUILTIN else 'its own'} on {device.type}"


def _quartiles(seconds: list[float]) -> list[float] | None:
    """Lower quartile, median and upper quartile in milliseconds."""
    if len(seconds) < 4:
        return None
    values = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return [round(1000 * v, 3) for v in values.tolist()]


def _terminate(*_: Any) -> None:
    raise Terminated("terminated by SIGTERM")

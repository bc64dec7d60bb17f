"""`astbench analyze` within a run that evaluates: keeps the first batches, and looks at what was chosen for them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch

from astbench import console
from astbench.analysis.drift import drift
from astbench.analysis.figures import draw
from astbench.analysis.language import Language, told
from astbench.analysis.linguistics import PIPELINE, Tagger
from astbench.analysis.more_figures import draw_drift, draw_language
from astbench.analysis.observer import Observer
from astbench.errors import ConfigError
from astbench.files.writing import write_json, write_text
from astbench.runs.folder import ANALYSIS, DRIFT, EXPLORER, LANGUAGE, RunFolder
from astbench.training.module import TaskModule


class Analysing(pl.Callback):
    """Runs the first batches of the evaluation once more, watched.

    Args:
        batches: How many.
        rows: Query rows looked at in each sequence.
        drifting: Checkpoints of the same model, in order, whose choices are compared with those of its own.
        pipeline: Of spaCy, by whose tags tokens are told apart, "" for the usual one; None: no tags.
    """

    def __init__(self, batches: int, rows: int, drifting: Sequence[Path] = (), pipeline: str | None = None) -> None:
        self._most, self._rows, self._drifting = batches, rows, drifting
        self._tagger = None if pipeline is None else Tagger(pipeline or PIPELINE)
        self._batches: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what is not looked at.

        Raises:
            ConfigError: several processes.
        """
        if trainer.world_size > 1:
            raise ConfigError("analyze runs in one process; give it --trainer.devices=1")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep it."""
        if len(self._batches) < self._most:
            self._batches.append(batch)

    @torch.no_grad()
    def finish(self, module: TaskModule, folder: RunFolder) -> dict[str, Any]:
        """Look, write and draw; what the record says of it.

        Raises:
            ConfigError: the attention chooses no blocks, or the task has no tokens.
        """
        if not self._batches or "input_ids" not in self._batches[0]:
            raise ConfigError("analyze needs evaluation batches of tokens, and this task has none")
        module.eval()
        counts: Counter[int] = Counter()
        for batch in self._batches:
            valid = batch.get("attention_mask")
            ids = batch["input_ids"] if valid is None else batch["input_ids"][valid.bool()]
            counts.update(ids.flatten().tolist())
        tokenizer = module.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        language = None if self._tagger is None else Language(self._tagger, tokenizer)
        observer = Observer(module, self._rows, language)
        with observer.watching():
            for batch in self._batches:
                batch = module.trainer.strategy.batch_to_device(batch)
                observer.begin(batch, counts)
                if language is not None:
                    language.begin(batch, counts)
                module(batch)
        found = {"schema": 1, "attention": module.swapped.name, "batches": len(self._batches), **observer.result()}
        write_json(folder / ANALYSIS, found)
        if observer.explorer is not None:
            write_text(folder / EXPLORER, json.dumps(observer.explorer.result(module.swapped.name), ensure_ascii=False))
        title = f"{module.swapped.name}: {found['queries']:,} queries of {found['sequences']} sequences"
        pictures = draw(found, folder.path, title)
        _say(found, folder)
        about = {"file": ANALYSIS, "pictures": pictures, "batches": len(self._batches), "rows": self._rows}
        if language is not None:
            said = {"schema": 1, "attention": module.swapped.name, **language.result()}
            write_json(folder / LANGUAGE, said)
            pictures += draw_language(said, folder.path, title)
            about["tagger"] = said["tagger"]
            console.say(f"beside other tokens at the same distances, over {said['sequences']} sequences")
            console.table({**dict(told(said)), "written": folder / LANGUAGE})
        if self._drifting:
            self._drift(module, folder, about)
        return {"analysis": about}

    def _drift(self, module: TaskModule, folder: RunFolder, about: dict[str, Any]) -> None:
        """The same batches under other weights of the model."""
        found = drift(module, self._batches, self._rows, self._drifting, console.say)
        write_json(folder / DRIFT, {"schema": 1, "attention": module.swapped.name, **found})
        steps = [checkpoint["step"] for checkpoint in found["checkpoints"]]
        title = f"{module.swapped.name}: from step {steps[0]:,} to {steps[-1]:,}"
        about["pictures"] += draw_drift(found, folder.path, title)
        about["drift"] = steps
        heads = [head for layer in found["layers"].values() for head in layer["to_last"][0] if head is not None]
        shared = f"{fmean(heads):.3f}" if heads else "no block was chosen"
        console.table(
            {
                "overlap of chosen": f"{shared}, step {steps[0]:,} with step {steps[-1]:,}, mean over heads",
                "written": folder / DRIFT,
            }
        )


def _say(found: dict[str, Any], folder: RunFolder) -> None:
    layers = list(found["layers"].values())

    def mean(name: str) -> float | None:
        values = [v for layer in layers for v in _listed(layer.get(name)) if v is not None]
        return sum(values) / len(values) if values else None

    console.say(f"analysis of {found['queries']:,} queries of {found['sequences']} sequences, means over queries")
    console.table(
        {
            "visible keys kept": _shown(mean("kept")),
            "mass on them": f"{_shown(mean('mass'))}; best choice of as many blocks {_shown(mean('best'))}",
            "entropy": f"{_shown(mean('bits'))} bits of dense attention",
            "overlap of blocks": f"next token {_shown(mean('overlap_of_neighbours'))}, two heads "
            f"{_shown(mean('overlap_of_heads'))}, layer before {_shown(mean('overlap_of_layers'))}",
            "written": f"{folder / ANALYSIS}, and pictures beside it",
        }
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

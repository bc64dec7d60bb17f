"""`astbench analyze --values` within a run that evaluates: the values of attention weights in the first batches."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from astbench import console
from astbench.analysis.values import SHOWN, draw_values, study
from astbench.backbones.transforming import watching_values
from astbench.cli.analysing import Analysing
from astbench.errors import ConfigError
from astbench.files.writing import write_json
from astbench.runs.folder import VALUES, RunFolder
from astbench.training.module import TaskModule
from astbench_registry.transforms.registry import require_probabilities


class AnalysingValues(Analysing):
    """Runs the first batches of the evaluation once more, and counts the values of their weights.

    Args:
        batches: How many.
    """

    def __init__(self, batches: int) -> None:
        super().__init__(batches, rows=0)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an attention without weights before the evaluation.

        Raises:
            CapabilityError: with those that have them.
        """
        assert isinstance(pl_module, TaskModule)
        attention = pl_module.swapped.slots[0].attention
        require_probabilities(attention.name, able=attention.config.can.yields_probabilities, what="analyze --values")

    @torch.no_grad()
    def finish(self, module: TaskModule, folder: RunFolder) -> dict[str, Any]:
        """Look, write and draw; what the record says of it.

        Raises:
            ConfigError: there were no evaluation batches.
        """
        if not self._batches:
            raise ConfigError("analyze needs evaluation batches, and there were none")
        module.eval()
        with watching_values(module.swapped.slots) as counts:
            for batch in self._batches:
                module(module.trainer.strategy.batch_to_device(batch))
        transforming = module.swapped.transforming
        name = module.swapped.name + (f", {transforming.name}" if transforming else "")
        found = {"schema": 1, "attention": name, "batches": len(self._batches), **study(counts)}
        write_json(folder / VALUES, found)
        pictures = draw_values(found, folder.path, f"{name}: {found['pairs']:,} attention values")
        everywhere = found["all"]
        console.say(f"{found['pairs']:,} attention values of visible pairs, all layers and heads")
        console.table(
            {
                **{f"below {limit:g}": f"{everywhere['below'][f'{limit:g}']:.3f} of them" for limit in SHOWN},
                "entropy": f"{everywhere['bits']:.2f} bits a row",
                "written": f"{folder / VALUES}, and pictures beside it",
            }
        )
        return {"values": {"file": VALUES, "pictures": pictures, "batches": len(self._batches)}}

"""`--transform`: puts a transform of attention weights into an evaluation, and records what it left of them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import lightning.pytorch as pl

from astbench.backbones.transforming import Transforming
from astbench.tasks.base import of_all_processes
from astbench.training.module import TaskModule
from astbench_registry.transforms.applied import Counted, union_of_values


class TransformCallback(pl.Callback):
    """Attaches the transform before the evaluation, counts during it.

    Args:
        name: Registered transform.
        options: Its options as plain data.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name, self._options = name, options

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach; from here on what is left is counted."""
        assert isinstance(pl_module, TaskModule)
        handle = pl_module.swapped
        handle.transforming = Transforming(handle.slots, self._name, self._options)
        handle.transforming.count(True)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Later calls are no part of the evaluation."""
        assert isinstance(pl_module, TaskModule) and pl_module.swapped.transforming is not None
        pl_module.swapped.transforming.count(False)

    on_test_end = on_predict_end = on_validation_end

    def record(self, module: pl.LightningModule) -> dict[str, Any]:
        """What the record says of it, over all processes; every one of them has to come here."""
        assert isinstance(module, TaskModule) and module.swapped.transforming is not None
        transforming = module.swapped.transforming
        parts = of_all_processes(module.trainer, {path: a.counted for path, a in transforming.applied.items()})
        layers: dict[str, Counted] = {}
        for part in parts:
            for path, counted in part.items():
                layers[path] = layers[path] + counted if path in layers else counted
        values = union_of_values(counted.values for counted in layers.values())
        return {
            "transform": {
                "name": transforming.name,
                "layers": len(layers),
                "bits": getattr(transforming.config, "bits", None),
                "zeros": fmean(share for counted in layers.values() for share in counted.zeros),
                "row_sum": fmean(mean for counted in layers.values() for mean in counted.row_sums),
                "values": None if values is None else len(values),
                "zeros_by_layer": {path: [round(z, 5) for z in counted.zeros] for path, counted in layers.items()},
                "found": transforming.facts(),
            }
        }

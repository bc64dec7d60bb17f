"""`--trainer.strategy=fsdp2`: weights, gradients and optimizer states shared out over the processes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

NAME = "fsdp2"


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy with every process in one data-parallel group, and whole checkpoints in one file.

    A run's checkpoint is the same as without it: it is evaluated in one process as well.
    """

    strategy_name = NAME

    def __init__(self, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """See Lightning."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def shard(module: pl.LightningModule, layers: list[nn.Module]) -> None:
    """Share out each layer's parameters by themselves, and all others of a module together.

    The steps are what gathers the latter: tasks also call parts of their model (the embedding, a head) on their own.
    """
    mesh = module.device_mesh
    assert mesh is not None, "the strategy makes one"
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # it takes no others, and some presets hold transposed ones
    for layer in [*layers, module]:
        fully_shard(layer, mesh=mesh["data_parallel"])
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        register_fsdp_forward_method(module, step)


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, FullyShardedStrategy, description=(__doc__ or "").split(":")[-1].strip())

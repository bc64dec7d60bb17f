"""Where astbench's defaults of Lightning's Trainer differ from Lightning's own. Imports nothing."""

from __future__ import annotations

from typing import Any

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,
    "max_epochs": -1,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "gradient_clip_val": 1.0,
    # Evaluation happens once, after training; ask for more with --trainer.val_check_interval.
    "check_val_every_n_epoch": None,
    "val_check_interval": 1_000_000_000,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    # The sampler deals the batches out to the processes itself.
    "use_distributed_sampler": False,
}

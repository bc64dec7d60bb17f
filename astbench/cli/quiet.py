"""What libraries print of their own accord, and what of it nobody needs."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Third parties' chatter off; our own messages say what matters."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*treespec.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*GPU available but not used.*",
        ".*`srun` command is available.*",  # a cell of a sweep is one process, however it was started
        ".*resuming from a checkpoint that ended before the epoch ended.*",  # the sampler goes on where it stood
        ".*recommended to use `self.log.*sync_dist=True.*",  # every process has gathered all guesses by then
        ".*is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)

"""A depth policy's weights among those that another run brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from astbench.backbones.depth.adaptive import DEPTH
from astbench.errors import CheckpointError


def trained_policy(
    folder: str,
    theirs: Mapping[str, Any] | None,
    ours: Mapping[str, Any] | None,
    mine: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    training: bool,
) -> tuple[set[str], str]:
    """Names of the policy's weights that another run brings, and a note on what it does not.

    Args:
        folder: Of the other run.
        theirs: Its policy's options with its name; None for none.
        ours: Likewise, of this run.
        mine: The model's weights, the policy's among them.
        weights: Those of the other run.
        training: An evaluation needs all of them, training may start anew.

    Raises:
        CheckpointError: an evaluation with a policy that nobody trained.
    """
    policy = {name for name in mine if name.startswith(f"{DEPTH}.")}
    was, asked = (options and options["name"] for options in (theirs, ours))
    fits = was == asked and all(n in weights and weights[n].shape == mine[n].shape for n in policy)
    if policy and not fits and not training:
        raise CheckpointError(
            f"--init_from={folder} was trained with {f'--depth={was}' if was else 'no depth policy'}, and "
            f"--depth={asked} needs one trained with these options"
        )
    if policy and not fits:
        return set(), f"the depth policy's {len(policy)} tensors start anew"
    if was and was != asked:
        how = f"--depth={asked} chooses the layers" if asked else "every layer runs"
        return policy, f"--init_from={folder} was trained with --depth={was}; here {how}"
    return policy, ""

"""The loss of attention that learns what to choose by policy gradient."""

from __future__ import annotations

from torch import Tensor

from astbench.errors import ConfigError


def policy_loss(each: Tensor, log_prob: Tensor) -> Tensor:
    """REINFORCE: the gradient raises the probability of choices whose sequence lost less than the others on average.

    Each sequence's baseline is the mean of the others' losses: Kool, van Hoof and Welling 2019 (Buy 4 REINFORCE
    Samples, Get a Baseline for Free!), eq. 6, with a batch in the place of samples for one input.

    Args:
        each: Losses `(batch,)`.
        log_prob: `(batch,)`.

    Raises:
        ConfigError: for a batch of one, which nothing can be compared with.
    """
    batch = len(each)
    if batch < 2:
        raise ConfigError(
            "--attention.estimator=policy_gradient compares the sequences of a batch; set --data.batch_size=2 or more"
        )
    advantage = (each.detach() - each.detach().mean()) * batch / (batch - 1)
    return (advantage * log_prob).mean()

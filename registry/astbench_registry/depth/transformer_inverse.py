"""Transformer^-1: depth by a predictor of complexity (Transformer^-1, 2025, arXiv 2501.16394)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, mse_loss, softplus

from astbench_registry.depth.configs.transformer_inverse import TransformerInverseConfig
from astbench_registry.depth.interface import Choice, DepthPolicy, Outcome, StackShape, seen_mean


class TransformerInverse(DepthPolicy):
    """A complexity predictor and a policy network, learned together with the model or on a frozen one.

    With x the mean of an input's tokens after the first `look` layers, F the layers of its path, c_i their shares of
    the stack's operations and L the task's loss:

        z = gelu(W_1 norm(x) + b_1)                     features
        C(x) = softplus(w_2 z + b_2)                    complexity: what L will be
        p = sigmoid(W_3 [z, C(x)] + b_3)                a probability for each layer (`choose=layers`)
        p = softmax(W_3 [z, C(x)] + b_3)                or for each number of layers (`choose=number`)
        J = L + distill D + cost sum_{i in F} c_i       what a path costs
        grad = E[(J - b(x)) grad log p(F)]              REINFORCE

    The baseline is b(x) = C(x) + cost E[sum c_i], less what the other inputs of the batch miss it by on average (Kool,
    van Hoof and Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"); neither depends on the path that
    was drawn, so the gradient keeps its mean. C(x) learns L by least squares. D is the squared distance to what the
    full depth gives, over its square, and the model learns from it too. While training a path is drawn from p, else the
    more probable one is taken. x is taken without gradient: the choice does not change the features it is made by.

    `estimator=straight_through` multiplies the contribution of a layer that ran by a gate of 1 whose gradient goes to
    its probability, and adds cost E[sum c_i] to the loss. Layers that did not run bring no gradient of the task, so
    this estimator leans towards skipping.

    Only the paper's abstract was at hand: a two-layer control of complexity predictor and policy network, optimised
    jointly for the task and its cost. The formulas above are this project's reading of it, and so are all sizes.
    """

    config: TransformerInverseConfig

    def __init__(self, config: TransformerInverseConfig, shape: StackShape) -> None:
        super().__init__(config, shape)
        layers = shape.num_layers
        config.require(config.look < layers, "look", f"below the model's {layers} layers, else nothing is chosen")
        free = shape.num_layers - config.look
        outputs = free if config.choose == "layers" else free + 1
        self.features = nn.Sequential(nn.LayerNorm(shape.hidden_size), nn.Linear(shape.hidden_size, config.width))
        self.predictor = nn.Linear(config.width, 1)
        self.policy = nn.Linear(config.width + 1, outputs)
        with torch.no_grad():
            self.policy.weight.mul_(0.1)
            self.policy.bias.copy_(_start(config, free))

    def choose(self, hidden: Tensor, seen: Tensor) -> Choice:
        """See the base class."""
        x = seen_mean(hidden.detach(), seen).to(self.predictor.weight.dtype)
        z = nn.functional.gelu(self.features(x))
        complexity = softplus(self.predictor(z)).squeeze(-1)
        logits = self.policy(torch.cat([z, complexity.detach()[:, None]], -1)).float()
        chosen = self._layers(logits) if self.config.choose == "layers" else self._number(logits)
        drawn, probability, log_prob, entropy = chosen
        always = drawn.new_ones(len(drawn), self.config.look)
        paths = torch.cat([always, drawn], -1)
        probability = torch.cat([probability.new_ones(always.shape), probability], -1)
        through = self.training and self.config.estimator == "straight_through"
        return Choice(
            paths,
            log_prob=log_prob if self.training and not through else None,
            gates=paths + (probability - probability.detach()) if through else None,
            probability=probability,
            entropy=entropy,
            complexity=complexity,
        )

    def _layers(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each layer by itself: taken or not, probability, log-probability and entropy of all of them."""
        probability = logits.sigmoid()
        drawn = torch.rand_like(probability) < probability if self.training else probability > 0.5
        yes, no = logsigmoid(logits), logsigmoid(-logits)
        entropy = -(probability * yes + (1 - probability) * no).sum(-1)
        return drawn, probability, torch.where(drawn, yes, no).sum(-1), entropy

    def _number(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How many of them: as in :meth:`_layers`."""
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        number = torch.multinomial(p, 1) if self.training else p.argmax(-1, keepdim=True)  # (batch, 1)
        free = logits.shape[-1] - 1
        drawn = torch.arange(free, device=logits.device) < number
        probability = p.flip(-1).cumsum(-1).flip(-1)[:, 1:]  # that more than i layers are taken
        return drawn, probability, log_p.gather(-1, number).squeeze(-1), -(p * log_p).sum(-1)

    def losses(self, choice: Choice, outcome: Outcome) -> dict[str, Tensor]:
        """See the base class: of the policy, of the predictor, and the distance to the full depth."""
        config = self.config
        assert choice.complexity is not None and choice.probability is not None and choice.entropy is not None
        seen_loss = outcome.losses.detach().float()
        found = {"complexity": mse_loss(choice.complexity.float(), seen_loss)}
        expected = self.spent(choice.probability)  # of the stack's operations
        if choice.log_prob is not None:
            cost = seen_loss + config.cost * outcome.spent
            if outcome.distance is not None:
                cost = cost + config.distill * outcome.distance.detach()
            advantage = cost - choice.complexity.detach() - config.cost * expected.detach()
            if (batch := len(advantage)) > 1:  # a batch of one has no others
                advantage = (advantage - advantage.mean()) * batch / (batch - 1)
            found["policy"] = (advantage * choice.log_prob).mean() - config.entropy * choice.entropy.mean()
        elif choice.gates is not None:
            found["policy"] = config.cost * expected.mean() - config.entropy * choice.entropy.mean()
        if outcome.distance is not None:
            found["distill"] = config.distill * outcome.distance.mean()
        return found


def _start(config: TransformerInverseConfig, free: int) -> Tensor:
    """Biases under which a layer is taken with probability `start`, before the input says anything."""
    if config.choose == "layers":
        return torch.full((free,), math.log(config.start / (1 - config.start)))
    # All layers with probability `start`, every smaller number alike; with no layer to choose there is nothing to say.
    smaller = (1 - config.start) / max(1, free)
    return torch.tensor([*[smaller] * free, config.start]).log()

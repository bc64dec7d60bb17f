"""What the built-in policies choose, and what Transformer^-1 learns from."""

import pytest
import torch

from astbench_registry import Outcome, StackShape
from astbench_registry.depth.interface import seen_mean
from astbench_registry.depth.registry import build_depth

SHAPE = StackShape(5, 8, (0.1, 0.2, 0.3, 0.3, 0.1))


def inputs(batch=6, length=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 8, generator=g), torch.rand(batch, length, generator=g) > 0.2


def test_static_takes_the_first_layers_or_those_named():
    hidden, seen = inputs()
    assert (
        build_depth("static", {"layers": 3}, SHAPE).choose(hidden, seen).paths.int().tolist() == [[1, 1, 1, 0, 0]] * 6
    )
    named = build_depth("static", {"path": [0, 4]}, SHAPE).choose(hidden, seen)
    assert named.paths.int().tolist() == [[1, 0, 0, 0, 1]] * 6


def test_the_share_of_operations_weighs_layers_by_their_costs():
    paths = torch.tensor([[True, False, True, False, False], [True] * 5])
    assert build_depth("static", {}, SHAPE).spent(paths).tolist() == pytest.approx([0.4, 1.0])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.66, 1.0])
def test_random_meets_its_share_in_the_mean(share):
    policy = build_depth("random", {"share": share}, SHAPE).eval()
    hidden, seen = inputs(batch=600)
    paths = policy.choose(hidden, seen).paths
    assert paths[:, 0].all()
    assert paths.double().mean().item() == pytest.approx(share, abs=0.02)
    assert paths.sum(-1).max() - paths.sum(-1).min() <= 1
    assert torch.equal(policy.choose(hidden, seen).paths, paths)
    other = build_depth("random", {"share": share, "seed": 1}, SHAPE).eval().choose(hidden, seen).paths
    assert torch.equal(other, paths) == (share in (0.2, 1.0)), "another seed, other paths where there is a choice"


def test_early_exit_stops_where_little_changes():
    policy = build_depth("early_exit", {"threshold": 0.9, "least": 2}, SHAPE)
    before, seen = inputs()
    turned = before.clone()
    turned[0] = -turned[0]
    turned[1][~seen[1]] *= -1  # nothing that may be looked at
    assert policy.stops(0, before, turned, seen) is None, "fewer layers than `least`"
    assert policy.stops(1, before, turned, seen).tolist() == [False, True, True, True, True, True]


def test_means_leave_out_what_may_not_be_seen():
    hidden, seen = inputs()
    spoiled = hidden.masked_fill(~seen[..., None], torch.nan)
    wanted = torch.stack([row[real].mean(0) for row, real in zip(hidden, seen, strict=True)])
    torch.testing.assert_close(seen_mean(spoiled, seen), wanted)


def learned(**options):
    torch.manual_seed(0)
    return build_depth("transformer_inverse", {"entropy": 0.0, **options}, SHAPE)


@pytest.mark.parametrize("choose", ["layers", "number"])
def test_a_drawn_path_has_the_probability_of_its_log(choose):
    policy = learned(choose=choose, start=0.6, look=2).train()
    hidden, seen = (x[:1].expand(40_000, *x.shape[1:]) for x in inputs())
    choice = policy.choose(hidden, seen)
    for path in choice.paths.unique(dim=0):
        rows = (choice.paths == path).all(-1)
        assert rows.double().mean().item() == pytest.approx(choice.log_prob[rows][0].exp().item(), abs=0.01)
    assert choice.paths.double().mean(0).tolist() == pytest.approx(choice.probability[0].tolist(), abs=0.01)
    if choose == "number":
        assert (choice.paths.int().diff(dim=-1) <= 0).all(), "first layers, no gaps"


@pytest.mark.parametrize("choose", ["layers", "number"])
def test_before_training_layers_are_taken_as_start_says(choose):
    policy = learned(choose=choose, start=0.7).eval()
    torch.nn.init.zeros_(policy.policy.weight)
    probability = policy.choose(*inputs()).probability[0]
    assert probability[-1].item() == pytest.approx(0.7, abs=1e-5) and (probability[0] == 1).all()


def test_the_policy_gradient_is_the_gradient_of_the_expected_cost():
    """By enumeration of the 2^4 paths: mean over many draws against the exact gradient."""
    policy = learned(cost=0.5, start=0.6).train()
    hidden, seen = inputs(batch=1)
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5, 1.5])
    exact_p = policy.choose(hidden, seen).probability[0, 1:]
    expected = (exact_p * (weights[1:] + 0.5 * torch.tensor(SHAPE.costs)[1:])).sum()
    (wanted,) = torch.autograd.grad(expected, policy.policy.bias)
    many = [x.expand(200_000, *x.shape[1:]) for x in (hidden, seen)]
    choice = policy.choose(*many)
    losses = (choice.paths * weights).sum(-1)
    found = policy.losses(choice, Outcome(losses, policy.spent(choice.paths)))
    (got,) = torch.autograd.grad(found["policy"], policy.policy.bias)
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.005)


def test_straight_through_gates_are_one_and_pass_the_gradient_on():
    policy = learned(estimator="straight_through", cost=0.0).train()
    choice = policy.choose(*inputs())
    assert choice.log_prob is None and torch.equal(choice.gates[choice.paths], torch.ones(int(choice.paths.sum())))
    (through,) = torch.autograd.grad(choice.gates[:, 1].sum(), choice.probability, retain_graph=True)
    assert through[:, 1].tolist() == [1.0] * 6
    outcome = Outcome(torch.ones(6), policy.spent(choice.paths))
    assert policy.losses(choice, outcome)["policy"].item() == 0, "without cost and entropy the task alone says"


def test_the_predictor_learns_the_loss():
    policy = learned().train()
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)
    hidden, seen = inputs()
    losses = torch.tensor([0.1, 2.0, 0.5, 1.0, 3.0, 0.2])
    for _ in range(300):
        choice = policy.choose(hidden, seen)
        found = policy.losses(choice, Outcome(losses, policy.spent(choice.paths)))
        optimizer.zero_grad()
        found["complexity"].backward()
        optimizer.step()
    assert policy.choose(hidden, seen).complexity.tolist() == pytest.approx(losses.tolist(), abs=0.1)


@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
def test_a_price_alone_makes_paths_short(estimator):
    policy = learned(cost=1.0, estimator=estimator, start=0.9).train()
    optimizer = torch.optim.Adam(policy.parameters(), 0.02)
    hidden, seen = inputs(batch=32)
    for _ in range(200):
        choice = policy.choose(hidden, seen)
        outcome = Outcome(torch.zeros(32), policy.spent(choice.paths))
        optimizer.zero_grad()
        sum(policy.losses(choice, outcome).values()).backward()
        optimizer.step()
    assert policy.eval().choose(hidden, seen).paths.int().tolist() == [[1, 0, 0, 0, 0]] * 32


@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
def test_inputs_that_need_a_layer_take_it_and_others_leave_it(estimator):
    """Half of the inputs lose 2 without the third layer; what tells them apart is in their tokens."""
    policy = learned(cost=1.0, estimator=estimator, entropy=0.01, start=0.7).train()
    optimizer = torch.optim.Adam(policy.parameters(), 0.02)
    hidden, seen = inputs(batch=64)
    needs = torch.arange(64) % 2 == 0
    hidden[needs, :, 0] += 2
    for _ in range(300):
        choice = policy.choose(hidden, seen)
        taken = choice.paths[:, 2].float() if choice.gates is None else choice.gates[:, 2]
        losses = 2.0 * needs * (1 - taken)
        found = policy.losses(choice, Outcome(losses.detach(), policy.spent(choice.paths)))
        optimizer.zero_grad()
        (sum(found.values()) + (losses.mean() if estimator == "straight_through" else 0.0)).backward()
        optimizer.step()
    paths = policy.eval().choose(hidden, seen).paths
    assert (paths[:, 2] == needs).double().mean() > 0.95
    assert not paths[:, [1, 3, 4]].any(), "what brings nothing is left out"

"""AST's policy-gradient estimator: the probability of a choice, the baseline, and that it learns where to look."""

import csv
import math

import pytest
import torch

from astbench.errors import ConfigError
from astbench.tasks.recall.data import IGNORED
from astbench.tasks.recall.task import Recall
from astbench.training.policy_gradient import policy_loss
from astbench_kernels import soft_top_k
from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call

BLOCK, BLOCKS, DIM = 4, 8, 8
OPTIONS = {
    "estimator": "policy_gradient",
    "block_size": BLOCK,
    "query_group": BLOCK * BLOCKS,
    "min_blocks": 1,
    "top_k": 2,
    "sink_block": False,
    "distill_weight": 0.0,
    "rank": 8,
}


def policy_attention(**options):
    torch.manual_seed(1)
    attention = build_attention("ast", {**OPTIONS, **options}, AttentionShape(2, 1, DIM))
    return attention.train()


def cross(batch, generator):
    """Queries of one group, keys and values of eight blocks, a mask that lets all see all."""
    q = torch.randn(batch, 2, BLOCK * BLOCKS, DIM, generator=generator)
    k, v = (torch.randn(batch, 1, BLOCK * BLOCKS, DIM, generator=generator) for _ in range(2))
    return q, k, v, AttentionMask("bidirectional_cross")


def test_log_probability_is_that_of_the_drawn_blocks():
    attention = policy_attention().double()
    q, k, v, mask = (x.double() if torch.is_tensor(x) else x for x in cross(3, torch.Generator().manual_seed(2)))
    output = attention(q, k, v, mask, context=AttentionContext(collect_stats=True))
    call = Call.of(attention.shape, q, k, v, mask)
    scores = attention.scores(call, attention.selection(call))
    p = soft_top_k(scores, torch.tensor(2).expand(scores.shape[:-1]), torch.ones_like(scores, dtype=torch.bool), 0.5)
    p = p.exp()
    kept = torch.zeros_like(p, dtype=torch.bool)
    layout = output.stats.layout
    for b in range(3):
        for h in range(2):
            kept[b, h, 0, layout.indices[b, h, 0, : layout.counts[b, h, 0]].long()] = True
    expected = torch.where(kept, p, 1 - p).log().sum(-1).mean((1, 2))
    torch.testing.assert_close(output.log_prob, expected)
    assert output.log_prob.requires_grad


def test_outside_of_training_nothing_is_drawn():
    attention = policy_attention().eval()
    tensors = cross(2, torch.Generator().manual_seed(3))
    one, two = attention(*tensors), attention(*tensors)
    assert one.log_prob is None
    assert torch.equal(one.out, two.out)


def test_the_baseline_of_a_sequence_is_the_mean_of_the_others():
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    log_prob = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    policy_loss(losses, log_prob).backward()
    assert losses.grad is None
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]) / 3
    torch.testing.assert_close(log_prob.grad, expected)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"--data\.batch_size=2"):
        policy_loss(torch.ones(1), torch.zeros(1, requires_grad=True))


def test_it_learns_to_keep_the_block_that_pays():
    """Blocks differ by a mark in their values, and a sequence loses unless the marked one is kept."""
    attention, generator = policy_attention(), torch.Generator().manual_seed(4)
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.03)

    def kept_share():
        q, k, v, mask = cross(64, generator)
        marked = torch.randint(BLOCKS, (64,), generator=generator)
        v.view(64, BLOCKS, BLOCK, DIM)[torch.arange(64), marked, :, 0] += 6.0
        output = attention(q, k, v, mask, context=AttentionContext(collect_stats=True))
        layout = output.stats.layout
        has = ((layout.indices == marked[:, None, None, None]) & layout.slots).any(-1).float()
        return has.mean((1, 2)), output.log_prob

    before = None
    for _ in range(150):
        share, log_prob = kept_share()
        before = share.mean() if before is None else before
        optimizer.zero_grad()
        policy_loss(1 - share, log_prob).backward()
        optimizer.step()
    with torch.no_grad():
        after = attention.eval() and kept_share()[0].mean()
    assert before < 0.45  # two of eight blocks, by chance
    assert after > 0.95


def test_each_sequence_of_a_probe_is_judged_by_its_own_answers():
    module = Recall({"name": "dense"})
    module.total_loss = lambda loss, each: (loss, each)
    labels = torch.tensor([[IGNORED, 2, IGNORED, 0], [1, IGNORED, IGNORED, IGNORED]])
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    module.forward = lambda batch: logits
    loss, each = module.training_step({"labels": labels}, 0)
    nll = -logits.log_softmax(-1)
    right = torch.stack([nll[0, 2], nll[1, 0], nll[2, 1]])
    torch.testing.assert_close(loss, right.mean())
    torch.testing.assert_close(each, torch.stack([right[:2].mean(), right[2]]))


WORDS = ["fit", "--attention=ast", "--attention.estimator=policy_gradient", "--trainer.max_steps=2", "--run_dir=run"]
SPARSE = "--attention.density_start=null"  # some demos start dense, with nothing to draw


@pytest.mark.parametrize(
    "words",
    [
        ["--task=mqar", "--data.num_eval=4"],
        ["--task=triviaqa", "--data.demo_train=20", "--data.demo_eval=4", "--backbone.gradient_checkpointing=true"],
        ["--task=lra_listops", "--data.num_train=9", "--data.num_eval=4", "--attention.query_group=16"],
        ["--task=wmt14", "--data.demo_train=40", "--data.demo_eval=4", "--data.vocab_size=400", "--task.average=1"],
    ],
    ids=lambda words: words[0],
)
def test_tasks_train_by_policy_gradient(astbench, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    done = astbench(*WORDS, SPARSE, *words, "--data.batch_size=3", "--trainer.log_every_n_steps=1")
    assert done.code == 0, done.err
    with open("run/metrics.csv", newline="") as lines:
        policy = [float(row["train/policy"]) for row in csv.DictReader(lines) if row["train/policy"]]
    assert len(policy) == 2 and all(map(math.isfinite, policy)) and any(policy)


def test_training_with_a_batch_of_one_is_refused(astbench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = astbench(*WORDS, "--task=mqar", "--data.num_eval=4", "--data.batch_size=1")
    assert done.code == 2
    assert done.err.count("\n") == 1 and "--data.batch_size=2" in done.err

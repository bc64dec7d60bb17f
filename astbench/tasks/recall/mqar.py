"""Multi-query associative recall, generated."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from astbench.backbones.tokenizers import id_tokenizer
from astbench.errors import ConfigError
from astbench.tasks.base import at_least
from astbench.tasks.generated import Generated
from astbench.tasks.recall.data import IGNORED, RecallData


class MQARData(RecallData):
    """Key-value pairs, then the keys again at gaps that follow a power law; each asks for its value.

    Source: Arora et al. 2023 (Zoology), arXiv 2312.04927, section 3 and appendix, and the generator published with
    it, whose recipe this is: see :func:`make_sequence`. The paper's grid is lengths 64 to 512 with 4 to 64 pairs.

    Args:
        source: generated is all there is.
        length: Tokens of a sequence.
        num_pairs: Key-value pairs in it; each key is asked for once.
        vocab_size: Token ids; the lower half are keys, the upper half values.
        power: Exponent a of the law p(gap) ~ gap^(a - 1) of the distance from the pairs to the queries; 1 spreads
            the queries evenly, 0.01 (the paper's) puts most of them near.
        num_train: Training sequences.
        num_eval: Sequences of the validation and of the test split.
        data_seed: Of the sequences. The run's seed only orders them.
    """

    task = "mqar"
    grouped_by: ClassVar[str] = "distance"

    def __init__(
        self,
        source: Literal["generated"] = "generated",
        length: int = 256,
        num_pairs: int = 32,
        vocab_size: int = 8192,
        power: float = 0.01,
        num_train: int = 100_000,
        num_eval: int = 1000,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        at_least(1, num_pairs=num_pairs, num_train=num_train, num_eval=num_eval)
        at_least(0, data_seed=data_seed)
        if length % 2 or length < 4 * num_pairs:
            raise ConfigError(
                f"--data.length must be even and at least 4 * num_pairs = {4 * num_pairs} tokens, got {length}"
            )
        if vocab_size <= length:
            raise ConfigError(f"--data.vocab_size must be above --data.length={length}, got {vocab_size}")
        if not 0 < power <= 1:
            raise ConfigError(f"--data.power must be above 0 and at most 1, got {power}")
        self.length, self.num_pairs, self.vocab_size, self.power = length, num_pairs, vocab_size, power
        self.num_train, self.num_eval, self.data_seed = num_train, num_eval, data_seed
        self.num_questions = num_pairs
        self.signature = (
            f"MQAR accuracy (%), {num_pairs} pairs in {length} tokens, vocabulary {vocab_size}, power {power}"
        )

    def vocabulary(self) -> PreTrainedTokenizerBase:
        """Ids that stand for themselves."""
        return id_tokenizer(self.vocab_size)

    def read(self, split: str) -> Generated:
        """The sequences of a split."""
        return self.generated(split, self.num_train, self.num_eval, self.data_seed, self._make)

    def _make(self, index: int, seed: int) -> dict[str, Tensor]:
        return make_sequence(
            seed, length=self.length, num_pairs=self.num_pairs, vocab_size=self.vocab_size, power=self.power
        )

    def groups(self, split: str, index: int) -> list[str]:
        """Tokens between a query and its key, as a range from one power of two to the next."""
        row = self.sets[split].rows[index]
        asked = (row["labels"] != IGNORED).nonzero().flatten()
        lows = [1 << (int(at) - 2 * int(row["question"][at])).bit_length() - 1 for at in asked]
        order = row["question"][asked].argsort().tolist()
        return [f"{lows[i]}-{2 * lows[i] - 1}" for i in order]


def make_sequence(seed: int, *, length: int, num_pairs: int, vocab_size: int, power: float) -> dict[str, Tensor]:
    """One sequence: `input_ids`, `labels` and `question`, each `(length,)`.

    The published generator's recipe: `num_pairs` distinct keys from [1, vocabulary / 2) and distinct values from
    [vocabulary / 2, vocabulary); first key, value, key, value ...; in the rest each key once more, on even places
    drawn without replacement with probability ~ place^(power - 1); everything else filled with random ids. A key's
    label is its value, which does not follow in the input.

    Args:
        seed: Other seeds, other sequences.
        length: Tokens, even and at least 4 `num_pairs`.
        num_pairs: Pairs, each asked for once.
        vocab_size: Ids in all.
        power: Of the power law.
    """
    draw = torch.Generator().manual_seed(seed)
    half = vocab_size // 2
    keys = 1 + torch.randperm(half - 1, generator=draw)[:num_pairs]
    values = half + torch.randperm(vocab_size - half, generator=draw)[:num_pairs]
    ids = torch.randint(vocab_size, (length,), generator=draw)
    ids[: 2 * num_pairs] = torch.stack([keys, values], 1).flatten()
    places = torch.arange(1, length // 2 - num_pairs + 1, dtype=torch.float64)
    # Drawn one after the other: the first key's place is the likeliest to be near.
    asked = 2 * num_pairs + 2 * torch.multinomial(places ** (power - 1), num_pairs, generator=draw)
    ids[asked] = keys
    labels, question = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
    labels[asked], question[asked] = values, torch.arange(num_pairs)
    return {"input_ids": ids, "labels": labels, "question": question}

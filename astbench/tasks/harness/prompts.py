"""The prompts as the model will get them: how many tokens, what stands in front of the text, what does not fit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from astbench.backbones.tokenizers import tokens_around
from astbench.errors import ConfigError

if TYPE_CHECKING:
    from astbench.tasks.harness.model import SwappedLM

PROBE = "the text of the task"
SHOWN = 160
"""Characters of a prompt's beginning and end that the record holds."""


@dataclass(frozen=True)
class Prompt:
    """One request to the model.

    Attributes:
        task: The task that asks.
        item: Number of its example.
        ids: Tokens of the whole input, before anything is cut off.
        room: Tokens that it may have, next to those that are to be written.
        writes: Most tokens that are to be written; 0 where the input is scored.
        windows: It is scored window by window, so that any length fits.
        wanted: Tokens that its text was to be made of, those to write among them; 0 where it was not made to a length.
    """

    task: str
    item: int
    ids: tuple[int, ...]
    room: int
    writes: int
    windows: bool = False
    wanted: int = 0

    @property
    def cut(self) -> int:
        """Tokens that are too many."""
        return 0 if self.windows else max(0, len(self.ids) - self.room)


def build(lm: SwappedLM, tasks: Mapping[str, Any], seed: int, **how: Any) -> list[Prompt]:
    """The requests of all tasks, in their order; `how` as `Task.build_all_requests` takes it."""
    found = []
    for name, task in tasks.items():
        task.set_fewshot_seed(seed)  # as the evaluation will again, so that it draws the same examples
        task.build_all_requests(**how)
        found += [
            Prompt(name, request.doc_id, *_sizes(lm, request), wanted=_wanted(request.doc))
            for request in task.instances
        ]
    return found


def _wanted(doc: Any) -> int:
    """The length that one of RULER's texts was made for."""
    length = doc.get("max_length") if isinstance(doc, Mapping) else None
    return length if isinstance(length, int) else 0


def _sizes(lm: SwappedLM, request: Any) -> tuple[tuple[int, ...], int, int, bool]:
    """Tokens, room, tokens to write, in windows: as lm-eval's model class will count them."""
    if request.request_type == "generate_until":
        writes = lm.most_written(request.args[1])
        ids, _ = lm.tok_batch_encode([request.args[0]])
        return tuple(ids[0].tolist()), lm.max_length - writes, writes, False
    if request.request_type == "loglikelihood":
        context, continuation = request.args
        before, after = lm.encoded(context, continuation)
        return (*before, *after), lm.max_length + 1, 0, False  # the last token is only predicted
    return tuple(lm.tok_encode(request.args[0])), lm.max_length, 0, True


def check_lengths(prompts: Sequence[Prompt], max_length: int, too_long: str) -> None:
    """Refuse prompts that do not fit.

    Raises:
        ConfigError: naming the first, and what to do.
    """
    for prompt in prompts:
        if prompt.room < 1:
            raise ConfigError(
                f"{prompt.task} writes up to {prompt.writes} tokens, and --data.max_length={max_length} leaves no room "
                "for its prompt; raise it"
            )
    beyond = [prompt for prompt in prompts if prompt.cut]
    if beyond and too_long == "refuse":
        worst = max(beyond, key=lambda prompt: prompt.cut)
        raise ConfigError(
            f"{len(beyond)} of {len(prompts)} prompts are longer than --data.max_length={max_length} allows; the "
            f"longest (item {worst.item} of {worst.task}) needs {max_length + worst.cut}; raise it, or let "
            "--data.too_long=cut take tokens off their beginning"
        )


class Seen:
    """Counts what begins the inputs that a model gets, whatever was planned."""

    def __init__(self, bos: int | None) -> None:
        self.bos = bos
        self.leading: Counter[int] = Counter()
        self.lengths: list[int] = []

    def add(self, ids: Sequence[int]) -> None:
        """One input."""
        self.leading[leading(ids, self.bos)] += 1
        self.lengths.append(len(ids))

    def described(self) -> dict[str, Any]:
        """For the record: inputs by the number of start tokens in front, and their lengths."""
        return {
            "inputs": len(self.lengths),
            "by_leading_bos": {str(number): count for number, count in sorted(self.leading.items())},
            "tokens": {"least": min(self.lengths), "most": max(self.lengths)} if self.lengths else None,
        }


def leading(ids: Sequence[int], bos: int | None) -> int:
    """How many start tokens an input begins with."""
    number = 0
    while bos is not None and number < len(ids) and ids[number] == bos:
        number += 1
    return number


def audit(
    lm: SwappedLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, template: bool, system: str
) -> dict[str, Any]:
    """What is put before and behind a task's text, by the tokenizer and by the chat template; see :func:`notes`."""
    before, after = (tokenizer.convert_ids_to_tokens(ids) for ids in tokens_around(tokenizer, "a"))
    planned = Seen(tokenizer.bos_token_id)
    for prompt in prompts:
        planned.add(prompt.ids)
    has = tokenizer.chat_template
    text = str(has)
    return {
        "bos_token": tokenizer.bos_token,
        "tokenizer_puts": {"before": before, "behind": after},
        "chat_template": {
            "there": has is not None,
            "applied": template,
            "sha256": hashlib.sha256(text.encode()).hexdigest() if has is not None else None,
            **(dict(zip(("before", "behind"), _around(lm, system), strict=True)) if template else {}),
        },
        "system": system or None,
        "prompts": planned.described(),
        "cut": sum(prompt.cut > 0 for prompt in prompts),
        "first": {task: _shown(tokenizer, prompt) for task, prompt in _firsts(prompts)},
    }


def _around(lm: SwappedLM, system: str) -> tuple[str, str]:
    """What a chat template puts before and behind the text of a user's turn."""
    history = [{"role": "system", "content": system}] if system else []
    before, _, after = lm.apply_chat_template([*history, {"role": "user", "content": PROBE}]).partition(PROBE)
    return before, after


def _firsts(prompts: Iterable[Prompt]) -> Iterator[tuple[str, Prompt]]:
    found: set[str] = set()
    for prompt in prompts:
        if prompt.task not in found:
            found.add(prompt.task)
            yield prompt.task, prompt


def _shown(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> dict[str, Any]:
    text = str(tokenizer.decode(list(prompt.ids)))
    return {"tokens": len(prompt.ids), "begins": text[:SHOWN], "ends": text[-SHOWN:]}


SHORT = 0.75
"""Share of the length that was asked for, below which it is said."""


def too_short(prompts: Iterable[Prompt]) -> list[str]:
    """What to say of texts that were made far shorter than they were to be: lm-eval adds essays 500 words at a time."""
    sizes: dict[tuple[str, int], list[int]] = {}
    for prompt in prompts:
        if prompt.wanted:
            sizes.setdefault((prompt.task, prompt.wanted), []).append(len(prompt.ids) + prompt.writes)
    return [
        f"{task} is to fill {wanted:,} tokens, and lm-eval made it {min(made):,} to {max(made):,} long, those to write "
        "included; other lengths come closer"
        for (task, wanted), made in sizes.items()
        if min(made) < SHORT * wanted
    ]


def notes(found: Mapping[str, Any]) -> list[str]:
    """The audit for a reader, in a few lines."""
    bos, template = found["bos_token"], found["chat_template"]
    puts = found["tokenizer_puts"]["before"] + found["tokenizer_puts"]["behind"]
    counts = found["prompts"]["by_leading_bos"]
    adds = f"the tokenizer itself adds {' '.join(puts) or 'nothing'}"
    begins = ", ".join(f"{count} prompts begin with {int(number) or 'none'}" for number, count in counts.items())
    told = [f"start token (BOS) {bos}: {begins}; {adds}" if bos else f"the tokenizer has no start token (BOS); {adds}"]
    if template["applied"]:
        told.append(f"chat template applied: {template['before']!r} before the text, {template['behind']!r} behind it")
    elif template["there"]:
        told.append("the tokenizer has a chat template, which is not applied (--data.chat_template=true)")
    else:
        told.append("the tokenizer has no chat template")
    if any(int(number) > 1 for number in counts):
        told.append("some prompts begin with more than one start token; models are not trained on that")
    if found["cut"]:
        told.append(
            f"{found['cut']} prompts are too long; what is too much is cut off their beginning, as lm-eval does"
        )
    return told

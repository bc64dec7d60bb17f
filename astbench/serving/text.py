"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """What can be sent of a text while it is written.

    Held back is a character whose last bytes have not come, and what may be the beginning of a stop string. The parts
    together are what the tokenizer makes of all tokens at once, up to a stop string.

    Args:
        tokenizer: The model's.
        stop: Strings that end the text, and are no part of it.

    Attributes:
        tokens: All that came.
        stopped: A stop string was found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._held = ""
        self._sent = 0  # characters
        self._known = self._read = 0  # tokens: where the window begins, and up to where it was read

    def add(self, token: int) -> str:
        """Take one more token; what can be sent now, often nothing."""
        self.tokens.append(token)
        # Decoded from a few tokens before: some tokenizers write a word's first piece otherwise than the next.
        before = self._decode(self.tokens[self._known : self._read])
        now = self._decode(self.tokens[self._known :])
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._known, self._read = self._read, len(self.tokens)
        return self._send(now[len(before) :])

    def finish(self) -> str:
        """What was held back, when no token is to come."""
        if self.stopped:
            return ""
        rest = self._decode(self.tokens)[self._sent + len(self._held) :]
        out = self._send(rest)
        held, self._held = self._held, ""
        self._sent += len(held)
        return out if self.stopped else out + held

    def _send(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        elif keep := max((_begun(text, stop) for stop in self._stop), default=0):
            text, self._held = text[:-keep], text[-keep:]
        self._sent += len(text)
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)

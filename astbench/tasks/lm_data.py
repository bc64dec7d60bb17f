"""WikiText files as windows of tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astbench.backbones.load import require_positions
from astbench.backbones.presets import BackboneConfig
from astbench.errors import ConfigError, DataError
from astbench.reading import read_bytes
from astbench.tokenizers import load_tokenizer, saved_tokenizer

_FILES = ("wiki.test.raw", "wiki.test.tokens")


class WikiTextData(pl.LightningDataModule):
    """The test split of WikiText in its original files, cut into windows.

    Args:
        source: local, so far.
        path: Folder with `wiki.test.raw` or `wiki.test.tokens` (also `.gz`), or the file.
        context: Tokens of a window.
        stride: Tokens from one window's start to the next; of each window only its last `stride` tokens are
            scored (of the first all), so each token is scored at most once. Default: `context`.
        windows: Only this many windows, spread evenly over the text (each from its own start, `stride` aside).
        eval_batch_size: Windows per step.
    """

    length_option: ClassVar[str] = "context"  # the option that says how long inputs can be
    pads: ClassVar[bool] = False  # a batch holds windows of one length

    def __init__(
        self,
        source: Literal["local"] = "local",
        path: str = "",
        context: int = 1024,
        stride: int | None = None,
        windows: int | None = None,
        eval_batch_size: int = 1,
    ) -> None:
        super().__init__()
        if context < 2:
            raise ConfigError(f"--data.context must be at least 2 tokens, got {context}")
        if stride is not None and not 1 <= stride <= context:
            raise ConfigError(f"--data.stride must be between 1 and context={context}, got {stride}")
        if eval_batch_size < 1:
            raise ConfigError(f"--data.eval_batch_size must be at least 1, got {eval_batch_size}")
        if windows is not None and windows < 1:
            raise ConfigError(f"--data.windows must be at least 1, got {windows}")
        self.source, self.path, self.context = source, path, context
        self.stride = stride or context
        self.windows, self.eval_batch_size = windows, eval_batch_size
        self.backbone = BackboneConfig()
        self.tokenizer_folder: Path | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.rows: list[tuple[Tensor, int]] = []
        self.about: dict[str, Any] = {}

    def prepare(self, backbone: BackboneConfig, seed: int, tokenizer_folder: Path | None) -> None:
        """Tell the data module what it serves; called before the trainer starts."""
        self.backbone, self.tokenizer_folder = backbone, tokenizer_folder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run; there after `setup`."""
        assert self._tokenizer is not None, "setup() has not run"
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Read and cut the text.

        Raises:
            DataError: missing, unreadable or empty file.
        """
        if self.rows:
            return
        if self.tokenizer_folder is not None:
            self._tokenizer = saved_tokenizer(self.tokenizer_folder)
        else:
            self._tokenizer = load_tokenizer(self.backbone)
        file = self._file()
        text = _read(file)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) < 2:
            raise DataError(f"{file} holds no text")
        self.rows = self._cut(ids)
        self.about = {
            "file": file.name,
            "tokens": len(ids),
            "scored": sum(scored for _, scored in self.rows),
            "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        }

    def _file(self) -> Path:
        if not self.path:
            raise DataError("task wikitext103 needs --data.path=FOLDER with wiki.test.raw")
        path = Path(self.path).expanduser()
        if not path.exists():
            raise DataError(f"--data.path={path} does not exist")
        if path.is_file():
            return path
        for name in _FILES:
            for ending in ("", ".gz"):
                if (path / f"{name}{ending}").is_file():
                    return path / f"{name}{ending}"
        raise DataError(f"--data.path={path} holds none of {', '.join(_FILES)} (also .gz)")

    def _cut(self, ids: Tensor) -> list[tuple[Tensor, int]]:
        """(window, how many of its last tokens are scored)."""
        if self.windows is not None:
            apart = max(1, (len(ids) - self.context) // self.windows)
            starts = [i * apart for i in range(self.windows) if i * apart < len(ids) - 1]
            cut = [ids[s : s + self.context] for s in starts]
            return [(window, len(window) - 1) for window in cut]
        rows, scored_to = [], 1
        for start in range(0, len(ids) - 1, self.stride):
            stop = min(start + self.context, len(ids))
            first = max(scored_to, start + 1)
            if stop > first:
                rows.append((ids[start:stop], stop - first))
            scored_to = stop
            if stop == len(ids):
                break
        return rows

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse windows longer than the model's positions."""
        require_positions(model, self.context, f"--data.context={self.context}")

    def test_dataloader(self) -> DataLoader[Any]:
        """Windows in text order; a batch holds windows of one length."""
        return DataLoader(_Windows(self.rows), batch_sampler=_same_length(self.rows, self.eval_batch_size))

    def describe(self) -> dict[str, Any]:
        """What the record says of the data."""
        return {
            "source": self.source,
            "path": self.path,
            "context": self.context,
            "stride": self.stride,
            "windows": len(self.rows),
            "notes": [],
            **self.about,
        }


class _Windows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, rows: list[tuple[Tensor, int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, scored = self.rows[index]
        return {"input_ids": ids, "scored": scored}


def _same_length(rows: list[tuple[Tensor, int]], size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index, (ids, _) in enumerate(rows):
        if batches and len(batches[-1]) < size and len(rows[batches[-1][0]][0]) == len(ids):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _read(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {' '.join(str(error).split())[:160]}") from error


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What perplexities per token can be compared by."""
    return f"{type(tokenizer).__name__} of {len(tokenizer)} tokens"

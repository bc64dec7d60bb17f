"""Classification of pictures by a Compact Convolutional Transformer with a swapped attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from astbench.backbones.load import load_backbone
from astbench.tasks.base import gathered
from astbench.tasks.guesses import accuracies, items_of
from astbench.tasks.images.config import ImageClassifierConfig
from astbench.tasks.images.data import ImageData
from astbench.training.module import TaskModule

SHOWN = 3
"""Likeliest classes that `predict` tells of."""


class ImageClassifier(TaskModule):
    """Cross-entropy with label smoothing over the classes, as CCT is trained (Hassani et al. 2021, arXiv 2104.05704).

    Of its recipe stochastic depth is the model's, crops and mirrors the data's; without its AutoAugment, mixup and
    cutmix.
    """

    head = "image_classification"

    def __init__(self, attention: dict[str, Any], task: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(attention, task=task, **common)
        self.config = ImageClassifierConfig(**(task or {}))
        self.guesses: dict[int, tuple[int, int]] = {}
        self.likeliest: list[tuple[str, float]] = []
        self.results: dict[str, Any] = {}

    @property
    def data(self) -> ImageData:
        """The data module in use."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def build_model(self) -> PreTrainedModel:
        """A preset has the data's classes and size of pictures."""
        names = dict(enumerate(self.data.classes))
        settings = {
            "image_size": self.data.image_size,
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
        }
        return load_backbone(self.backbone, self.head, settings=settings)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits of the classes, `(batch, classes)`, float32."""
        assert self.model is not None
        logits: Tensor = self.model(pixel_values=batch["pixel_values"]).logits
        return logits.float()

    def input_tokens(self, batch: Any) -> int:
        """Tokens that the pictures of a batch are cut into."""
        return len(batch["label"]) * self.data.length

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy, and the attention's own losses."""
        smoothing = self.config.label_smoothing
        each = cross_entropy(self(batch), batch["label"], reduction="none", label_smoothing=smoothing)
        return self.total_loss(each.mean(), each)

    def on_validation_epoch_start(self) -> None:
        """Forget the guesses of the evaluation before."""
        self.guesses.clear()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep the likeliest class of each picture, and the right one."""
        guessed = self(batch).argmax(-1).tolist()
        rows = zip(batch["index"].tolist(), guessed, batch["label"].tolist(), strict=True)
        self.guesses.update({index: (guess, right) for index, guess, right in rows})

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[float]:
        """Probabilities of the classes of the one picture."""
        (probabilities,) = self(batch).softmax(-1).tolist()
        ranked = sorted(zip(self.data.classes, probabilities, strict=True), key=lambda pair: -pair[1])
        self.likeliest = ranked[:SHOWN]
        return list(probabilities)

    def on_validation_epoch_end(self) -> None:
        """Accuracy."""
        self._finish("val", self.data.eval_split)

    def on_test_epoch_end(self) -> None:
        """Accuracy."""
        self._finish("test", "test")

    def on_predict_epoch_end(self) -> None:
        """The class and how sure the model is, with the next ones."""
        (name, confidence), *others = self.likeliest
        self.results = {
            "signature": self.data.file,
            "metrics": {},
            "answer": {"class": name, "confidence": confidence, "others": dict(others)},
        }
        then = ", ".join(f"{other} {share:.3f}" for other, share in others)
        self.answers = {"class": name, "confidence": f"{confidence:.3f}; then {then}"}

    def _finish(self, stage: str, split: str) -> None:
        guesses = gathered(self.trainer, self.guesses)
        metrics = accuracies(guesses)
        low, high = interval(sum(guess == right for guess, right in guesses.values()), len(guesses))
        data = self.data
        what = "generated pictures" if data.source == "demo" else "CIFAR-10"
        self.results = {
            "metrics": metrics,
            "interval": {"accuracy": [low, high], "of": f"95%, over {len(guesses)} pictures (Wilson)"},
            "signature": f"{what}, accuracy (%), {data.image_size} x {data.image_size} pixels, "
            f"{len(guesses)} {split} pictures",
            "split": split,
            "items": items_of(guesses),
        }
        self.answers = {"95% interval": f"accuracy {low:.2f} to {high:.2f}, over {len(guesses)} pictures"}
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "accuracy", rank_zero_only=True)


def interval(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, in percent (Wilson 1927): 95% by default.

    Args:
        right: Successes.
        count: Trials, at least one.
        z: Quantile of the normal distribution.
    """
    share = right / count
    middle = share + z**2 / (2 * count)
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)

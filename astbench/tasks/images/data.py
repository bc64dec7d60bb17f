"""Pictures and their classes: the data module of `images`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import exists
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from astbench.backbones.cct import CCTForImageClassification
from astbench.backbones.presets import PRESETS, BackboneConfig, Head, cct_tokens, resolve_preset
from astbench.errors import ConfigError, DataError
from astbench.files.hub import hub_rows
from astbench.files.images import read_image
from astbench.files.paths import asked_path, other_kind
from astbench.tasks import cifar
from astbench.tasks.base import at_least
from astbench.tasks.generated import FINGERPRINTED, ProbeData, ProbeSet
from astbench.tasks.images import demo
from astbench.tasks.images.pictures import Pictures, PictureSet

HUB = ("uoft-cs/cifar10", "plain_text", "0b2714987fa478483af9968de7c934580d0bb9a2")
"""Repository, configuration and revision of CIFAR-10 on the hub."""

SMALLEST, LARGEST = 8, 512
"""Sides that `--data.image_size` takes, in pixels."""

PRESET = f"--backbone takes a preset for pictures ({', '.join(p for p in PRESETS if p.startswith('cct'))})"


class ImageData(ProbeData):
    """Pictures of 32 x 32 pixels: CIFAR-10, or generated ones.

    CIFAR-10 has no validation split: the last tenth of its training pictures is held out.

    Args:
        source: demo (generated), local or hub (uoft-cs/cifar10).
        path: For `local`: CIFAR-10's archive for Python or the binary one (.tar.gz), the folder that it unpacks to, or
            a folder with train/CLASS/ and test/CLASS/ of images.
        image_size: Side that pictures are made larger or smaller to, in pixels: twice as many are four times the
            tokens.
        augment: Crop and flip training pictures; by default those of CIFAR-10 and none of the demo's, whose mark would
            move.
        demo_train: For `demo`: training pictures.
        demo_eval: For `demo`: pictures of the validation and of the test split.
        eval_batch_size: Pictures per evaluation step.
        file: For `predict`: the picture, of any size; its middle square is taken.
    """

    task = "images"
    head: ClassVar[Head] = "image_classification"
    length_option: ClassVar[str] = "image_size"
    tokenized: ClassVar[bool] = False

    def __init__(
        self,
        source: Literal["demo", "local", "hub"] = "demo",
        path: str = "",
        image_size: int = 32,
        augment: bool | None = None,
        demo_train: int = 16_000,
        demo_eval: int = 500,
        eval_batch_size: int = 100,
        file: str = "",
        **options: Any,
    ) -> None:
        super().__init__(source, eval_batch_size=eval_batch_size, **options)
        at_least(1, demo_train=demo_train, demo_eval=demo_eval)
        if not SMALLEST <= image_size <= LARGEST:
            raise ConfigError(f"--data.image_size must be {SMALLEST} to {LARGEST} pixels, got {image_size}")
        self.read_from(path)
        self.image_size, self.file = image_size, file
        self.augment = source != "demo" if augment is None else augment
        self.demo_train, self.demo_eval = demo_train, demo_eval
        self.classes = demo.CLASSES if source == "demo" else cifar.CLASSES
        self._training: Pictures | None = None

    @classmethod
    def longest(cls, data: Mapping[str, Any], backbone: Mapping[str, Any]) -> tuple[int | None, str]:
        """Tokens that the preset makes of a picture."""
        settings = PRESETS.get(resolve_preset(backbone["name"], cls.head) or "", {})
        if settings.get("model_type") != "cct":
            return None, ""
        size = data["image_size"]
        tokens = cct_tokens(size, settings["num_conv_layers"], settings["kernel_size"])
        return tokens, f"--data.image_size={size} with --backbone.name={backbone['name']}"

    def prepare(self, backbone: BackboneConfig, *arguments: Any) -> None:
        """See the base class.

        Raises:
            ConfigError: a backbone for text, or one with more positions than pictures have.
        """
        super().prepare(backbone, *arguments)
        preset = resolve_preset(backbone.name, self.head)
        if preset and PRESETS[preset]["model_type"] != "cct":
            raise ConfigError(f"task images has no text: {PRESET}, got {backbone.name}")
        if backbone.max_positions is not None:
            raise ConfigError(
                "--backbone.max_positions is for texts: --data.image_size says how many tokens a picture has"
            )

    def setup(self, stage: str) -> None:
        """Read or generate the splits of a stage.

        Raises:
            ConfigError: `predict` without a picture.
            DataError: nothing to read, or nothing in it that can be used.
        """
        if stage == "predict":
            rows = self._asked()
            self.sets["predict"] = self.examples("predict", rows, len(rows))
        else:
            super().setup(stage)

    def read(self, split: str) -> Sequence[dict[str, Any]]:
        """See the base class."""
        if self.source == "demo":
            return self.generated(split, self.demo_train, self.demo_eval, 0, self._make)
        if split == "test":
            return self._published("test")
        if self._training is None:
            self._training = self._published("train")
        pixels, labels = self._training.pixels, self._training.labels
        begin = len(labels) * 9 // 10
        part = slice(begin, None) if split == "validation" else slice(begin)
        return Pictures(pixels[part], labels[part])

    def _make(self, index: int, seed: int) -> dict[str, Any]:
        pixels, label = demo.generate(seed)
        return {"pixels": pixels, "label": label}

    def _published(self, split: str) -> Pictures:
        if self.source == "hub":
            name, configuration, revision = HUB
            rows = hub_rows(name, configuration, split, revision)
            pixels = np.stack([np.asarray(row["img"].convert("RGB")) for row in rows])
            return Pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [row["label"] for row in rows])
        if not self.path:
            raise DataError("--data.source=local needs --data.path=FOLDER, or an archive of CIFAR-10")
        path = asked_path(self.path)
        if not exists(path):
            raise DataError(f"--data.path={self.path[:200]} does not exist")
        if path.is_dir() and cifar.has_jpegs(path) and cifar.JPEG_NOTE not in self.notes:
            self.notes.append(cifar.JPEG_NOTE)
        return Pictures(*cifar.read_cifar(path, split))

    def _asked(self) -> Pictures:
        """The picture that `predict` is asked about: its middle square, 32 pixels wide as those of the training."""
        if not self.file:
            raise ConfigError("predict needs --data.file=IMAGE")
        path, place = asked_path(self.file), f"--data.file={self.file}"
        if not exists(path):
            raise DataError(f"{place} does not exist")
        if path.is_dir():
            raise DataError(f"{place} is not a file{other_kind(path)}")
        image = read_image(path, place=place).convert("RGB")
        width, height = image.size
        if (width, height) != (cifar.SIDE, cifar.SIDE):
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            image = image.resize((cifar.SIDE, cifar.SIDE), box=(left, top, left + side, top + side))
            self.notes.append(
                f"{path.name[:80]} has {width} x {height} pixels: its middle square, made {cifar.SIDE} pixels wide"
            )
        return Pictures(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous(), [0])

    def examples(self, split: str, rows: Sequence[dict[str, Any]], count: int) -> ProbeSet:
        """The rows of a split, as the model takes them."""
        return PictureSet(rows, count, self.image_size, augment=self.augment and split == "train", seed=self.seed)

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model of other pictures or classes; learn how many tokens it makes of one.

        Raises:
            ConfigError: no CCT, or one of another size or of other classes.
        """
        if not isinstance(model, CCTForImageClassification):
            raise ConfigError(f"{PRESET}, or a folder with a CCT; {self.backbone.name} is a {type(model).__name__}")
        size = model.config.image_size
        names = [name for _, name in sorted((model.config.id2label or {}).items())]
        if size != self.image_size:
            raise ConfigError(
                f"--backbone.name={self.backbone.name} is for pictures of {size} pixels: set --data.image_size={size}"
            )
        if tuple(names) != self.classes:
            raise ConfigError(
                f"--backbone.name={self.backbone.name} knows other classes than --data.source={self.source}: "
                f"{', '.join(names[:4])}, ..."
            )
        self.length = int(model.config.max_position_embeddings)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The picture that was asked about."""
        return self._evaluation("predict")

    def describe(self) -> dict[str, Any]:
        """See the base class."""
        if "predict" not in self.sets:
            return {**super().describe(), "augmented": self.augment, "image_size": self.image_size}
        fingerprint = self.sets["predict"].fingerprint(FINGERPRINTED)
        about = {"source": "file", "path": self.file, "examples": {"predict": 1}, "length": self.length}
        return {**about, "fingerprints": {"predict": fingerprint}, "notes": list(self.notes)}

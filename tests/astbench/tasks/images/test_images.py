"""The images task: pictures as the model takes them, and fit, test and predict through the command line."""

import json
import shutil
import signal

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from transformers import ViTConfig, ViTForImageClassification

from astbench.backbones.cct import CCTConfig, CCTForImageClassification
from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import METRICS, RECORD
from astbench.tasks.cifar import CLASSES, JPEG_NOTE
from astbench.tasks.images import data as data_module
from astbench.tasks.images.data import HUB, ImageData
from astbench.tasks.images.pictures import MEAN, STD, Pictures, PictureSet, augmented, normalised
from astbench.tasks.images.task import ImageClassifier, interval
from astbench.training.sampler import Draw

SHORT = ["--task=images", "--data.batch_size=4", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
DEMO = [*SHORT, "--data.demo_train=12", "--data.demo_eval=6"]


def refused(done, code, *parts):
    assert len(done.err.splitlines()) == 1 and done.err.startswith("astbench: error: "), done.err
    assert done.code == code and "unexpected" not in done.err, done.err
    for part in parts:
        assert part in done.err


# -- pictures --------------------------------------------------------------------------------------------------------


def test_crops_and_mirrors_are_those_of_the_padded_picture():
    pixels = torch.arange(3 * 6 * 6, dtype=torch.uint8).view(3, 6, 6) + 1
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    possible = {}
    for down in range(9):
        for right in range(9):
            crop = padded[:, down : down + 6, right : right + 6]
            possible[crop.numpy().tobytes()] = (down, right, False)
            possible[crop.flip(-1).numpy().tobytes()] = (down, right, True)
    seen = [possible[augmented(pixels, seed).contiguous().numpy().tobytes()] for seed in range(800)]
    assert {place[:2] for place in seen} == {(down, right) for down in range(9) for right in range(9)}
    assert 340 < sum(mirrored for *_, mirrored in seen) < 460


def test_a_crop_depends_on_seed_epoch_and_picture_and_on_nothing_else():
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)

    def get(epoch, index, *, seed=1, augment=True):
        rows = PictureSet(Pictures(pixels, [0] * 5), 5, 32, augment=augment, seed=seed)
        torch.randint(3, ())  # the global generator is no part of it
        return rows[Draw(epoch, index)]["pixel_values"]

    assert torch.equal(get(2, 3), get(2, 3))
    assert not torch.equal(get(2, 3), get(1, 3)) and not torch.equal(get(2, 3), get(2, 3, seed=2))
    assert torch.equal(get(2, 3, augment=False), normalised(pixels[3], 32))
    pixels[4] = pixels[3]
    assert not torch.equal(get(2, 3), get(2, 4))


def test_pictures_are_normalised_by_colour_and_made_larger():
    pixels = torch.stack([torch.full((32, 32), level, dtype=torch.uint8) for level in (0, 100, 255)])
    for size in (16, 32, 48):
        got = normalised(pixels, size)
        assert got.shape == (3, size, size) and got.dtype == torch.float32
        for colour, level in enumerate((0, 100, 255)):
            exact = (level / 255 - MEAN[colour]) / STD[colour]
            torch.testing.assert_close(got[colour], torch.full((size, size), exact), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 7), (431, 500)])
def test_the_interval_is_wilsons(right, count):
    low, high = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert interval(right, count) == pytest.approx((100 * low, 100 * high), abs=1e-4)


def test_labels_are_smoothed_in_training(monkeypatch):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    module = ImageClassifier({"name": "dense"}, task={"label_smoothing": 0.3})
    monkeypatch.setattr(module, "forward", lambda batch: logits)
    monkeypatch.setattr(module, "total_loss", lambda loss, each: (loss, each))
    loss, each = module.training_step({"label": torch.arange(6) % 5}, 0)
    logs = logits.log_softmax(-1)
    exact = -0.7 * logs[torch.arange(6), torch.arange(6) % 5] - 0.3 * logs.mean(-1)
    torch.testing.assert_close(each, exact)
    torch.testing.assert_close(loss, exact.mean())


def test_rows_of_the_hub(monkeypatch):
    asked = []
    rows = [{"img": Image.new("RGB", (32, 32), (10 * n, 0, 5)), "label": n % 10} for n in range(20)]
    monkeypatch.setattr(data_module, "hub_rows", lambda *names: asked.append(names) or rows)
    data = ImageData("hub")
    train, held = data.read("train"), data.read("validation")
    assert asked == [(HUB[0], HUB[1], "train", HUB[2])]
    assert (len(train), len(held)) == (18, 2) and held.labels == [8, 9]
    assert held.pixels.shape == (2, 3, 32, 32) and held.pixels[1, :, 3, 4].tolist() == [190, 0, 5]
    assert len(data.read("test")) == 20 and asked[-1][2] == "test"


# -- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run of AST on the demo."""
    folder = tmp_path_factory.mktemp("images") / "run"
    code, said = run(["fit", "--attention=ast", *DEMO, f"--run_dir={folder}"])
    assert code == 0, said
    return folder


def test_the_record(trained):
    record = json.loads((trained / RECORD).read_text())
    items = json.loads((trained / "items.json").read_text())
    right = sum(row["guess"] == row["label"] for row in items.values())
    assert len(items) == 6 and record["metrics"]["accuracy"] == pytest.approx(100 * right / 6)
    assert record["interval"]["accuracy"] == pytest.approx(interval(right, 6))
    assert all(row["accuracy"] == 100.0 * (row["guess"] == row["label"]) for row in items.values())
    assert record["density"]["mean"] == pytest.approx(0.25) and record["attached"]["layers"] == 2
    assert record["data"]["length"] == 64 and record["data"]["augmented"] is False
    training, evaluation = (record["flops"][part] for part in ("training", "evaluation"))
    assert training["tokens"] == 2 * 4 * 64 and evaluation["tokens"] == 6 * 64
    assert training["model"] > 2 * evaluation["model"] > 0 < training["attention"]
    assert (trained / "pattern.png").exists() and not (trained / "tokenizer").exists()


def test_test_and_predict_take_the_run(astbench, trained, tmp_path):
    done = astbench("test", f"--ckpt_path={trained}", f"--run_dir={tmp_path / 'test'}")
    assert done.code == 0 and "95% interval" in done.out, done.err
    Image.new("RGBA", (50, 40), (200, 10, 20, 255)).save(tmp_path / "red.png")
    options = [f"--ckpt_path={trained}", f"--data.file={tmp_path / 'red.png'}", f"--run_dir={tmp_path / 'predict'}"]
    done = astbench("predict", *options)
    assert done.code == 0, done.err
    answer = json.loads((tmp_path / "predict" / RECORD).read_text())["answer"]
    assert f"{answer['confidence']:.3f}; then {next(iter(answer['others']))}" in done.out
    assert 0.2 <= answer["confidence"] <= 1 and len(answer["others"]) == 2
    assert "red.png has 50 x 40 pixels: its middle square" in done.out


def test_it_is_not_pushed(astbench, trained):
    refused(astbench("push", trained, "owner/name"), 2, "transformers knows only beside astbench")


def test_predict_looks_at_the_middle_square(tmp_path):
    image = Image.new("RGB", (64, 32), (250, 0, 0))
    image.paste((0, 0, 250), (16, 0, 48, 32))
    image.save(tmp_path / "wide.png")
    colours = ImageData(file=str(tmp_path / "wide.png"))._asked().pixels.unique(dim=2).unique(dim=3)
    assert colours.flatten().tolist() == [0, 0, 250]


def test_predict_refuses_what_is_no_picture(astbench, trained, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for file, code, part in (
        ("", 2, "predict needs --data.file=IMAGE"),
        ("/no/where.png", 3, "--data.file=/no/where.png does not exist"),
        (tmp_path, 3, "is not a file, it is a folder"),
        (tmp_path / "text.png", 3, "text.png cannot be read as an image"),
    ):
        done = astbench("predict", f"--ckpt_path={trained}", f"--data.file={file}", f"--run_dir={tmp_path / 'no'}")
        refused(done, code, part)
    refused(astbench("predict", "--attention=ast", "--task=images", "--data.file=a.png"), 2, "needs trained weights")


def test_a_killed_run_ends_bitwise_the_same(run, tmp_path):
    """Augmented pictures and stochastic depth over two epochs, killed in the second."""
    words = ["fit", "--attention=dense", *DEMO, "--data.augment=true", "--trainer.max_steps=6", "--checkpoint_every=2"]
    assert run([*words, f"--run_dir={tmp_path / 'whole'}"])[0] == 0
    code, said = run([*words, f"--run_dir={tmp_path / 'run'}"], ("on_train_batch_start", 5, signal.SIGKILL))
    assert code == -signal.SIGKILL, said
    code, said = run(["fit", f"--resume={tmp_path / 'run'}"])
    assert code == 0, said
    ours, theirs = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(theirs)
    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


def test_folders_of_images_fit(astbench, tmp_path):
    for split in ("train", "test"):
        for number, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for shade in (0, 1):
                Image.new("RGB", (32, 32), (20 * number, 80, 100 * shade)).save(
                    tmp_path / split / name / f"{shade}.jpg"
                )
    words = ["fit", "--attention=local", *SHORT, "--data.source=local", f"--data.path={tmp_path}"]
    done = astbench(*words, "--data.image_size=24", f"--run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["data"]["examples"] == {"train": 18, "validation": 2} and JPEG_NOTE in record["notes"]
    assert record["data"]["length"] == 36 and record["data"]["augmented"] is True
    assert "CIFAR-10, accuracy (%), 24 x 24 pixels" in record["signature"]
    # Classes of another source: its weights would mean something else.
    again = astbench("test", f"--ckpt_path={tmp_path / 'run'}", "--data.source=demo", "--data.path=")
    refused(again, 6, "model.classifier.bias is (10,), and not (5,)")


PUBLISHED = ["backend=reformer_pytorch", "allow_duplicate_attention=true", "bucket_size=64"]


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--data.image_size=7"], 2, "--data.image_size must be 8 to 512 pixels, got 7"),
        (["--data.demo_train=0"], 2, "--data.demo_train must be at least 1"),
        (["--data.path=/tmp"], 2, "is read with --data.source=local only"),
        (["--data.source=local"], 3, "--data.source=local needs --data.path="),
        (["--data.source=local", "--data.path=/no/where"], 3, "--data.path=/no/where does not exist"),
        (["--data.source=local", "--data.path=/etc/hostname"], 3, "is no .tar.gz"),
        (["--task.label_smoothing=1"], 2, "--task.label_smoothing must be at least 0 and below 1"),
        (
            ["--backbone=bert-tiny"],
            2,
            "task images has no text: --backbone takes a preset for pictures (cct-2/3x2, cct",
        ),
        (["--backbone.max_positions=512"], 2, "--data.image_size says how many tokens a picture has"),
        (["--attention=minference"], 2, "bidirectional"),
        (
            ["--attention=reformer", *(f"--attention.{o}" for o in PUBLISHED)],
            2,
            "multiples of 128 tokens, --data.image_size=32 with --backbone.name=tiny is 64",
        ),
        (["--attention=linformer", "--attention.max_length=60"], 2, "at most 60 tokens, --data.image_size=32"),
    ],
)
def test_bad_options(astbench, tmp_path, options, code, part):
    attention = [] if options[0].startswith("--attention=") else ["--attention=dense"]
    done = astbench("fit", *attention, *DEMO, *options, f"--run_dir={tmp_path / 'run'}")
    refused(done, code, part)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_model_of_pictures(astbench, tmp_path):
    names = dict(enumerate(("disc", "square", "triangle", "cross", "ring")))
    small = {"hidden_size": 16, "intermediate_size": 16}
    CCTForImageClassification(CCTConfig(**small, id2label=names)).save_pretrained(tmp_path / "cct")
    CCTForImageClassification(CCTConfig(**small, id2label=names, image_size=16)).save_pretrained(tmp_path / "16")
    CCTForImageClassification(CCTConfig(**small, num_labels=5)).save_pretrained(tmp_path / "nameless")
    vit = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    ViTForImageClassification(ViTConfig(**small, **vit, id2label=names)).save_pretrained(tmp_path / "vit")
    for folder, part in (
        ("cct", ""),
        ("16", "is for pictures of 16 pixels: set --data.image_size=16"),
        ("nameless", "knows other classes than --data.source=demo: LABEL_0, LABEL_1, LABEL_2, LABEL_3, ..."),
        ("vit", "or a folder with a CCT; "),
    ):
        words = ["--attention=dense", *DEMO, f"--backbone={tmp_path / folder}", f"--run_dir={tmp_path / 'run'}"]
        done = astbench("fit", *words)
        if not part:
            assert done.code == 0, done.err
            shutil.rmtree(tmp_path / "run")
        else:
            assert done.code == 2 and part in done.err.splitlines()[-1], done.err

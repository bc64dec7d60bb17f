"""Long Range Arena: generators by other means, readers on good and on bad files, each task through the command line."""

import gzip
import json
import os
import random
import re
import statistics
import struct
import zlib

import pytest
import torch
from PIL import Image

from astbench.runs.folder import RECORD
from astbench.tasks.cifar import CLASSES as CIFAR_CLASSES
from astbench.tasks.cifar import JPEG_NOTE
from astbench.tasks.lra import listops as lra_listops
from astbench.tasks.lra import pathfinder as lra_pathfinder
from astbench.tasks.lra.base_data import FIRST, Padded
from astbench.tasks.lra.data import ImageData, ListOpsData, PathfinderData, RetrievalData, TextData

RECORD_BYTES = 1 + 3 * 1024

# -- ListOps ------------------------------------------------------------------------------------------------------


def by_rewriting(text):
    """An independent evaluator: replace innermost lists until a digit is left."""
    functions = {
        "MIN": min,
        "MAX": max,
        "MED": lambda values: int(statistics.median(values)),
        "SM": lambda values: sum(values) % 10,
    }
    inner = re.compile(r"\[(MIN|MAX|MED|SM)((?: \d)+) \]")
    while not text.isdigit():
        text, times = inner.subn(lambda m: str(functions[m[1]]([int(v) for v in m[2].split()])), text)
        assert times, text
    return int(text)


def depth_of(expression):
    depth = deepest = 0
    for symbol in expression:
        depth += (symbol in lra_listops.OPERATORS) - (symbol == lra_listops.END)
        deepest = max(deepest, depth)
    return deepest


def test_listops_expressions_are_of_the_grammar_and_their_values_right():
    rng, seen = random.Random(0), set()
    for _ in range(60):
        expression = lra_listops.generate(rng, 20, 150)
        assert 20 < len(expression) < 150
        assert depth_of(expression) < 10  # the tenth level holds digits only
        for arguments in arguments_of(expression):
            assert 2 <= arguments <= 10
        assert lra_listops.evaluate(expression) == by_rewriting(" ".join(expression))
        seen |= set(expression)
    assert seen == set(lra_listops.SYMBOLS)


def arguments_of(expression):
    counts, open_lists = [], []
    for symbol in expression:
        if symbol == lra_listops.END:
            counts.append(open_lists.pop())
        if open_lists and symbol not in lra_listops.OPERATORS:
            open_lists[-1] += 1
        if symbol in lra_listops.OPERATORS:
            open_lists.append(0)
    return counts


@pytest.mark.parametrize("text", ["", "[MIN", "[MIN ]", "3 4", "] 3", "[MIN 3 4", "[FIRST 3 4 ]", "[MIN 3 ] ]"])
def test_listops_refuses_what_is_no_expression(text):
    with pytest.raises(ValueError, match=r"whole expression|wrong place"):
        lra_listops.evaluate(text.split())


def test_generated_listops_examples():
    def rows(split, seed=0):
        data = ListOpsData(max_length=60, min_length=15, num_train=12, num_eval=12, data_seed=seed)
        return list(data.rows(split))

    for (ids,), label in rows("train"):
        expression = [lra_listops.SYMBOLS[i] for i in ids]
        assert 15 < len(expression) < 60 and label == by_rewriting(" ".join(expression))
    assert rows("train") == rows("train")
    everything = [row for split in ("train", "validation", "test") for seed in (0, 1) for row in rows(split, seed)]
    assert len(set(everything)) == len(everything)


# -- Pathfinder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, 9])
def test_pathfinder_marks_two_ends_of_one_curve_or_of_two(monkeypatch, length):
    grown, drawn = [], []
    grow, draw = lra_pathfinder._two_contours, lra_pathfinder._draw
    monkeypatch.setattr(lra_pathfinder, "_two_contours", lambda *a: grown.append(grow(*a)) or grown[-1])
    monkeypatch.setattr(lra_pathfinder, "_draw", lambda image, *a: drawn.append(a) or draw(image, *a))
    labels = []
    for seed in range(12):
        drawn.clear()
        image, label = lra_pathfinder.generate(random.Random(seed), length)
        (start, one), (end, two) = (paddle for paddle, radius in drawn if radius == 1.5)
        assert (start, end) == (one, two)  # a disc has no length
        began = [contour.paddles[0][0] for contour in grown[-1]].index(start)
        ended = [contour.paddles[-1][1] for contour in grown[-1]].index(end)
        assert label == (began == ended)
        assert image.shape == (32, 32) and image.dtype == torch.uint8
        for row, column in (start, end):
            assert image[round(row), round(column)] == 255
        for contour in grown[-1]:
            for (row, column), (last_row, last_column) in contour.paddles:
                assert image[round((row + last_row) / 2), round((column + last_column) / 2)] > 0
        labels.append(label)
    assert {0, 1} == set(labels)


def test_pathfinder_contours_keep_apart_and_inside():
    for seed in range(5):
        rng, contours = random.Random(seed), None
        while contours is None:
            contours = lra_pathfinder._two_contours(rng, 9)
        points = [[p for paddle in c.paddles for p in paddle] for c in contours]
        assert [len(c.paddles) for c in contours] == [9, 9]
        assert all(1 <= x <= 30 for part in points for point in part for x in point)
        start = [c.paddles[0][0] for c in contours]
        apart = ((start[0][0] - start[1][0]) ** 2 + (start[0][1] - start[1][1]) ** 2) ** 0.5
        assert apart == pytest.approx(7)
        nearest = min(((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in points[0] for c, d in points[1])
        assert nearest > 0.5
        for contour in contours:
            for one, two in zip(contour.paddles, contour.paddles[1:], strict=False):
                gap = ((one[1][0] - two[0][0]) ** 2 + (one[1][1] - two[0][1]) ** 2) ** 0.5
                assert 0.5 < gap < 3.5  # the dash is broken, and goes on


def test_pathfinder_is_determined_by_its_seed():
    one, two, other = (lra_pathfinder.generate(random.Random(seed), 6) for seed in (5, 5, 6))
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert not torch.equal(one[0], other[0])


# -- files in the published forms ------------------------------------------------------------------------------------


def listops_files(folder):
    rows = [("( ( ( [MAX 2 ) 9 ) ] )", 9), ("( ( ( ( [SM 4 ) 8 ) ( ( ( [MED 3 ) 6 ) ] ) ) ] )", 6), ("7", 7)]
    text = "Source\tTarget\n" + "".join(f"{source}\t{target}\r\n" for source, target in rows)
    for name in ("train", "val", "test"):
        (folder / f"basic_{name}.tsv").write_text(text)


def aan_files(folder):
    rows = ['1.0\ta1\tb1\tA first paper "quoted\tand its pair é', "0\ta2\tb2\tshort\tlonger than the other text"]
    for name in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{name}.tsv").write_text("\n".join(rows * 3) + "\n", encoding="utf-8")


def imdb_files(folder, count=10):
    for split in ("train", "test"):
        for name in ("neg", "pos"):
            (folder / "aclImdb" / split / name).mkdir(parents=True)
            for number in range(count):
                text = f"{split} {name} number {number} é " + "x" * number
                (folder / "aclImdb" / split / name / f"{number}_{number % 10}.txt").write_text(text, encoding="utf-8")


def cifar_files(folder, count=4):
    draw = torch.Generator().manual_seed(0)
    (folder / "cifar-10-batches-bin").mkdir()
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        data = torch.randint(256, (count, RECORD_BYTES), generator=draw, dtype=torch.uint8)
        data[:, 0] = torch.arange(count)
        (folder / "cifar-10-batches-bin" / name).write_bytes(bytes(data.flatten().tolist()))


def pathfinder_files(folder):
    top = folder / "pathfinder32" / "curv_contour_length_14"
    (top / "metadata").mkdir(parents=True)
    for batch in (0, 1):
        (top / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for number in range(5):
            file = top / "imgs" / str(batch) / f"sample_{number}.png"
            Image.new("L", (32, 32), 10 * batch + number).save(file)
            lines.append(f"imgs/{batch} sample_{number}.png {number} {number % 2} 1.0 14 4 2 0.5 1 1\n")
        (top / "metadata" / f"{batch}.npy").write_text("".join(lines))


FILES = {
    "lra_listops": listops_files,
    "lra_text": imdb_files,
    "lra_retrieval": aan_files,
    "lra_image": cifar_files,
    "lra_pathfinder": pathfinder_files,
}


def test_listops_files(tmp_path):
    listops_files(tmp_path)
    rows = ListOpsData("local", str(tmp_path)).rows("validation")
    texts = [" ".join(lra_listops.SYMBOLS[i] for i in ids) for (ids,), _ in rows]
    assert texts == ["[MAX 2 9 ]", "[SM 4 8 [MED 3 6 ] ]", "7"]
    assert [label for _, label in rows] == [by_rewriting(text) for text in texts]
    packed = tmp_path / "basic_train.tsv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "basic_train.tsv").read_bytes()))
    (tmp_path / "basic_train.tsv").unlink()
    assert ListOpsData("local", str(tmp_path), max_length=3, min_length=1).rows("train") == [
        ((ids[:3],), label) for (ids,), label in rows
    ]


def test_aan_files(tmp_path):
    aan_files(tmp_path)
    rows = RetrievalData(path=str(tmp_path), max_length=21).rows("validation")
    assert rows[:2] == [
        ((b'A first paper "quoted', "and its pair é".encode()), 1),
        ((b"short", b"longer than the other"), 0),
    ]


def test_imdb_files(tmp_path):
    imdb_files(tmp_path, count=20)
    data = TextData(path=str(tmp_path), max_length=30)
    train, held, test = (data.rows(split) for split in ("train", "validation", "test"))
    assert [label for _, label in train] == [0, 1] * 18 and [label for _, label in held] == [0, 1] * 2
    assert len(test) == 40 and not set(train) & set(held)
    assert all(len(text) <= 30 and text.startswith(b"train") for (text,), _ in train)
    assert train[0] == (("train neg number 0 é ".encode(),), 0)


def test_cifar_binary_is_grey_by_the_usual_weights(tmp_path):
    cifar_files(tmp_path)
    data = ImageData(path=str(tmp_path))
    train, held, test = (data.rows(split) for split in ("train", "validation", "test"))
    assert (len(train), len(held), len(test)) == (18, 2, 4) and data.notes == []
    raw = (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").read_bytes()[RECORD_BYTES : 2 * RECORD_BYTES]
    red, green, blue = (raw[1 + 1024 * n : 1025 + 1024 * n] for n in range(3))
    (grey,), label = train[1]
    assert label == raw[0] == 1 and len(grey) == 1024
    for place in (0, 31, 32, 1023):
        exact = 0.2989 * red[place] + 0.587 * green[place] + 0.114 * blue[place]
        assert abs(grey[place] - exact) <= 0.5 + 1e-3


def image_folders(folder, ending):
    for split in ("train", "test"):
        for number, name in enumerate(CIFAR_CLASSES):
            (folder / split / name).mkdir(parents=True)
            for shade in (0, 1):
                Image.new("RGB", (32, 32), (20 * number, 20 * number, 100 * shade)).save(
                    folder / split / name / f"{shade}.{ending}"
                )


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_cifar_folders_say_where_they_lost_detail(tmp_path, ending):
    image_folders(tmp_path, ending)
    data = ImageData(path=str(tmp_path))
    rows = data.rows("test")
    assert [label for _, label in rows] == [*range(10)] * 2
    assert data.notes == ([JPEG_NOTE] if ending == "jpg" else [])
    exact = 0.2989 * 60 + 0.587 * 60 + 0.114 * 100
    assert abs(rows[13][0][0][500] - exact) < (0.6 if ending == "png" else 4)


def test_pathfinder_files(tmp_path):
    pathfinder_files(tmp_path)
    data = PathfinderData("local", str(tmp_path))
    train, held, test = (data.rows(split) for split in ("train", "validation", "test"))
    assert [(image[0], label) for (image,), label in (*train, *held, *test)] == [
        (10 * batch + number, number % 2) for batch in (0, 1) for number in range(5)
    ]
    assert (len(train), len(held), len(test)) == (8, 1, 1)


def test_padding_is_marked_and_pairs_lie_below_one_another():
    rows = [
        {"index": 4, "label": 1, "input_ids": [torch.arange(2, 5), torch.arange(7, 9)]},
        {"index": 9, "label": 0, "input_ids": [torch.arange(2, 4), torch.arange(5, 10)]},
    ]
    batch = Padded()(rows)
    assert batch["input_ids"].tolist() == [[2, 3, 4, 0, 0], [2, 3, 0, 0, 0], [7, 8, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[i < n for i in range(5)] for n in (3, 2, 2, 5)]
    assert batch["label"].tolist() == [1, 0] and batch["index"].tolist() == [4, 9]


# -- through the command line ----------------------------------------------------------------------------------------

SHORT = ["--attention=dense", "--backbone=lra", "--data.batch_size=4", "--data.eval_batch_size=3"]
SHORT += ["--trainer.max_steps=1", "--data.max_length=48", "--data.max_eval=4"]


@pytest.mark.parametrize(
    ("task", "pooling"), [*((task, "mean") for task in FILES), ("lra_text", "cls"), ("lra_image", "cls")]
)
def test_each_task_fits_on_its_files(astbench, tmp_path, task, pooling):
    FILES[task](tmp_path)
    options = ["--data.min_length=5"] if task == "lra_listops" else []
    words = ["fit", f"--task={task}", *SHORT, "--data.source=local", f"--data.path={tmp_path}", *options]
    done = astbench(*words, f"--task.pooling={pooling}", f"--run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    items = json.loads((tmp_path / "run" / "items.json").read_text())
    assert record["metrics"]["accuracy"] == pytest.approx(
        100 * sum(row["guess"] == row["label"] for row in items.values()) / len(items)
    )
    assert record["data"]["length"] == 48 and f"{pooling} pooling" in record["signature"]
    again = astbench("test", f"--ckpt_path={tmp_path / 'run'}", f"--run_dir={tmp_path / 'again'}")
    assert again.code == 0, again.err


@pytest.mark.parametrize("task", ["lra_listops", "lra_pathfinder"])
def test_generated_tasks_fit(astbench, tmp_path, task):
    options = ["--data.min_length=5"] if task == "lra_listops" else ["--data.difficulty=easy"]
    words = ["fit", f"--task={task}", *SHORT, *options, "--data.num_train=9", "--data.num_eval=5"]
    done = astbench(*words, f"--run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "run" / RECORD).read_text())["data"]
    assert data["source"] == "generated" and data["examples"] == {"train": 9, "validation": 4}


def test_the_class_does_not_depend_on_padding(astbench, tmp_path):
    """The same reviews, one to a batch and all in one: the same guesses."""
    imdb_files(tmp_path)
    words = ["fit", "--task=lra_text", *SHORT[:4], "--trainer.max_steps=3", f"--data.path={tmp_path}"]
    done = astbench(*words, "--data.max_length=64", f"--run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    found = []
    for size in (1, 20):
        words = ["test", f"--ckpt_path={tmp_path / 'run'}", f"--data.eval_batch_size={size}"]
        assert astbench(*words, f"--run_dir={tmp_path / str(size)}").code == 0
        found.append(json.loads((tmp_path / str(size) / "items.json").read_text()))
    assert found[0] == found[1] and len(found[0]) == 20


def damage(folder, task, how):
    """Make the training table wrong; part of the message expected."""
    file = folder / {"lra_listops": "basic_train.tsv", "lra_retrieval": "new_aan_pairs.train.tsv"}[task]
    text = file.read_bytes()
    data, part = {
        ("lra_listops", "ragged"): (text.replace(b"[MAX 2", b"[MAX\t2", 1), ":2: expected 2 columns, got 3"),
        ("lra_listops", "label"): (text.replace(b"\t9", b"\t19", 1), ":2: the target must be a digit, got '19'"),
        ("lra_listops", "symbol"): (text.replace(b"[SM", b"[ABS", 1), ":3: unknown symbol '[ABS'"),
        ("lra_listops", "encoding"): (text.replace(b"7\t", b"\xff\t", 1), ":4 is not UTF-8"),
        ("lra_listops", "empty"): (b"Source\tTarget\n", "the train split of source local is empty"),
        ("lra_retrieval", "ragged"): (text + b"1\ta\tb\n", ":7: expected 5 columns, got 3"),
        ("lra_retrieval", "label"): (text.replace(b"1.0", b"2.0", 1), ":1: the label must be 0 or 1, got '2.0'"),
        ("lra_retrieval", "encoding"): (text.replace(b"short", b"\xfe\xff", 1), ":2 is not UTF-8"),
        ("lra_retrieval", "empty"): (text.replace(b"short", b"", 1), ":2: one of the two texts is empty"),
    }[task, how]
    assert data != text
    file.write_bytes(data)
    return part


@pytest.mark.parametrize(
    ("task", "how"),
    [
        *(("lra_listops", how) for how in ("ragged", "label", "symbol", "encoding", "empty")),
        *(("lra_retrieval", how) for how in ("ragged", "label", "encoding", "empty")),
    ],
)
def test_bad_tables(astbench, tmp_path, task, how):
    FILES[task](tmp_path)
    assert_refused(astbench, tmp_path, task, damage(tmp_path, task, how))


def assert_refused(astbench, folder, task, *parts, code=3, options=()):
    low = ["--data.min_length=5"] if task == "lra_listops" else []
    words = ["fit", f"--task={task}", *SHORT, "--data.source=local", f"--data.path={folder}", *low, *options]
    done = astbench(*words, f"--run_dir={folder / 'run'}")
    assert len(done.err.splitlines()) == 1 and done.err.startswith("astbench: error: "), done.err
    for part in parts:
        assert part in done.err
    assert done.code == code and "unexpected" not in done.err
    assert not (folder / "run").exists()


def test_a_truncated_gzip(astbench, tmp_path):
    listops_files(tmp_path)
    file = tmp_path / "basic_train.tsv"
    (tmp_path / "basic_train.tsv.gz").write_bytes(gzip.compress(file.read_bytes() * 50)[:-30])
    assert_refused(astbench, tmp_path, "lra_listops", "must hold one basic_*train", "found 2")
    file.unlink()
    assert_refused(astbench, tmp_path, "lra_listops", "basic_train.tsv.gz:", "the gzip file is cut short")


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (lambda top: (top / "train/pos/3_3.txt").write_bytes(b"caf\xe9 noir"), "3_3.txt cannot be read as UTF-8 text"),
        (lambda top: (top / "train/neg/0_0.txt").write_text(" \n"), "0_0.txt is empty"),
        (lambda top: (top / "train/pos").rename(top / "train/good"), "train/pos holds no *.txt"),
    ],
    ids=["encoding", "empty", "no-class"],
)
def test_bad_reviews(astbench, tmp_path, wrong, part):
    imdb_files(tmp_path)
    wrong(tmp_path / "aclImdb")
    assert_refused(astbench, tmp_path, "lra_text", part)


def test_bad_images(astbench, tmp_path):
    cifar_files(tmp_path)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert_refused(astbench, tmp_path, "lra_image", f"data_batch_4.bin holds {len(whole) - 1} bytes, expected a multi")
    file.write_bytes(whole[: 2 * RECORD_BYTES] + b"\x0a" + whole[2 * RECORD_BYTES + 1 :])
    assert_refused(astbench, tmp_path, "lra_image", "data_batch_4.bin: image 3 has the label 10, expected 0 to 9")
    file.unlink()
    assert_refused(astbench, tmp_path, "lra_image", "data_batch_4.bin cannot be read")


def huge_png(side):
    """The beginning of a grey picture."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    check = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + check + struct.pack(">I", 9) + b"IDAT"


def test_bad_image_folders(astbench, tmp_path):
    image_folders(tmp_path, "png")
    file = tmp_path / "train" / "deer" / "1.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert_refused(astbench, tmp_path, "lra_image", "deer/1.png cannot be read as an image")
    file.write_text("no image")
    assert_refused(astbench, tmp_path, "lra_image", "deer/1.png cannot be read as an image")
    Image.new("RGB", (32, 31)).save(file)
    assert_refused(astbench, tmp_path, "lra_image", "deer/1.png is 32 x 31 pixels, expected 32 x 32")
    file.write_bytes(huge_png(13_000))  # half a gigabyte of pixels
    assert_refused(astbench, tmp_path, "lra_image", "deer/1.png is 13000 x 13000 pixels, expected 32 x 32")
    file.unlink()
    os.mkfifo(file)
    assert_refused(astbench, tmp_path, "lra_image", "deer/1.png is no file")


def test_pickles_of_something_else_are_refused(astbench, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    # Were it run, it would make a file.
    evil = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "owned").encode()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(evil)
    for number in range(2, 6):
        (tmp_path / "cifar-10-batches-py" / f"data_batch_{number}").write_bytes(evil)
    assert_refused(astbench, tmp_path, "lra_image", "data_batch_1 is no batch", "it names os.system")
    assert not (tmp_path / "owned").exists()


def test_bad_pathfinder_files(astbench, tmp_path):
    pathfinder_files(tmp_path)
    file = tmp_path / "pathfinder32" / "curv_contour_length_14" / "metadata" / "0.npy"
    whole = file.read_text()
    for wrong, part in (
        (whole.replace("sample_2.png 2 0", "sample_2.png 2 3"), "0.npy:3: expected folder, image"),
        (whole.replace("sample_2.png", "../../../../secret.png"), "0.npy:3: image"),
        (whole.replace("sample_2.png", "a" * 5000 + ".png"), "0.npy:3: image"),
        (whole.replace("sample_2.png", "a\0.png"), "0.npy:3 holds a NUL character"),
        ("\x80NUMPY", "0.npy:1: expected folder, image, number and label"),
    ):
        file.write_text(wrong)
        assert_refused(astbench, tmp_path, "lra_pathfinder", part)
    file.write_bytes(b"\x93NUMPY\x01")
    assert_refused(astbench, tmp_path, "lra_pathfinder", "0.npy cannot be read as UTF-8 text")


@pytest.mark.parametrize("task", FILES)
def test_missing_files(astbench, tmp_path, task):
    assert_refused(astbench, tmp_path, task, str(tmp_path))
    assert_refused(astbench, tmp_path, task, "/no/where is not a folder", options=["--data.path=/no/where"])
    assert_refused(astbench, tmp_path, task, "needs --data.path=FOLDER", options=["--data.path="])


@pytest.mark.parametrize(
    ("task", "option", "part"),
    [
        ("lra_text", "--data.max_length=0", "--data.max_length must be at least 1 token"),
        ("lra_image", "--data.max_length=1025", "--data.max_length must be at most 1024 pixels, got 1025"),
        ("lra_listops", "--data.min_length=40", "--data.min_length must be at most half of max_length=48"),
        ("lra_pathfinder", "--data.source=generated", "is read with --data.source=local only"),
        ("lra_text", "--task.pooling=max", "--task.pooling must be one of"),
        ("lra_text", "--backbone=/tmp", "task lra_text trains from scratch"),
    ],
)
def test_bad_options(astbench, tmp_path, task, option, part):
    FILES[task](tmp_path)
    assert_refused(astbench, tmp_path, task, part, code=2, options=[option])


def test_a_token_more_than_the_backbone_or_the_attention_takes(astbench, tmp_path):
    imdb_files(tmp_path)
    table = ["--backbone=bert-lra", "--data.max_length=1024", "--task.pooling=cls"]
    assert_refused(astbench, tmp_path, "lra_text", "=1025 tokens is longer", code=2, options=table)
    short = ["--attention=linformer", "--attention.max_length=48", "--task.pooling=cls"]
    assert_refused(astbench, tmp_path, "lra_text", "takes at most 48 tokens", "is 49", code=2, options=short)


def test_values_come_after_the_special_tokens():
    data = TextData()
    assert data.vocabulary().convert_ids_to_tokens([0, 1, FIRST, FIRST + 255]) == ["[PAD]", "[CLS]", "0", "255"]

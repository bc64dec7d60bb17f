"""CIFAR-10's files: the same pictures from each form, and what is refused of damaged and hostile ones."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from astbench.errors import DataError
from astbench.tasks.cifar import BINARY, CLASSES, PICKLED, RECORD, read_cifar
from astbench.tasks.cifar_pickle import read_pickle

COUNT = 10
NAMES = {BINARY: [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]}
NAMES[PICKLED] = [name.removesuffix(".bin") for name in NAMES[BINARY]]


def drawn(number):
    """Pixels `(10, 3, 32, 32)` and labels of a batch file."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(256, (COUNT, 3, 32, 32), generator=generator, dtype=torch.uint8), list(range(COUNT))


def binary(pixels, labels):
    return b"".join(bytes([label]) + picture.numpy().tobytes() for picture, label in zip(pixels, labels, strict=True))


def old_pickle(content, labels, rows=None):
    """As Python 2 wrote the published files: protocol 2, byte strings, numpy's names of then."""
    rows = len(labels) if rows is None else rows
    size = len(content).to_bytes(4, "little")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K" + bytes([rows]) + b"M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + size + content + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"U\x0bbatch_labelU\x01xu."


def content_of(version, number):
    pixels, labels = drawn(number)
    return binary(pixels, labels) if version == BINARY else old_pickle(pixels.numpy().tobytes(), labels)


@pytest.fixture(params=[f"{kind} {version}" for kind in ("folder", "inside", "archive") for version in NAMES])
def files(request, tmp_path):
    """The six files of a version: in the folder that is named, in one inside it, or in an archive."""
    kind, version = request.param.split()
    folder = tmp_path / version
    folder.mkdir()
    for number, name in enumerate(NAMES[version]):
        (folder / name).write_bytes(content_of(version, number))
    (folder / "batches.meta.txt").write_text("airplane\n")
    if kind != "archive":
        return folder if kind == "folder" else tmp_path
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(folder, version)
    return tmp_path / "cifar.tar.gz"


def test_every_form_gives_the_same_pictures(files):
    pixels, labels = read_cifar(files, "train")
    assert torch.equal(pixels, torch.cat([drawn(number)[0] for number in range(5)]))
    assert labels == [*range(COUNT)] * 5
    pixels, labels = read_cifar(files, "test")
    assert torch.equal(pixels, drawn(5)[0]) and labels == [*range(COUNT)]


def test_folders_of_images(tmp_path):
    pixels, labels = drawn(0)
    for number, name in enumerate(CLASSES):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(pixels[number].permute(1, 2, 0).numpy()).save(tmp_path / "test" / name / "a.png")
    got, numbers = read_cifar(tmp_path, "test")
    assert torch.equal(got, pixels) and numbers == labels
    Image.new("L", (32, 32), 77).save(tmp_path / "test" / "deer" / "a.png")  # grey: all colours alike
    assert read_cifar(tmp_path, "test")[0][4].unique().tolist() == [77]


def test_todays_pickles_are_read_too():
    pixels, labels = drawn(3)
    array = pixels.flatten(1).numpy()
    for batch in ({"data": array, "labels": labels}, {b"labels": labels, b"data": array}):
        got, numbers = read_pickle(pickle.dumps(batch, protocol=2), "file")
        assert torch.equal(got, pixels.flatten(1)) and numbers == labels


class Evil:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("where", ["alone", "as labels", "as pixels"])
def test_nothing_that_a_pickle_names_is_run(tmp_path, where):
    trace = tmp_path / "trace"
    pixels, labels = drawn(0)
    batch = {"data": pixels.flatten(1).numpy(), "labels": labels}
    evil = {
        "alone": Evil(trace),
        "as labels": {**batch, "labels": Evil(trace)},
        "as pixels": {**batch, "data": Evil(trace)},
    }
    data = pickle.dumps(evil[where], protocol=2)
    with pytest.raises(DataError, match=r"file is no batch of CIFAR-10 for Python: it names posix\.mkdir"):
        read_pickle(data, "file")
    assert not trace.exists()
    pickle.loads(data)
    assert trace.exists()  # so it would have run


ROWS = drawn(0)[0].numpy().tobytes()


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "no batch of CIFAR-10 for Python"),
        (old_pickle(ROWS, range(COUNT))[:-2], "no batch of CIFAR-10 for Python"),
        (pickle.dumps([1, 2]), "it holds no dictionary"),
        (pickle.dumps({"labels": [1]}), "its 'data' is no array"),
        (pickle.dumps({"data": b"abc", "labels": [1]}), "its 'data' is no array"),
        (old_pickle(ROWS, [3]), "expected 1 images of 3072 bytes"),
        (old_pickle(ROWS[:-1], range(COUNT)), "expected 10 images"),
        (old_pickle(b"", []), "expected 0 images"),
        (pickle.dumps({"data": np.zeros((2, 3072), "f4"), "labels": [1, 2]}, protocol=2), "expected 2 images"),
        (
            pickle.dumps({"data": np.asfortranarray(np.zeros((2, 3072), "u1")), "labels": [1, 2]}, 2),
            "expected 2 images",
        ),
        (pickle.dumps({"data": np.zeros((3072, 2), "u1"), "labels": [1, 2]}, protocol=2), "an array of (3072, 2)"),
        # Makes room for four thousand million objects.
        (b"\x80\x02}r\xff\xff\xff\xff.", "it numbers more objects than it can hold"),
        (old_pickle(ROWS, range(COUNT)).replace(b"ndarray", b"memmap", 1), "it names numpy.memmap"),
    ],
)
def test_damaged_and_other_pickles(data, part):
    with pytest.raises(DataError) as caught:
        read_pickle(data, "file")
    assert part in str(caught.value) and "\n" not in str(caught.value)


def packed(members, mode="w:gz"):
    """An archive of names and contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


GOOD = [(f"{BINARY}/{name}", content_of(BINARY, n)) for n, name in enumerate(NAMES[BINARY])]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"no archive", "cannot be unpacked"),
        (packed(GOOD)[:-200], "cut short or damaged"),
        (packed([]), "is not one of CIFAR-10's archives"),
        (packed(GOOD[1:]), f"holds no {BINARY}/data_batch_1.bin"),
        (packed([("elsewhere/data_batch_1.bin", b"")]), f"holds no {BINARY}/data_batch_1.bin"),
        (packed([(GOOD[0][0], GOOD[0][1][:-1])]), f"bytes, expected a multiple of {RECORD}"),
        (packed([(GOOD[0][0], b"\x0b" + bytes(RECORD - 1))]), "image 1 has the label 11, expected 0 to 9"),
    ],
)
def test_damaged_archives(tmp_path, data, part):
    file = tmp_path / "cifar.tar.gz"
    file.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_cifar(file, "train")
    assert part in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_an_archive_writes_nothing(tmp_path):
    file = tmp_path / "folder" / "cifar.tar.gz"
    file.parent.mkdir()
    file.write_bytes(packed([("../../out/data_batch_1.bin", b"x"), *GOOD]))
    read_cifar(file, "test")
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["folder", "cifar.tar.gz"]


def test_a_folder_without_any_of_it(tmp_path):
    with pytest.raises(DataError, match=r"holds none of data_batch_1\.bin, data_batch_1 and train/airplane/"):
        read_cifar(tmp_path, "train")

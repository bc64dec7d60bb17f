"""`astbench analyze`, on real runs of a tiny model."""

import json
import math

import pytest
from PIL import Image

from tests.astbench.cli.commands import FIT


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed") / "run"
    code, said = run([*FIT, f"--run_dir={folder}"])
    assert code == 0, said
    return folder


def test_a_run_is_analysed(astbench, trained, tmp_path):
    folder = tmp_path / "out"
    done = astbench("analyze", f"--ckpt_path={trained}", "--rows=16", "--batches", "1", f"--run_dir={folder}")
    assert done.code == 0, done.err
    assert " sequences, means over queries" in done.out and "best choice of as many blocks" in done.out
    found = json.loads((folder / "analysis.json").read_text())
    record = json.loads((folder / "record.json").read_text())
    assert 0 < found["queries"] <= 16 * found["sequences"]
    assert record["state"] == "done" and record["analysis"]["batches"] == 1 and record["metrics"]
    assert len(found["layers"]) == 3
    for layer in found["layers"].values():
        assert len(layer["kept"]) == 2
        for kept, mass, best, bits in zip(*(layer[n] for n in ("kept", "mass", "best", "bits")), strict=True):
            assert 0 < kept <= 1 and 0 < mass <= best + 1e-6 <= 1 + 2e-6 and 0 <= bits <= math.log2(128)
        assert all(0 < layer[f"overlap_of_{what}"] <= 1 for what in ("heads", "neighbours"))
    assert "overlap_of_layers" in list(found["layers"].values())[1]
    shares = [sum(facts["share"] for facts in classes.values()) for classes in found["by_token"].values()]
    assert shares == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)
    assert sum(found["mass_by_distance"]) == pytest.approx(1.0, abs=1e-4)
    for name in record["analysis"]["pictures"]:
        assert (folder / name).stat().st_size > 1000
        if name.endswith(".png"):
            assert len(Image.open(folder / name).convert("L").getcolors(256)) > 5, f"{name} is blank"


@pytest.mark.slow
def test_of_a_translation_distances_are_the_encoders(astbench, run, tmp_path):
    """Cross-attention has no distance, and a decoder reads other tokens; its layers are listed all the same."""
    words = ["--attention=ast", "--task=wmt14", "--trainer.max_steps=2", "--data.batch_size=4", "--data.max_eval=8"]
    code, said = run(["fit", *words, f"--run_dir={tmp_path / 'run'}"])
    assert code == 0, said
    done = astbench("analyze", f"--ckpt_path={tmp_path / 'run'}", "--batches=1", f"--run_dir={tmp_path / 'out'}")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    kinds = {path.split(".")[-1] for path in found["layers"]}
    assert {"encoder_attn", "self_attn"} <= kinds and any("decoder" in path for path in found["layers"])
    assert found["kept_by_distance"][0] == 1.0, "a token's own block is always kept"
    assert sum(found["mass_by_distance"]) == pytest.approx(1.0, abs=1e-4)
    decoder = [layer for path, layer in found["layers"].items() if path.endswith("self_attn") and "decoder" in path]
    assert all("overlap_of_layers" in layer for layer in decoder[1:])


def test_the_share_kept_is_the_density(astbench, trained, tmp_path):
    """Of every row, of the same sequences: what the record calls density, counted another way."""
    folder = tmp_path / "out"
    done = astbench("analyze", f"--ckpt_path={trained}", "--rows=500", "--batches=50", f"--run_dir={folder}")
    assert done.code == 0, done.err
    found, record = (json.loads((folder / name).read_text()) for name in ("analysis.json", "record.json"))
    kept = {path: layer["kept"] for path, layer in found["layers"].items()}
    density = record["density"]["layers"]
    assert kept.keys() == density.keys()
    for path, heads in density.items():  # a mean over rows there, over pairs here: rows of a sequence see as much
        assert kept[path] == pytest.approx(heads, rel=0.15)


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--rows=0"], 2, "--rows must be a whole number of at least 1, got 0"),
        (["--batches"], 2, "--batches must be a whole number of at least 1, got nothing"),
        (["--batches=two"], 2, "got two"),
        (["--attention=dense", "--task=triviaqa"], 2, "--attention=dense chooses no blocks"),
        (["--attention=ast", "--task=triviaqa"], 2, "needs trained weights"),
        (["--attention=ast"], 2, "--task=NAME is required"),
        (["--ckpt_path=nowhere"], 6, "--ckpt_path=nowhere does not exist"),
    ],
)
def test_refusals(astbench, tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    done = astbench("analyze", *words)
    assert done.code == code and message in done.err and done.err.count("\n") == 1


def test_help(astbench):
    assert "usage: astbench analyze" in astbench("analyze", "--help").out

"""`fit --keep_every` and `analyze --drift`."""

import json
import shutil
from itertools import pairwise

import pytest
import torch

from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import LAST, MANIFEST, RunFolder, checkpoint_file
from tests.astbench.cli.commands import FIT


@pytest.fixture(scope="module")
def kept(run, tmp_path_factory):
    """A run of three steps whose weights were all kept."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    code, said = run([*FIT, "--keep_every=1", "--optim.lr=0.01", "--checkpoint_every=1", f"--run_dir={folder}"])
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """The same run, of which nothing was kept."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    code, said = run([*FIT, "--optim.lr=0.01", f"--run_dir={folder}"])
    assert code == 0, said
    return folder


def test_weights_of_every_step_stay_whole_and_hold_nothing_else(kept):
    files = RunFolder(kept).kept()
    assert [file.name for file in files] == ["step-0.ckpt", "step-1.ckpt", "step-2.ckpt"]
    manifest = json.loads((kept / MANIFEST).read_text())
    assert {entry["kept"] for entry in manifest.values() if "kept" in entry} == {file.name for file in files}
    for step, file in enumerate(files):
        checkpoint = read_checkpoint(checkpoint_file(file))
        assert checkpoint["global_step"] == step and "optimizer_states" not in checkpoint
    weights = [read_checkpoint(file)["state_dict"] for file in (*files, kept / LAST)]
    name = next(name for name in weights[0] if name.endswith("q_proj.weight"))
    assert not any(torch.equal(a[name], b[name]) for a, b in pairwise(weights))


def test_kept_weights_can_be_evaluated(kept, astbench, tmp_path):
    done = astbench("validate", f"--ckpt_path={kept / 'step-1.ckpt'}", f"--run_dir={tmp_path / 'out'}")
    assert done.code == 0, done.err


def test_keeping_changes_nothing(kept, plain):
    assert not RunFolder(plain).kept()
    ends = [read_checkpoint(folder / LAST)["state_dict"] for folder in (kept, plain)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    hashes = {json.loads((folder / "record.json").read_text())["config_hash"] for folder in (kept, plain)}
    assert len(hashes) == 1, "how often weights are kept decides no result"


def test_a_damaged_file_is_refused(kept, astbench, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "run")
    (folder / "step-1.ckpt").write_bytes((folder / "step-1.ckpt").read_bytes()[:-9])
    done = astbench("analyze", f"--ckpt_path={folder}", "--drift", f"--run_dir={tmp_path / 'out'}")
    assert done.code == 6 and "step-1.ckpt does not match its sha256" in done.err and not (tmp_path / "out").exists()


def test_drift(kept, astbench, tmp_path):
    out = tmp_path / "out"
    done = astbench("analyze", f"--ckpt_path={kept}", "--drift", "--rows=32", f"--run_dir={out}")
    assert done.code == 0, done.err
    found, analysis = (json.loads((out / name).read_text()) for name in ("drift.json", "analysis.json"))
    assert [one["step"] for one in found["checkpoints"]] == [0, 1, 2, 3]
    assert [one["file"] for one in found["checkpoints"]] == ["step-0.ckpt", "step-1.ckpt", "step-2.ckpt", None]
    moved = []
    for path, layer in found["layers"].items():
        assert layer["to_before"][0] is None and layer["to_last"][-1] == [1.0, 1.0]
        assert layer["to_before"][3] == layer["to_last"][2], "the last weights come after those of step 2"
        assert layer["kept"][-1] == pytest.approx(analysis["layers"][path]["kept"], abs=2e-6), "of the model"
        assert layer["mass"][-1] == pytest.approx(analysis["layers"][path]["mass"], abs=2e-6)
        moved += layer["to_last"][0]
    assert 0 < min(moved) < 1, "the choice has changed since the start"


def test_drift_over_named_checkpoints(kept, astbench, tmp_path):
    same = kept / LAST
    words = [f"--ckpt_path={kept}", f"--drift={kept / 'step-2.ckpt'},{same}", f"--run_dir={tmp_path / 'out'}"]
    done = astbench("analyze", *words)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert [one["step"] for one in found["checkpoints"]] == [2, 3, 3]
    assert all(layer["to_before"][2] == [1.0, 1.0] for layer in found["layers"].values())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--drift"], 2, "keeps no weights of earlier steps: train with --keep_every=N"),
        (["--drift=nowhere.ckpt"], 6, "checkpoint nowhere.ckpt does not exist"),
    ],
)
def test_refusals(plain, astbench, words, code, message):
    done = astbench("analyze", f"--ckpt_path={plain}", *words)
    assert done.code == code and message in done.err and done.err.count("\n") == 1


def test_drift_needs_a_run(astbench):
    done = astbench("analyze", "--attention=ast", "--task=wikitext103", "--drift")
    assert done.code == 2 and "name the run with --ckpt_path=RUN" in done.err


def test_of_another_model_it_says_so(kept, astbench, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "run")
    checkpoint = read_checkpoint(folder / "step-1.ckpt")
    checkpoint["hyper_parameters"]["attention"]["density"] = 0.5
    torch.save(checkpoint, tmp_path / "other.ckpt")
    done = astbench(
        "analyze", f"--ckpt_path={folder}", f"--drift={tmp_path / 'other.ckpt'}", f"--run_dir={tmp_path / 'o'}"
    )
    assert done.code == 6 and "was trained with other attention options" in done.err


def test_keep_every_is_checked(astbench):
    done = astbench(*FIT, "--keep_every=0")
    assert done.code == 2 and "--keep_every must be at least 1 step, got 0" in done.err

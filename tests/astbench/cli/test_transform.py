"""`--transform`: what runs, what the record says, what is refused, and plugins."""

import json
from textwrap import dedent

import pytest

from astbench_registry.transforms import registry as transforms
from tests.astbench.cli.commands import FIT
from tests.astbench.conftest import DEMO

MINE = dedent(
    '''
    from dataclasses import dataclass
    from astbench_registry import Transform, TransformConfig, register_transform

    @dataclass(frozen=True)
    class HalfConfig(TransformConfig):
        """Weights times a factor.

        Args:
            factor: From 0 to 1.
        """
        factor: float = 0.5

    @register_transform("half", HalfConfig)
    class Half(Transform):
        def __call__(self, weights, visible):
            return weights * self.config.factor
    '''
)


@pytest.fixture(autouse=True)
def fresh_transforms(monkeypatch):
    monkeypatch.setattr(transforms._names, "decorated", {})


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformed") / "run"
    code, said = run([*FIT, f"--run_dir={folder}"])
    assert code == 0, said
    return folder


def record(folder):
    return json.loads((folder / "record.json").read_text())


def test_a_transform_on_ast_is_recorded(astbench, trained, tmp_path):
    done = astbench("validate", f"--ckpt_path={trained}", "--transform=log3bit", f"--run_dir={tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert "transform   log3bit in 3 layers threshold=0.001 scope=model bits=3" in done.out
    assert "backend     explicit weights in torch on cpu, for the transform" in done.out
    assert "of the visible pairs are zero, 8 different values" in done.out
    held = record(tmp_path / "out")
    assert held["backends"] == ["explicit-cpu"]
    assert held["config"]["transform"] == {
        "name": "log3bit", "threshold": 0.001, "zeros": None, "scope": "model", "bits": 3, "layers": None
    }  # fmt: skip
    found = held["transform"]
    assert found["values"] == 8 and found["bits"] == 3 and found["layers"] == 3
    assert 1 - held["density"]["mean"] - 1e-6 <= found["zeros"] < 1, "what ast does not choose is zero as well"
    assert 0.5 < found["row_sum"] < 1.5
    assert "transform" not in record(trained)["config"]


def test_thresholds_are_found_on_training_batches(astbench, trained, tmp_path):
    options = ["--transform=log3bit", "--transform.zeros=0.9", "--transform.bits=0", "--transform.layers=[1]"]
    words = ["validate", f"--init_from={trained}", *FIT[1:3], *DEMO, *options, f"--run_dir={tmp_path / 'out'}"]
    refused = astbench(*words)
    assert refused.code == 2 and "set --backbone.calibrate=2" in refused.err
    done = astbench(*words, "--backbone.calibrate=2")
    assert done.code == 0, done.err
    assert "calibrated: --transform=log3bit" in done.out and "; gather" not in done.err
    found = record(tmp_path / "out")["transform"]
    (path,) = found["zeros_by_layer"]
    assert ".1." in path and found["layers"] == 1
    assert len(found["found"][path]["thresholds"]) == 1
    assert found["zeros"] == pytest.approx(0.9, abs=0.05)
    assert sorted(record(tmp_path / "out")["backends"]) != ["explicit-cpu"], "two layers keep their own kernel"


def test_values_are_studied(astbench, trained, tmp_path):
    done = astbench("analyze", "--values", f"--ckpt_path={trained}", "--batches=1", f"--run_dir={tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert "attention values of visible pairs, all layers and heads" in done.out and "below 0.001" in done.out
    found = json.loads((tmp_path / "out" / "values.json").read_text())
    assert len(found["layers"]) == 3 and len(found["edges"]) == 121
    for layer in found["layers"].values():
        assert all(sum(head) == pytest.approx(1, abs=1e-3) for head in layer["histogram"])
        assert all(a >= b for a, b in zip(layer["below"]["0.1"], layer["below"]["0.001"], strict=True))
        assert all(bits > 0 for bits in layer["bits"])
    for name in record(tmp_path / "out")["values"]["pictures"]:
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_a_transform_of_your_own(astbench, trained, tmp_path):
    file = tmp_path / "half.py"
    file.write_text(MINE)
    words = ["validate", f"--ckpt_path={trained}", f"--transform={file}:Half", "--transform.factor=0.25"]
    done = astbench(*words, f"--run_dir={tmp_path / 'out'}")
    assert done.code == 0, done.err
    held = record(tmp_path / "out")
    assert held["transform"]["row_sum"] == pytest.approx(0.25, abs=1e-4)
    assert held["transform"]["values"] is None
    assert held["plugins"][0]["plugin"] == str(file) and "sha256" in held["plugins"][0]
    checked = astbench("check", "half", f"--plugins={file}")
    assert checked.code == 0 and " 0 failed" in checked.out
    assert f"half          Weights times a factor. [{file}]" in astbench("list", f"--plugins={file}").out
    assert "factor               float" in astbench("describe", "half", f"--plugins={file}").out


NAMES = ["--task=triviaqa", "--backbone=tiny"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["validate", "--attention=dense", *NAMES, "--transform=log3bt"], 4, "did you mean 'log3bit'?"),
        (["fit", "--attention=dense", *NAMES, "--transform=hard"], 2, "--transform=hard works at inference"),
        (["validate", "--attention=linear", *NAMES, "--transform=hard"], 2, "these do: ast, bigbird, dense, local"),
        (
            ["validate", "--attention=ast", "--attention.rest=true", *NAMES, "--transform=hard"], 2,
            "attention 'ast' has with its default options and not with these",
        ),
        (["validate", "--attention=dense", *NAMES, "--transform=hard", "--transform.top_k=0"], 2, "at least 1 key"),
        (["validate", "--attention=dense", *NAMES, "--transform="], 2, "--transform needs a value"),
        (["validate", "--attention=dense", *NAMES, "--transform.bits=2"], 2, "needs a transform: --transform=hard or"),
        (["analyze", "--values=3", "--attention=dense", *NAMES], 2, "--values takes no value, got 3"),
        (["check", "log3bit", "hard"], 2, "one transform at a time"),
        (["check", "log3bit", "--transform.bit=2"], 2, "did you mean 'bits'?"),
        (["check", "hrad"], 4, "unknown attention, transform or depth policy 'hrad'; did you mean 'hard'?"),
        (["describe", "hard", "--explain"], 2, "--explain is for attentions"),
        (["analyze", "--values", "--attention=linear", *NAMES], 2, "does not yield; these do: ast"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(astbench, words, code, message):
    done = astbench(*words)
    assert done.code == code, done.err
    assert message in done.err and done.err.count("\n") == 1

"""`--depth`: what runs, what the record says, what is refused, and plugins."""

import csv
import json
from textwrap import dedent

import pytest

from astbench_registry.depth import registry as depths

MINE = dedent(
    '''
    from dataclasses import dataclass
    import torch
    from astbench_registry import Choice, DepthConfig, DepthPolicy, register_depth

    @dataclass(frozen=True)
    class LastConfig(DepthConfig):
        """The last layers alone.

        Args:
            last: How many.
        """
        last: int = 1

    @register_depth("last", LastConfig)
    class Last(DepthPolicy):
        def choose(self, hidden, seen):
            paths = torch.zeros(len(hidden), self.shape.num_layers, dtype=torch.bool, device=hidden.device)
            paths[:, -self.config.last :] = True
            return Choice(paths)
    '''
)

LISTOPS = [
    "--attention=dense",
    "--task=lra_listops",
    "--backbone=modernbert-tiny",
    "--data.min_length=3",
    "--data.max_length=20",
    "--data.num_train=64",
    "--data.num_eval=12",
    "--data.batch_size=8",
]
FIT = ["fit", *LISTOPS, "--trainer.max_steps=3"]


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(autouse=True)
def fresh_depths(monkeypatch):
    monkeypatch.setattr(depths._names, "decorated", {})


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "run"
    code, said = run([*FIT, "--depth=transformer_inverse", "--depth.cost=0.5", f"--run_dir={folder}"])
    assert code == 0, said
    return folder


def test_a_learned_policy_is_recorded_and_evaluated_again(astbench, trained, tmp_path):
    held = record_of(trained)
    found = held["depth"]
    assert held["config"]["depth"]["name"] == found["name"] == "transformer_inverse"
    assert found["layers"] == 3 and found["inputs"] == 12 and sum(found["histogram"]) == 12
    assert found["share"] == pytest.approx(found["mean_layers"] / 3)
    assert found["complexity"] > 0 and found["programs"]["misses"] > 0
    items = json.loads((trained / "depth.json").read_text())
    assert len(items) == 12 and all(path[0]["path"][0] == "1" and path[0]["complexity"] > 0 for path in items.values())
    done = astbench("validate", f"--ckpt_path={trained}", f"--run_dir={tmp_path / 'out'}", "--data.eval_batch_size=2")
    assert done.code == 0, done.err
    timed = record_of(tmp_path / "out")["evaluation"]
    assert timed["batches_timed"] == 6 and 0 < timed["batch_ms"][0] <= timed["batch_ms"][1] <= timed["batch_ms"][2]
    assert "depth       transformer_inverse over 3 layers cost=0.5 look=1" in done.out
    assert "of 3 layers on average" in done.out
    again = record_of(tmp_path / "out")
    assert again["depth"]["most_frequent"] == found["most_frequent"] and again["metrics"] == held["metrics"]


def test_fewer_layers_cost_fewer_operations(astbench, trained, tmp_path):
    counted = []
    for layers in (3, 1):
        out = tmp_path / str(layers)
        words = ["validate", *LISTOPS, f"--init_from={trained}", "--depth=static", f"--depth.layers={layers}"]
        done = astbench(*words, f"--run_dir={out}")
        assert done.code == 0, done.err
        note = f"--init_from={trained} was trained with --depth=transformer_inverse; here --depth=static chooses"
        assert note in done.out
        held = record_of(out)
        assert held["depth"]["mean_layers"] == layers
        assert len(held["density"]["layers"]) == layers, "attention that did not run has no density"
        counted.append(held["flops"]["evaluation"])
    assert counted[1]["attention"] * 3 == counted[0]["attention"]
    assert 0.3 < counted[1]["model"] / counted[0]["model"] < 0.4


def test_a_frozen_backbone_keeps_its_weights(astbench, trained, tmp_path):
    import torch

    words = [*FIT, f"--init_from={trained}", "--depth=transformer_inverse", "--depth.cost=0.5", "--depth.distill=1"]
    done = astbench(*words, "--optim.train=depth", f"--run_dir={tmp_path / 'out'}")
    assert done.code == 0, done.err
    before, after = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (trained, tmp_path / "out")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".astbench_depth." in name for name in moved)


def test_a_decoder_learns_too_and_writes_on_one_path(astbench, tmp_path):
    words = ["--attention=ast", "--task=wikitext103", "--data.demo_train=40", "--data.demo_eval=4"]
    demo = ["--depth=transformer_inverse", "--trainer.max_steps=2", "--data.batch_size=4"]
    done = astbench("fit", *words, *demo, f"--run_dir={tmp_path / 'lm'}")
    assert done.code == 0, done.err
    assert record_of(tmp_path / "lm")["depth"]["inputs"] > 0
    more = ["--data.prompt=The", "--task.max_new_tokens=3"]
    done = astbench("predict", f"--ckpt_path={tmp_path / 'lm'}", *more, f"--run_dir={tmp_path / 'said'}")
    assert done.code == 0, done.err
    assert record_of(tmp_path / "said")["depth"]["paths"] == 1


def test_a_policy_of_your_own(astbench, trained, tmp_path):
    file = tmp_path / "last.py"
    file.write_text(MINE)
    words = ["validate", *LISTOPS, f"--init_from={trained}", f"--depth={file}:Last", "--depth.last=2"]
    done = astbench(*words, f"--run_dir={tmp_path / 'out'}")
    assert done.code == 0, done.err
    held = record_of(tmp_path / "out")
    assert held["depth"]["most_frequent"] == {"011": 12}
    assert held["plugins"][0]["plugin"] == str(file) and "sha256" in held["plugins"][0]
    checked = astbench("check", "last", f"--plugins={file}")
    assert checked.code == 1 and "needs the first layer in every path" in checked.out, "it cannot decode"
    assert f"last          The last layers alone. [{file}]" in astbench("list", f"--plugins={file}").out
    assert "last                 int" in astbench("describe", "last", f"--plugins={file}").out


def test_another_policy_than_the_checkpoints_is_refused(astbench, trained, tmp_path):
    out = f"--run_dir={tmp_path / 'out'}"
    for words, message in (
        (["--depth=static"], "was trained with --depth=transformer_inverse, and --depth=static was asked for"),
        (["--depth.cost=0.7"], "was trained with other depth options (checkpoint, given): {'cost': (0.5, 0.7)}"),
    ):
        done = astbench("validate", f"--ckpt_path={trained}", *words, out)
        assert done.code == 6 and message in done.err and done.err.count("\n") == 1, done.err
    bare = tmp_path / "bare"
    assert astbench(*FIT, f"--run_dir={bare}").code == 0
    done = astbench("validate", f"--ckpt_path={bare}", "--depth=static", out)
    assert done.code == 6 and "was trained with no depth policy, and --depth=static was asked for" in done.err
    done = astbench("validate", *LISTOPS, f"--init_from={bare}", "--depth=transformer_inverse", out)
    assert done.code == 6 and "--depth=transformer_inverse needs one trained with these options" in done.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["fit", *LISTOPS, "--depth=statik"], 4, "unknown depth 'statik'; did you mean 'static'?"),
        (["fit", *LISTOPS, "--depth=static", "--depth.layers=0"], 2, "a path of no layers is no model, got 0"),
        (["fit", *LISTOPS, "--depth=static", "--depth.layers=4"], 2, "within the model's 3 layers, 0 to 2, got 4"),
        (["fit", *LISTOPS, "--depth=static", "--depth.programs=0"], 2, "--depth.programs must be at least 1 program"),
        (["fit", *LISTOPS, "--depth.layers=2"], 2, "--depth.layers=2 needs a policy: --depth=early_exit or random or"),
        (["fit", *LISTOPS, "--depth="], 2, "--depth needs a value"),
        (["fit", *LISTOPS, "--optim.train=depth"], 2, "--optim.train=depth needs a depth policy that learns"),
        (["fit", *LISTOPS, "--depth=static", "--optim.train=depth"], 2, "--depth=static has nothing to learn"),
        (["fit", *LISTOPS, "--depth=static", "--backbone.compile=true"], 2, "leave --backbone.compile off"),
        (
            ["fit", *LISTOPS, "--depth=static", "--backbone.gradient_checkpointing=true"], 2,
            "leave --backbone.gradient_checkpointing off",
        ),
        (["fit", *LISTOPS, "--depth=static", "--trainer.devices=2"], 2, "one process, got --trainer.devices=2"),
        (["fit", "--attention=dense", "--task=wmt14", "--depth=static"], 2, "wmt14 takes an encoder-decoder"),
        (
            ["validate", *LISTOPS, "--depth=transformer_inverse"], 2,
            "--depth=transformer_inverse is learned: validate needs a run trained with it",
        ),
        (["analyze", "--attention=ast", *LISTOPS[1:], "--depth=static"], 2, "analyze looks at every layer"),
        (["check", "static", "random"], 2, "one depth policy at a time"),
        (["check", "static", "--depth.layer=2"], 2, "did you mean 'layers'?"),
        (["check", "--depth=static", "--depth.layers=9"], 2, "within the model's 4 layers"),
        (["check", "statc"], 4, "unknown attention, transform or depth policy 'statc'; did you mean 'static'?"),
        (["describe", "static", "--explain"], 2, "--explain is for attentions; static is a depth policy"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(astbench, words, code, message):
    done = astbench(*words)
    assert done.code == code, done.err
    assert message in done.err and done.err.count("\n") == 1, done.err


def test_runs_at_several_depths_are_compared(astbench, trained, tmp_path):
    folders = []
    for path in ("[0]", "[0,1,2]"):
        folders.append(str(tmp_path / f"path{len(folders)}"))
        words = ["validate", *LISTOPS, f"--init_from={trained}", "--depth=static", f"--depth.path={path}"]
        assert astbench(*words, f"--run_dir={folders[-1]}").code == 0
    plot = tmp_path / "plot"
    done = astbench("depth", str(trained), *folders, "--groups=3", f"--plot={plot}")
    assert done.code == 0, done.err
    assert sorted(file.name for file in plot.iterdir()) == ["depth-groups.csv", "depth.csv", "depth.png", "depth.svg"]
    points = list(csv.DictReader((plot / "depth.csv").read_text().splitlines()))
    assert [point["policy"] for point in points] == ["transformer_inverse", "static", "static", "oracle"]
    groups = list(csv.DictReader((plot / "depth-groups.csv").read_text().splitlines()))
    right = sum(float(group["right"]) * int(group["items"]) for group in groups) / 12
    assert [group["number"] for group in groups] == ["0", "1", "2"] and sum(int(g["items"]) for g in groups) == 12
    assert right == pytest.approx(float(points[0]["right"]), abs=1e-4)
    complexities = [float(group["complexity"]) for group in groups]
    layers = sum(float(group["layers"]) * int(group["items"]) for group in groups) / 12
    assert complexities == sorted(complexities)
    assert layers == pytest.approx(record_of(trained)["depth"]["mean_layers"], abs=1e-4)
    assert "transformer_inverse" in done.out and "oracle path of these 2: share 0." in done.out
    assert "any choice that knows what is right" in done.out and "by its complexity alone" in done.out
    assert "other weights" not in done.out
    bare = tmp_path / "bare"
    assert astbench(*FIT, "--depth=random", "--depth.share=0.7", f"--run_dir={bare}").code == 0
    assert f"note: {bare} ran other weights than these paths" in astbench("depth", str(bare), *folders).out
    alone = astbench("depth", str(trained))
    assert alone.code == 0 and "need two runs or more" in alone.out
    (tmp_path / "path0" / "items.json").write_text('{"0": {"accuracy": 100}}')
    for words, message in (
        ([str(trained), folders[0]], "were evaluated on other items"),
        ([str(tmp_path)], "record.json cannot be read"),
        ([str(trained), "--groups=0"], "--groups must be at least 1, got 0"),
        ([], "RUN"),
    ):
        done = astbench("depth", *words)
        assert done.code in (2, 3) and message in done.err and done.err.count("\n") == 1, done.err

"""Files that somebody else may have written name no code: nothing of them runs without trust."""

import json

import pytest
import yaml

from astbench.runs.folder import CONFIG, LAST, RECORD
from tests.astbench.cli.commands import FIT
from tests.astbench.cli.test_cli import assert_refused
from tests.astbench.conftest import NAMES

UNTRUSTED = [
    "attention: '{evil}:Evil'",
    "attention: {{name: '{evil}:Evil'}}",
    "attention: {{name: ['{evil}:Evil']}}",
    "attention.name: '{evil}:Evil'",
    "task: '{evil}:Evil'",
    "plugins: ['{evil}']",
    "plugins+: ['{evil}']",
    "model: {{attention: {{name: '{evil}:Evil'}}}}",
    "config: other.yaml",
    "trainer: {{callbacks: [{{class_path: evil.Evil}}]}}",
]


@pytest.mark.parametrize("text", UNTRUSTED)
def test_a_config_names_no_code(astbench, tmp_path, evil, monkeypatch, text):
    file, trace = evil
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "other.yaml").write_text(f"plugins: ['{file}']\n")
    (tmp_path / "c.yaml").write_text(text.format(evil=file) + "\n")
    for names in (NAMES, NAMES[1:], NAMES[:1]):
        outcome = astbench("fit", *names, "--config=c.yaml", "--data.source=local", "--run_dir=run")
        typed = names is NAMES and text.startswith(("attention: '", "attention: {{name: '", "task"))
        assert outcome.code == (3 if typed else 2), outcome.err  # what is typed takes the place of the name
    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    ["plugins: ['{evil}']", "attention: '{evil}:Evil'", "attention: 'ast,{evil}:Evil'", "config: other.yaml"],
)
def test_a_bench_config_names_no_code(astbench, tmp_path, evil, monkeypatch, text):
    file, trace = evil
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text(f"plugins: ['{file}']\n")
    (tmp_path / "b.yaml").write_text(f"lengths: [32]\n{text.format(evil=file)}\n")
    assert astbench("bench", "--config=b.yaml", "--run_dir=run").code == 2
    assert not trace.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["validate", "--ckpt_path={run}"], ["fit", "--resume={run}"]])
def test_a_strangers_run_folder_runs_no_code(astbench, tmp_path, evil, words):
    file, trace = evil
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CONFIG).write_text(f"attention: {{name: '{file}:Evil'}}\ntask: {{name: triviaqa}}\n")
    (folder / LAST).write_bytes(b"x")
    assert astbench(*[word.format(run=folder) for word in words]).code in (2, 6)
    assert not trace.exists()


def test_a_strangers_record_runs_no_code(astbench, tmp_path, evil):
    file, trace = evil
    folder = tmp_path / "results/stranger/one"
    folder.mkdir(parents=True)
    record = {
        "schema": 1,
        "command": "fit",
        "state": "done",
        "started": "2026-01-01T00:00:00Z",
        "config_hash": "1",
        "config": {
            "attention": {"name": f"{file}:Evil"},
            "task": {"name": "triviaqa"},
            "data": {"source": "demo"},
        },
    }
    (folder / RECORD).write_text(json.dumps(record))
    outcome = astbench("table", "stranger", f"--results={tmp_path / 'results'}", f"--docs={tmp_path}")
    assert outcome.code == 3 and not trace.exists()


FUNCTIONS = [
    {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": "os.system"}},
    {
        "class_path": "lightning.pytorch.callbacks.LambdaCallback",
        "init_args": {"on_fit_start": "astbench.files.writing.sync_folder"},
    },
    {"class_path": "lightning.pytorch.trainer.trainer.os.system"},
]


@pytest.mark.parametrize("callback", FUNCTIONS, ids=["os", "astbench", "through-lightning"])
def test_a_configs_callbacks_call_no_function(astbench, tmp_path, callback):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    outcome = astbench(*FIT, f"--config={tmp_path / 'c.yaml'}", f"--run_dir={tmp_path / 'run'}")
    assert_refused(outcome, 2)
    assert not (tmp_path / "run").exists()


def test_a_plugin_is_trusted_however_its_path_is_written(astbench, tmp_path, monkeypatch, plugin_file):
    plugin_file(file="relu.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("plugins: [./relu.py]\nattention: mine\ntask: triviaqa\n")
    for spelling in ("relu.py", "./relu.py", str(tmp_path / "relu.py"), f"../{tmp_path.name}/relu.py"):
        outcome = astbench("fit", "--config=c.yaml", f"--plugins={spelling}", "--data.source=local")
        assert_refused(outcome, 3, "needs --data.path")
    outcome = astbench("fit", "--config=c.yaml", "--attention=relu.py:Mine", "--data.source=local")
    assert_refused(outcome, 3, "needs --data.path")
    assert_refused(
        astbench("fit", "--config=c.yaml"), 2, "add --plugins=./relu.py", "run of your own", "--trust_config"
    )

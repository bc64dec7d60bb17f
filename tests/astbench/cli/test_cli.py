"""The command line: what works, and what every bad input answers: one line, its exit code, nothing left behind."""

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from astbench.backbones.presets import PRESETS
from astbench.cli.command_line import read_command_line
from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import CONFIG, DONE, LAST, MANIFEST, METRICS, PREVIOUS, RECORD
from astbench.runs.record import SCHEMA
from astbench.tasks import TASKS
from tests.astbench.conftest import DEMO, NAMES, PLUGIN

FIT = ["fit", *NAMES, *DEMO]
PACKAGE = [
    "--attention=reformer",
    "--attention.backend=reformer_pytorch",
    "--attention.allow_duplicate_attention=true",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def assert_refused(outcome, code, *parts):
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("astbench: error: ")
    for part in parts:
        assert part in lines[0], lines[0]
    assert outcome.code == code
    assert "unexpected" not in lines[0]


# -- without running anything -----------------------------------------------------------------------------------


def test_list_names_everything(astbench):
    done = astbench("list")
    assert done.code == 0 and done.err == ""
    for name in ("dense", "local", "ast", "random_topk", "oracle_topk", "pooled_topk", *TASKS, *PRESETS):
        assert name in done.out


def test_describe_names_options_abilities_and_paper(astbench):
    done = astbench("describe", "ast")
    assert done.code == 0 and done.err == ""
    for part in ("block_size", "density", "distill_weight", "default 16", "strict", "with a KV cache"):
        assert part in done.out


def test_describe_shows_the_abilities_under_the_options_given(astbench):
    package = ["--attention.backend=reformer_pytorch", "--attention.allow_duplicate_attention=true"]
    for words, padding, lengths in (([], "yes", "any"), (package, "no", "multiples of 128")):
        facts = [line.split(maxsplit=1) for line in astbench("describe", "reformer", *words).out.splitlines()]
        assert ["padding", padding] in facts and ["lengths", lengths] in facts
    assert "default 4, here 2" in astbench("describe", "reformer", "--attention.num_hashes=2").out
    assert "at most 64 tokens" in astbench("describe", "linformer", "--attention.max_length=64").out
    assert_refused(astbench("describe", "ast", "--density=3"), 2, "astbench describe takes no --density=3")
    assert_refused(astbench("describe", "ast", "--attention.densty=3"), 2, "did you mean 'density'?")
    assert_refused(astbench("describe", "ast", "--attention.density=["), 2, "--attention.density cannot be read")
    assert_refused(astbench("describe", "ast", "local"), 2, "takes one name, got ast local")


def test_describe_explains_a_call(astbench):
    measured = ["--attention.block_size=64", "--attention.min_blocks=1"]

    def facts(*words):
        done = astbench("describe", "ast", *words)
        assert done.code == 0 and done.err == ""
        return done.out

    shared = facts("--explain", "N=8192", "density=0.125", *measured)
    for part in ("gather (query-major)", "needs a CUDA device", "0.125 of dense's", "layer is faster, R 1.75", "0.57"):
        assert part in shared, shared
    # The kernel alone is faster here; the layer, which has to choose as well, is not.
    slower = facts("--explain", "N=8192", "density=0.125", "pattern=causal_self")
    assert "forward: the layer is slower, R 9.31" in slower and "faster, R" not in slower
    assert "kernel alone    forward 0.6 of dense's time" in slower
    other = astbench("describe", "pooled_topk", "--explain", "N=8192", "density=0.125", *measured).out
    assert "not measured: of 'pooled_topk' only the kernel was" in other and "faster, R" not in other
    a_token = facts("--explain", "N=8,192", "density=0.5", "pattern=causal_self", *measured)
    assert "gather (key-major)" in a_token and "not measured (measured: 1,024 to 16,384 tokens at" in a_token
    assert "R from          8,192 tokens" in facts("--explain", "N=8192", "density=0.125")
    assert "not measured (measured: float32" in facts("--explain", "N=8192", "density=0.125", "head_dim=80")
    short = facts("--explain", "N=256", "density=0.6", "pattern=causal_self")
    assert "gather (masked)" in short and "all (query, key) pairs, of which 0.765 of the visible ones count" in short
    assert "not measured (these shapes were measured at other densities, where the schedule is not masked)" in short
    decoding = facts("--explain", "N=8192", "mode=decode", *measured)
    assert "gather (one-row)" in decoding and "pattern=causal_self" in decoding
    gpu = facts("--explain", "N=8192", "device=cuda", "dtype=bfloat16", *measured)
    assert "triton (query-major)" in gpu and "not measured (no kernel was measured on cuda)" in gpu


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["ast", "--explain", "N=9", "denisty=1"], ["takes no denisty (did you mean density?); keys: N, M, density"]),
        (["ast", "--explain", "N=9", "many"], ["takes KEY=VALUE, got many"]),
        (["ast", "--explain", "M=9"], ["needs the number of tokens: N=32768"]),
        (["ast", "--explain", "N=nine"], ["N must be a whole number of at least 1, got nine"]),
        (["ast", "--explain", "N=9", "density=1.5"], ["density must be above 0 and at most 1, got 1.5"]),
        (["ast", "--explain", "N=9", "dtype=float23"], ["dtype must be one of float32", "did you mean float32?"]),
        (["ast", "--explain", "N=9", "heads=4", "kv_heads=3"], ["kv_heads must divide heads=4, got 3"]),
        (["ast", "--explain", "N=9", "mode=decode", "pattern=bidirectional_self"], ["mode=decode needs pattern="]),
        (
            ["ast", "--explain", "N=9", "mode=decode", "--attention.query_group=4"],
            ["--attention.query_group=4", "to 1"],
        ),
        (["ast", "--explain", "N=9", "M=8", "pattern=causal_self"], ["M must be at least N=9"]),
        (
            ["ast", "--explain", "N=9", "pattern=causal_self", "--attention.lists=carried"],
            ["--explain cannot say what carried lists hold", "leave --attention.lists out"],
        ),
        (["ast", "--explain", "N=9", "--attention.backend=triton"], ["leave --attention.backend out"]),
        (["dense", "--explain", "N=9"], ["that pick key blocks (ast, ", ", pooled_topk, quest, random_topk, seer)"]),
        (["ast", "N=9"], ["takes N=9 only with --explain"]),
    ],
    ids=lambda x: "-".join(x[2:] or x[1:]) if x[0] in ("ast", "dense") else "",
)
def test_describe_refuses_calls_in_one_line(astbench, words, parts):
    assert_refused(astbench("describe", *words), 2, *parts)


def test_help_of_a_choice_shows_its_options(astbench):
    with pytest.raises(SystemExit) as end:
        astbench("fit", *NAMES, "--help")
    assert end.value.code == 0


def test_doctor_says_what_works_here(astbench):
    done = astbench("doctor")
    assert done.code == 0 and done.err == ""
    for part in ("torch", "gather", "reference", "flex", "sdpa_math", "optional packages"):
        assert part in done.out


def test_check_runs_the_conformance_suite(astbench, plugin_file):
    done = astbench("check", f"{plugin_file()}:Mine")
    assert done.code == 0, done.out
    assert "0 failed" in done.out


def test_check_of_a_class_checks_that_class(astbench, plugin_file):
    broken = PLUGIN.replace("NAME", "zzz").replace("Mine", "Second").replace("v, allowed,", "v, None,")
    file = plugin_file(code=PLUGIN.replace("NAME", "aaa") + broken)
    assert astbench("check", f"{file}:Mine").code == 0
    wrong = astbench("check", f"{file}:Second")
    assert wrong.code == 1 and wrong.out.startswith("zzz")
    assert_refused(astbench("check", f"{file}:Nope"), 4, "registers no class 'Nope'", "aaa, zzz")


def test_autocast_with_rotary_positions(astbench, tmp_path):
    done = astbench("fit", *NAMES, *DEMO, "--trainer.precision=bf16-mixed", f"--run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err


def test_what_a_plugin_raises_while_it_runs_names_it(astbench, plugin_file, tmp_path):
    code = PLUGIN.replace("NAME", "mine").replace(
        "        q, k, v = mask", "        raise KeyError('window')\n        q, k, v = mask"
    )
    done = astbench(
        "fit", f"--attention={plugin_file(code=code)}:Mine", NAMES[1], *DEMO, f"--run_dir={tmp_path / 'run'}"
    )
    assert done.code == 1
    assert "KeyError: 'window' (raised by attention 'mine' at " in done.err and done.err.count("\n") == 1


def test_two_processes_train_as_one_with_twice_the_batch(run, tmp_path):
    """The same samples, gradients averaged, evaluation shared out, one folder, one record."""
    words = ["fit", "--attention=dense", NAMES[1], *DEMO, "--data.demo_eval=9", "--trainer.accelerator=cpu"]
    code, said = run([*words, "--data.batch_size=4", "--trainer.devices=1", f"--run_dir={tmp_path / 'one'}"])
    assert code == 0, said
    records, weights = [record_of(tmp_path / "one")], [read_checkpoint(tmp_path / "one")["state_dict"]]
    for name, devices, strategy in (("two", 2, "ddp"), ("sharded", 2, "fsdp2")):
        own = ["--data.batch_size=2", f"--trainer.devices={devices}", f"--trainer.strategy={strategy}"]
        done = subprocess.run(
            [sys.executable, "-m", "astbench", *words, *own],
            capture_output=True,
            text=True,
            cwd=(tmp_path / name).mkdir() or tmp_path / name,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done: ") == 1 and f"cpu x {devices}" in done.stdout
        (folder,) = (tmp_path / name / "runs").iterdir()
        records.append(record_of(folder))
        weights.append(read_checkpoint(folder)["state_dict"])
        assert len(json.loads((folder / "items.json").read_text())) == 9
    # A softmax does not see these: their gradient is rounding, and Adam makes whole steps of it.
    unseen = ("qa_outputs.bias", "key.bias", "k_proj.bias")
    for other, record in zip(weights[1:], records[1:], strict=True):
        assert other.keys() == weights[0].keys()
        for key, value in weights[0].items():
            if not key.endswith(unseen):
                torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert record["data"] == records[0]["data"]
        assert record["metrics"] == records[0]["metrics"]


def test_sharding_refuses_a_mean_of_weights(run, tmp_path):
    words = ["--attention=dense", "--task=wmt14", "--trainer.devices=1", "--trainer.accelerator=cpu"]
    average = ["--task.average=2", "--task.average_every=1", "--trainer.max_steps=2"]
    code, _ = run(["fit", *words, "--trainer.strategy=fsdp2", *average, f"--run_dir={tmp_path / 'run'}"])
    assert code == 2 and "--task.average=1" in run.errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_stops_all_processes_at_one_step(tmp_path):
    words = ["fit", *NAMES, *DEMO, "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=5000"]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "astbench", *words, f"--run_dir={folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        started = time.monotonic()
        while not ((folder / METRICS).exists() and len((folder / METRICS).read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() - started < 120
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1 and "terminated by SIGTERM at step" in errors[0], err
    record = record_of(folder)
    assert record["state"] == "terminated"
    assert record["train"]["steps"] == read_checkpoint(folder)["global_step"] > 0


@pytest.mark.parametrize("words", [["--data.source=local"], ["--data", "{source: local}"], ["--data={source: local}"]])
def test_the_demos_settings_stay_with_the_demo(words):
    assert read_command_line([*NAMES, *words]).value("data.source") == "local"


def test_processes_from_outside_need_a_folder(astbench, here, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert_refused(astbench(*FIT), 2, "name it with --run_dir=FOLDER")


def test_no_progress_bar(astbench, here):
    done = astbench(*FIT, "--trainer.enable_progress_bar=false", "--run_dir=run")
    assert done.code == 0, done.err
    assert "step 1/3" not in done.out and "Epoch" not in done.out + done.err


def test_check_with_options(astbench):
    done = astbench("check", "dense", "--attention.backend=sdpa_math")
    assert done.code == 0, done.out
    done = astbench("check", "local", "--attention.window=0")
    assert done.code == 2 and "--attention.window must be at least 1 key, got 0" in done.err
    refused = astbench("check", "dense", "--attention.backend=sdpa_cudnn")
    assert refused.code == 2 and refused.out == "" and "sdpa_cudnn" in refused.err and refused.err.count("\n") == 1
    assert "name just one" in astbench("check", "local", "dense", "--attention.window=3").err
    assert "takes no --window=3" in astbench("check", "local", "--window=3").err
    assert_refused(astbench("check", "ast", "--attention.density=abc"), 2, "--attention.density must be float")


def test_check_of_several_ends_with_a_matrix(astbench):
    done = astbench("check", "dense", "local")
    assert done.code == 0, done.out
    rows = [line.split() for line in done.out.splitlines() if line.startswith(("dense  ", "local  "))]
    assert [row[0] for row in rows] == ["dense", "local"]
    assert len(rows[0]) == len(rows[1]) and set(rows[0][1:]) == {"+", "-"}
    assert "skipped, parameter_gradients: owns no parameters: dense, local" in done.out


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list"],
        ["fit", "--help"],
        ["describe", "ast"],
        ["predict", "--help"],
        ["--version"],
        ["fit", "--attention=ast", "--help"],
    ],
)
def test_answers_without_importing_torch(words):
    code = (
        "import sys; from astbench.cli import main; code = main(sys.argv[1:])\n"
        "sys.exit(code or ('torch was imported' if 'torch' in sys.modules else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_is_fast():
    def seconds():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "astbench", "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.5


def test_console_script_is_installed():
    script = shutil.which("astbench", path=os.path.dirname(sys.executable))
    assert script
    done = subprocess.run([script, "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("astbench: error: unknown command")


# -- refusals -------------------------------------------------------------------------------------------------------


REFUSALS = {
    "unknown command": (["fti"], 2, "unknown command 'fti' (did you mean fit?)"),
    "unknown attention": ([*FIT, "--attention=asst"], 4, "unknown attention 'asst'; did you mean 'ast'?"),
    "unknown task": ([*FIT, "--task=trivia"], 4, "unknown task 'trivia'; did you mean 'triviaqa'?"),
    "unknown option": ([*FIT, "--attention.blok_size=3"], 2, "did you mean --attention.block_size?"),
    "option of another attention": ([*FIT, "--attention=dense", "--attention.density=0.5"], 2, "unknown option"),
    "wrong type": ([*FIT, "--attention.block_size=abc"], 2, "--attention.block_size must be of type int, got abc"),
    "bad value": ([*FIT, "--attention.block_size=0"], 2, "--attention.block_size must be at least 1"),
    "bad learning rate": ([*FIT, "--optim.lr=-1"], 2, "--optim.lr must be above 0"),
    "learning rate that is no number": ([*FIT, "--optim.lr=.nan"], 2, "--optim.lr must be above 0, got nan"),
    "evaluation cut short": ([*FIT, "--trainer.limit_val_batches=1"], 2, "limit_val_batches", "--data.max_eval=N"),
    "training cut short": ([*FIT, "--trainer.limit_train_batches=0"], 2, "use --data.max_train=N"),
    "trial run": ([*FIT, "--trainer.fast_dev_run=true"], 2, "fast_dev_run", "--trainer.max_steps=3"),
    "list of one": (["list", "--attention=ast"], 2, "astbench list takes no --attention=ast"),
    "bad batch size": ([*FIT, "--data.batch_size=0"], 2, "--data.batch_size must be at least 1, got 0"),
    "bad limit": ([*FIT, "--data.max_train=-1"], 2, "--data.max_train must be at least 1, got -1"),
    "bad share": ([*FIT, "--data.negative_share=1.5"], 2, "--data.negative_share must be between 0 and 1"),
    "bad stride": ([*FIT, "--data.stride=100"], 2, "--data.stride=100 must be below"),
    "no steps": ([*FIT, "--trainer.max_steps=0"], 2, "--trainer.max_steps must be at least 1"),
    "no checkpoints": ([*FIT, "--checkpoint_every=0"], 2, "--checkpoint_every must be at least 1"),
    "no names": (["fit"], 2, "--attention=NAME is required"),
    "no task": (["fit", "--attention=ast"], 2, "--task=NAME is required"),
    "negative seed": ([*FIT, "--seed=-1"], 2, "--seed must be between 0 and 4294967295, got -1"),
    "unknown single logger": ([*FIT, "--loggers=foo"], 2, "--loggers must be one of csv, tensorboard", "got foo"),
    "unknown logger": ([*FIT, "--loggers=[foo]"], 2, "--loggers", "csv", "wandb", "got ['foo']"),
    "seed of letters": ([*FIT, "--seed=abc"], 2, "--seed must be of type int, got abc"),
    "bad precision": (
        [*FIT, "--trainer.precision=foo"],
        2,
        "--trainer.precision must be one of",
        "bf16-mixed",
        "got foo",
    ),
    "path without local": (
        [*FIT, "--data.path=/no/where"],
        2,
        "--data.path=/no/where is read with --data.source=local only",
    ),
    "validate untrained": (["validate", *NAMES], 2, "validate needs trained weights"),
    "no accumulation": ([*FIT, "--trainer.accumulate_grad_batches=0"], 2, "accumulate_grad_batches must be at least 1"),
    "config without a file": ([*FIT, "--config"], 2, "--config needs a file"),
    "stray word": ([*FIT, "stray"], 2, "unknown option stray"),
    "unknown source": ([*FIT, "--data.source=web"], 2, "data.source", "'demo', 'hub', 'local'"),
    "no path": ([*FIT, "--data.source=local"], 3, "--data.source=local needs --data.path"),
    "missing path": ([*FIT, "--data.source=local", "--data.path=/no/where"], 3, "/no/where does not exist"),
    "empty source": ([*FIT, "--data.demo_train=0"], 2, "--data.demo_train must be at least 1 question, got 0"),
    "what the trainer refuses": ([*FIT, "--trainer.fast_dev_run=-1"], 2, "fast_dev_run"),
    "unknown backbone": ([*FIT, "--backbone=tny"], 4, "unknown backbone 'tny'; did you mean 'tiny'?"),
    "longer than the table": (
        [*FIT, "--backbone=bert-tiny", "--data.max_length=4000"],
        2,
        "--data.max_length=4000 tokens is longer than the backbone's position table of 1024",
        "--backbone.max_positions=4000",
    ),
    "nothing to train": ([*FIT, "--attention=dense", "--optim.train=attention"], 2, "needs an attention with"),
    "missing config": ([*FIT, "--config=no.yaml"], 2, "--config=no.yaml does not exist"),
    "resume of nothing": (["fit", "--resume=nothing"], 6, "--resume=nothing is not a run folder"),
    "resume without a folder": (["fit", "--resume"], 2, "--resume needs the run folder"),
    "predict untrained": (["predict", *NAMES], 2, "predict needs a trained run"),
    "missing checkpoint": (["test", "--ckpt_path=nothing"], 6, "--ckpt_path=nothing does not exist"),
    "missing init": ([*FIT, "--init_from=nothing"], 6, "nothing"),
    "class_path": ([*FIT, "--trainer.callbacks=os.system"], 2, "a config may not name os.system"),
    # Code 2 and not 3: said before the data, which is not there, is looked for.
    "no padding": (
        ["fit", "--task=squad", *PACKAGE],
        2,
        "attention 'reformer' cannot serve this model: takes no padding",
        "(set --attention.backend=auto)",
    ),
    "not a multiple": (
        ["test", "--task=wikitext103", *PACKAGE, "--attention.bucket_size=48", "--data.context=1000"],
        2,
        "takes multiples of 96 tokens, --data.context is 1000 (set --attention.backend=auto)",
    ),
    "too long": (
        ["fit", "--task=squad", "--attention=linformer", "--attention.max_length=64", "--data.max_length=512"],
        2,
        "attention 'linformer' cannot serve this model: takes at most 64 tokens, --data.max_length is 512 "
        "(raise --attention.max_length)",
    ),
    "missing plugin": ([*FIT, "--plugins=./no.py"], 4, "plugin file ./no.py does not exist"),
    "describe nothing": (["describe", "asst"], 4, "did you mean 'ast'?"),
    "check nothing": (["check", "asst"], 4, "did you mean 'ast'?"),
    "list with options": (["list", "--density=3"], 2, "takes no --density=3"),
}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(astbench, here):
    refused = astbench(*FIT, "--trainer.accelerator=gpu", "--run_dir=run")
    assert_refused(refused, 7, "--trainer.accelerator=gpu: torch sees no GPU here", "leave the option out")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line_and_its_exit_code(astbench, here, case):
    words, code, *parts = REFUSALS[case]
    assert_refused(astbench(*words, *(["--run_dir=run"] if words[0] == "fit" else [])), code, *parts)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "code", "part"),
    [
        ("broken.yaml", "a: [1", 2, "cannot be read"),
        ("flat.yaml", "trainer: 3", 2, "flat.yaml: trainer must be a group of options"),
        ("list.yaml", "attention: [ast]", 2, "list.yaml: attention must be a name or a group of options"),
        ("plugins.yaml", "plugins: ./mine.py", 2, "plugins.yaml: plugins must be a list"),
        ("list.yaml", "- 1", 2, "holds no options"),
        ("typo.yaml", "optim: {lrr: 1}", 2, "lrr"),
        ("code.yaml", "trainer: {callbacks: [{class_path: os.system}]}", 2, "os.system"),
    ],
)
def test_bad_configs(astbench, here, name, text, code, part):
    (here / name).write_text(text)
    assert_refused(astbench(*FIT, f"--config={name}", "--run_dir=run"), code, part)
    assert not (here / "run").exists()


def test_class_path_denial_runs_nothing(astbench, here):
    config = {"trainer": {"callbacks": [{"class_path": "os.system", "init_args": {"command": "touch owned"}}]}}
    (here / "evil.yaml").write_text(yaml.safe_dump(config))
    assert_refused(astbench(*FIT, "--config=evil.yaml"), 2, "a config may not name os.system")
    assert [f.name for f in here.iterdir()] == ["evil.yaml"]


@pytest.mark.parametrize("ending", ["json", "jsonl", "jsonl.gz"])
def test_truncated_data(astbench, here, ending):
    row = {"question_id": "1", "question": "Who?", "answer": {"value": "x", "aliases": []}, "entity_pages": {}}
    text = json.dumps({"Data": [row]} if ending == "json" else row).encode()[:-9]
    name = "wikipedia-train.json" if ending == "json" else f"train.{ending}"
    (here / "data").mkdir()
    (here / "data" / name).write_bytes(gzip.compress(text)[:-9] if ending.endswith("gz") else text)
    outcome = astbench(*FIT, "--data.source=local", "--data.path=data", "--run_dir=run")
    assert_refused(outcome, 3, name, "the gzip file is cut short" if ending.endswith("gz") else "cannot be read")
    assert not (here / "run").exists()


@pytest.mark.parametrize("name", ["train.jsonl", "wikipedia-train.json"])
def test_data_of_brackets_within_brackets(astbench, here, name):
    (here / "data").mkdir()
    (here / "data" / name).write_text("[" * 200_000)
    outcome = astbench(*FIT, "--data.source=local", "--data.path=data")
    assert_refused(outcome, 3, name, "cannot be read")
    assert [file.name for file in here.iterdir()] == ["data"], "not even an empty runs/"


def test_plugins_that_do_not_load(astbench, here, plugin_file):
    raising = plugin_file(file="raising.py", code="1 / 0\n")
    empty = plugin_file(file="empty.py", code="x = 1\n")
    typo = plugin_file(file="typo.py", code="def f(:\n")
    assert_refused(astbench(*FIT, f"--plugins={raising}"), 4, "raising.py does not load: ZeroDivisionError")
    assert_refused(astbench(*FIT, f"--plugins={empty}"), 4, "registers no attention")
    assert_refused(astbench(*FIT, f"--plugins={typo}"), 4, "typo.py does not load: SyntaxError")
    assert_refused(astbench("list", f"--plugins={raising}"), 4, "raising.py does not load")
    assert list(here.iterdir()) == []


def test_two_plugins_of_one_name(astbench, plugin_file):
    one, two = plugin_file("twin", "one.py"), plugin_file("twin", "two.py")
    outcome = astbench("list", f"--plugins={one},{two}")
    assert_refused(outcome, 4, "attention 'twin' is registered twice: by", "one.py and by", "two.py")


def test_a_plugin_may_not_take_a_built_in_name(astbench, plugin_file):
    assert_refused(astbench("list", f"--plugins={plugin_file('ast')}"), 4, "registered twice: by astbench")


def test_a_config_naming_a_plugin_needs_trust(astbench, here, plugin_file):
    marker = here / "ran"
    plugin = plugin_file(file="marking.py", code=f"open({str(marker)!r}, 'w').close()\n")
    (here / "c.yaml").write_text(yaml.safe_dump({"plugins": [str(plugin)]}))
    assert_refused(astbench(*FIT, "--config=c.yaml"), 2, "plugins are code: add --plugins=")
    assert not marker.exists()
    assert_refused(astbench(*FIT, "--config=c.yaml", "--trust_config"), 4, "registers no attention")
    assert marker.exists()


def test_debug_shows_the_traceback(astbench, here):
    outcome = astbench(*FIT, "--data.source=local", "--data.path=/no/where", "--debug")
    assert outcome.code == 3
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("astbench: error: ")


def test_a_loss_that_is_not_finite_stops_the_run(astbench, here):
    outcome = astbench(*FIT, "--optim.lr=1e30", "--optim.warmup_steps=0", "--run_dir=run")
    assert_refused(outcome, 5, "is not finite at step 1", "lower --optim.lr")
    record = json.loads((here / "run" / RECORD).read_text())
    assert record["state"] == "diverged"
    assert "not finite" in record["error"]
    assert not (here / "run" / DONE).exists()


# -- one tiny run, from end to end ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on the demo source, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "astbench", *FIT, f"--run_dir={folder}"],
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


def record_of(folder):
    return json.loads((folder / RECORD).read_text())


def test_first_and_last_lines(finished):
    _, out = finished
    lines = out.splitlines()
    assert lines[0] == "astbench fit"
    heads = [line.split()[0] for line in lines[1:8]]
    assert heads == ["attention", "task", "source", "backbone", "device", "backend", "run"]
    assert "demo (generated, not the real data set): 64 train, 8 validation" in out
    for part in ("f1", "density", "record", "checkpoint", "picture", "on the real data: astbench fit"):
        assert part in out
    assert "--data.source=hub" in lines[-1]


def test_run_folder_is_complete(finished):
    folder, _ = finished
    names = {f.name for f in folder.iterdir()}
    assert {CONFIG, RECORD, DONE, METRICS, LAST, MANIFEST, "tokenizer", "pattern.png", "items.json"} <= names
    assert not [n for n in names if n.startswith(".") and n != ".lock"]
    assert (folder / "pattern.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / METRICS, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [r["step"] for r in rows if r["train/loss"]] == ["0", "1", "2"]
    assert rows[-1]["val/f1"]
    items = json.loads((folder / "items.json").read_text())
    assert len(items) == 8 and all(row.keys() == {"em", "f1", "prediction"} for row in items.values())


def test_record_fields(finished):
    folder, _ = finished
    record = record_of(folder)
    assert record["schema"] == SCHEMA
    assert record["argv"] == ["astbench", *FIT, f"--run_dir={folder}"]
    assert (record["command"], record["state"], record["seed"]) == ("fit", "done", 0)
    assert record["metrics"].keys() == {"f1", "em", "title_f1"}
    assert record["config"]["attention"]["name"] == "ast"
    assert record["data"]["source"] == "demo"
    assert record["data"]["fingerprints"].keys() == {"train", "validation"}
    assert record["parameters"]["total"] == record["parameters"]["trainable"] > record["parameters"]["attention"] > 0
    assert record["attached"] == {"layers": 3, "patterns": ["bidirectional_self"]}
    assert record["train"]["steps"] == 3
    assert 0 < record["density"]["mean"] <= 1 and len(record["density"]["layers"]) == 3
    assert record["backends"] == ["gather (masked)"]  # what the evaluation ran, without gradients
    assert record["peak_memory"]["cpu_bytes"] > 0 and record["wall_seconds"] > 0
    assert record["signature"].endswith("8 questions")
    assert json.loads((folder / DONE).read_text()) == {"state": "done", "config_hash": record["config_hash"]}


def test_the_saved_config_runs_again_to_the_same_result(astbench, here, finished):
    folder, _ = finished
    assert astbench("fit", f"--config={folder / CONFIG}", "--run_dir=again").code == 0
    again, first = record_of(here / "again"), record_of(folder)
    assert again["config_hash"] == first["config_hash"]
    assert again["metrics"] == first["metrics"]
    assert (here / "again" / METRICS).read_bytes() == (folder / METRICS).read_bytes()
    assert (here / "again" / CONFIG).read_text() == (folder / CONFIG).read_text()


def test_the_config_of_an_evaluation_runs_again_on_its_checkpoint(astbench, here, finished):
    folder, _ = finished
    assert astbench("validate", f"--ckpt_path={folder}", "--run_dir=val").code == 0
    assert astbench("validate", "--config", "val/config.yaml", "--run_dir=again").code == 0
    first, again = record_of(here / "val"), record_of(here / "again")
    assert again["metrics"] == first["metrics"]
    assert again["checkpoint"] == first["checkpoint"] is not None


@pytest.mark.parametrize("word", ["--optim.lr=0.5", "--seed=9", "--attention=dense", "--attention.bogus=1"])
def test_resume_takes_no_options(astbench, here, finished, word):
    assert_refused(
        astbench("fit", f"--resume={finished[0]}", word), 2, "goes on with a run as it was configured", "--init_from"
    )


def test_validate_repeats_the_metrics(astbench, here, finished):
    folder, _ = finished
    before = sorted(f.name for f in folder.iterdir())
    for checkpoint in (folder, folder / LAST):
        done = astbench("validate", f"--ckpt_path={checkpoint}", f"--run_dir=val-{checkpoint.name}")
        assert done.code == 0, done.err
        assert record_of(here / f"val-{checkpoint.name}")["metrics"] == record_of(folder)["metrics"]
    assert sorted(f.name for f in folder.iterdir()) == before


def test_test_evaluates_another_split(astbench, here, finished):
    folder, _ = finished
    assert astbench("test", f"--ckpt_path={folder}", "--run_dir=t").code == 0
    record = record_of(here / "t")
    assert (record["command"], record["split"]) == ("test", "test")
    assert record["checkpoint"] == str(folder / LAST)


def test_predict_answers_from_a_file(astbench, here, finished):
    folder, _ = finished
    document = here / "doc.txt"
    document.write_text("Ada Vintar was born in Rookwell. " * 40)
    ask = ["predict", f"--ckpt_path={folder}", "--data.question=Where was Ada born?"]
    done = astbench(*ask, f"--data.document={document}", "--run_dir=p")
    assert done.code == 0, done.err
    answer = record_of(here / "p")["answer"]
    assert answer["text"] in document.read_text() and answer["windows"] > 1
    data = record_of(here / "p")["data"]
    assert (data["source"], data["path"]) == ("document", str(document)) and data["fingerprints"]["predict"]
    assert f"source      document {document}" in done.out
    assert f"answer   {answer['text']}" in done.out
    (here / "empty.txt").write_text(" \n")
    (here / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (here / "word.txt").write_text("Rookwell")
    (here / "invisible.txt").write_text("\u200b\u200d")
    assert_refused(astbench(*ask, "--data.document=invisible.txt", "--run_dir=q"), 3, "holds any text")
    for name, part in (("no.txt", "does not exist"), ("empty.txt", "is empty"), ("binary.txt", "cannot be read")):
        assert_refused(astbench(*ask, f"--data.document={name}", "--run_dir=q"), 3, name, part)
        assert not (here / "q").exists()
    assert_refused(astbench("predict", f"--ckpt_path={folder}"), 2, "predict needs --data.question")
    assert astbench(*ask, "--data.document=word.txt", "--run_dir=w").code == 0
    assert record_of(here / "w")["answer"]["text"] in "Rookwell"


def test_a_trained_run_takes_no_other_options(astbench, here, finished):
    folder, _ = finished
    for words in (["--attention.density=0.9"], ["--attention=dense"], ["--backbone.name=small"]):
        outcome = astbench("test", f"--ckpt_path={folder}", *words, "--run_dir=t")
        assert_refused(outcome, 6, "was trained with other", "--init_from")
        assert not (here / "t").exists()
    # The kernel may differ: it computes the same function.
    assert astbench("test", f"--ckpt_path={folder}", "--attention.backend=reference", "--run_dir=t").code == 0
    assert record_of(here / "t")["backends"] == ["reference"]


def test_a_damaged_run_is_refused(astbench, here, finished):
    folder = shutil.copytree(finished[0], here / "copy")
    data = bytearray((folder / LAST).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / LAST).write_bytes(data)
    assert_refused(astbench("test", f"--ckpt_path={folder}", "--run_dir=t"), 6, "matches its sha256")
    assert_refused(astbench("test", f"--ckpt_path={folder / LAST}", "--run_dir=t"), 6, "damaged")
    (folder / PREVIOUS).unlink(missing_ok=True)
    (folder / LAST).unlink()
    assert_refused(astbench("test", f"--ckpt_path={folder}", "--run_dir=t"), 6, "no checkpoint in")
    (folder / CONFIG).unlink()
    assert_refused(astbench("test", f"--ckpt_path={folder}", "--run_dir=t"), 6, f"no {CONFIG} beside it")
    assert not (here / "t").exists()


def test_a_run_folder_is_not_written_twice(astbench, finished):
    folder, _ = finished
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert_refused(astbench(*FIT, f"--run_dir={folder}"), 2, "holds a run already")
    done = astbench("fit", f"--resume={folder}")
    assert (done.code, done.out) == (0, f"{folder} is done already; nothing to resume\n")
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_fit_takes_no_checkpoint(astbench, here, finished):
    assert_refused(astbench(*FIT, f"--ckpt_path={finished[0]}"), 2, "--resume=RUN", "--init_from=RUN")
    assert_refused(astbench("test", f"--resume={finished[0]}"), 2, "--resume goes with fit")


def test_init_from_puts_the_weights_into_another_attention(astbench, here, finished):
    folder, _ = finished
    words = ["fit", f"--config={folder / CONFIG}", f"--init_from={folder}", "--optim.lr=1e-12"]
    done = astbench(*words, "--attention=dense", "--run_dir=dense")
    assert done.code == 0, done.err
    assert "attention dense replaces ast" in done.out
    full = astbench(*words, "--attention.density=1.0", "--run_dir=full")
    assert full.code == 0, full.err
    # At full density ast is dense: the same function of the same weights.
    assert record_of(here / "dense")["metrics"] == record_of(here / "full")["metrics"]
    assert record_of(here / "dense")["parameters"]["attention"] == 0
    other = astbench(*words, "--attention=ast", "--attention.rank=3", "--run_dir=other")
    assert other.code == 0, other.err
    assert "6 of the attention's 9 own tensors start anew" in record_of(here / "other")["notes"]


def test_init_from_another_backbone_is_refused(astbench, here, finished):
    outcome = astbench(*FIT, f"--init_from={finished[0]}", "--backbone=bert-tiny", "--run_dir=x")
    assert_refused(outcome, 6, "was trained on another backbone")
    assert not (here / "x").exists()


def test_a_loose_file_goes_through_list_describe_and_fit(astbench, here, plugin_file):
    path = plugin_file()
    assert "mine" in astbench("list", f"--plugins={path}").out
    assert "power" in astbench("describe", "mine", f"--plugins={path}").out
    words = ["fit", f"--attention={path}:Mine", "--task=triviaqa", *DEMO, "--attention.power=1.5", "--run_dir=run"]
    done = astbench(*words)
    assert done.code == 0, done.err
    record = record_of(here / "run")
    assert record["config"]["attention"] == {"name": "mine", "power": 1.5}
    assert record["config"]["plugins"] == [str(path)]
    refused = astbench("test", "--ckpt_path=run", "--run_dir=t")
    assert_refused(refused, 2, f"add --plugins={path}")
    assert astbench("test", "--ckpt_path=run", "--run_dir=t", f"--plugins={path}").code == 0


def test_local_data_with_every_awkward_document(astbench, here):
    """Empty, one word, no answer in any window, no room for the question: trained and scored, with notes."""
    rows = [
        ("Who was born in Rookwell?", "Bram Oster", "Bram Oster was born in Rookwell. " * 30),
        ("Who was born in Rookwell?", "Bram Oster", ""),
        ("Who was born in Rookwell?", "Oster", "Oster"),
        ("Who was born in Rookwell?", "Nobody", "Bram Oster was born in Rookwell. " * 30),
        ("Who was it? " * 60, "Oster", "Bram Oster met Ada."),
    ]
    (here / "data").mkdir()
    for split in ("train", "validation"):
        with open(here / "data" / f"{split}.jsonl", "w") as out:
            for number, (question, answer, text) in enumerate(rows):
                pages = {"title": ["Bram Oster"], "wiki_context": [text]}
                answers = {"value": answer, "aliases": [answer]}
                row = {"question_id": f"{split}{number}", "question": question, "answer": answers}
                out.write(json.dumps({**row, "entity_pages": pages}) + "\n")
    done = astbench(*FIT, "--data.source=local", "--data.path=data", "--run_dir=run")
    assert done.code == 0, done.err
    record = record_of(here / "run")
    assert record["metrics"]["title_f1"] > 0
    assert "1 of 5 training documents are empty: left out" in record["notes"]
    assert any("have no answer in their document" in note for note in record["notes"])
    items = json.loads((here / "run" / "items.json").read_text())
    assert items["validation1"] == {"em": 0.0, "f1": 0.0, "prediction": ""}
    assert items["validation2"]["prediction"] in "Oster"

"""`astbench push`: through the real client to a hub in this process, and loaded back by name."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from astbench import load_adapter
from astbench.backbones.tokenizers import train_byte_tokenizer
from astbench.errors import ConfigError
from astbench.runs.folder import RECORD
from astbench.sharing.folder import check_private
from astbench.sharing.source import read_source
from astbench.tasks.lm import demo

DATA = ["--task=wikitext103", "--data.demo_train=20", "--data.demo_eval=3", "--data.context=48", "--trainer.threads=1"]
AST = ["--attention=ast", "--attention.block_size=8", "--attention.density=0.5", "--attention.min_blocks=2"]
FIT = [*AST, *DATA, "--data.batch_size=2", "--trainer.max_steps=2", "--loggers=csv"]


def fit(astbench, folder, *options):
    done = astbench("fit", *FIT, f"--run_dir={folder}", *options)
    assert done.code == 0, done.err
    return json.loads((folder / RECORD).read_text())


def validated(astbench, folder, *options):
    done = astbench("validate", *AST, *DATA, f"--run_dir={folder}", *options)
    assert done.code == 0, done.err
    return json.loads((folder / RECORD).read_text())


def refused(done, code, *parts):
    assert done.code == code and len(done.err.splitlines()) == 1, done.err
    for part in parts:
        assert part in done.err


@pytest.fixture
def base(tmp_path):
    """A folder with a small pretrained model."""
    tokenizer = train_byte_tokenizer([demo.generate("train", 2).text], 300)
    torch.manual_seed(4)
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **settings)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_checkpoint_is_pushed_and_loaded_back_by_name(hub, astbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = fit(astbench, tmp_path / "run")
    shown = astbench("push", "run", "someone/tiny", "--dry-run")
    assert shown.code == 0 and not hub.files, "a dry run uploads nothing"
    assert "nothing was uploaded" in shown.out and "# someone/tiny" in shown.out and "model.safetensors" in shown.out
    done = astbench("push", "run", "someone/tiny", "--license=apache-2.0")
    assert done.code == 0, done.err
    files = hub.files["someone/tiny"]
    assert hub.private == {"someone/tiny": True}
    assert set(files) - {".gitattributes"} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    }
    for name, data in files.items():
        assert str(tmp_path).encode() not in data and b"hf_aaaa" not in data, name
        assert b"exp_avg" not in data and b"optimizer" not in data, name

    card = files["README.md"].decode()
    nll = record["metrics"]["nll"]
    row = next(line for line in card.splitlines() if line.startswith("| nll |"))
    low, high = (float(x) for x in row.split("|")[3].split("(")[0].split(" to "))
    assert f"| {nll:.4g} |" in row and low < nll < high
    for part in (
        *(
            "license: apache-2.0",
            "- attention:ast",
            "`density=0.5`",
            "on generated data of the task wikitext103",
            "source demo (generated, not the real data set)",
            "Scored on the validation split.",
            "| base model | none: the preset ",
            "astbench validate --attention=ast",
            f"{record['density']['mean']:.3f}",
        ),
        f"{record['parameters']['total']:,}",
        "--attention.block_size=8" if record["config"]["attention"]["block_size"] != 16 else "",
        "astbench fit --attention=ast --task=wikitext103",
        "--backbone=someone/tiny",
        record["data"]["fingerprint"],
    ):
        assert part in card, part
    assert "FOLDER" not in card

    shutil.rmtree("run")
    again = validated(astbench, tmp_path / "again", "--backbone=someone/tiny")
    assert again["metrics"] == record["metrics"], "bit for bit"
    assert any("tensors of attention 'ast' come from someone/tiny" in note for note in again["notes"])


def test_a_card_has_no_command_that_is_refused(astbench, tmp_path, monkeypatch):
    """The recall probes evaluate no pretrained weights, so how to load them in Python is all that there is to say."""
    monkeypatch.chdir(tmp_path)
    words = ["--task=mqar", "--data.length=32", "--data.num_pairs=2", "--data.num_eval=8", "--trainer.max_steps=1"]
    done = astbench("fit", *AST, *words, "--data.num_train=16", "--data.batch_size=4", "--run_dir=run")
    assert done.code == 0, done.err
    card = astbench("push", "run", "someone/recall", "--dry-run").out
    assert "on generated data of the task mqar" in card and "AutoModelForCausalLM.from_pretrained" in card
    assert "--backbone=someone/recall" not in card and "astbench fit --attention=ast --task=mqar" in card


def test_an_adapter_is_pushed_and_loaded_back_by_name(hub, astbench, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.files["someone/base"] = {file.name: file.read_bytes() for file in base.iterdir()}
    record = fit(astbench, tmp_path / "run", "--backbone=someone/base", "--optim.train=attention")
    done = astbench("push", "run", "someone/adapter", "--adapter", "--public")
    assert done.code == 0, done.err
    files = hub.files["someone/adapter"]
    assert set(files) == {"README.md", "adapter.json", "adapter.safetensors"}
    assert hub.private["someone/adapter"] is False
    assert json.loads(files["adapter.json"])["backbone"] == "someone/base"
    card = files["README.md"].decode()
    assert "base_model: someone/base" in card
    assert "--backbone=someone/base --init_from=hf://someone/adapter" in card

    shutil.rmtree("run")
    again = validated(astbench, tmp_path / "again", "--backbone=someone/base", "--init_from=hf://someone/adapter")
    assert again["metrics"] == record["metrics"], "bit for bit"
    wrong = astbench(
        *("validate", *AST, *DATA, "--attention.density=0.25", "--backbone=someone/base"),
        *("--init_from=hf://someone/adapter", "--run_dir=wrong"),
    )
    refused(wrong, 6, "has --attention.density=0.5, and 0.25 is given")
    fresh = astbench("validate", *AST, *DATA, "--init_from=hf://someone/adapter", "--run_dir=fresh")
    refused(fresh, 2, "validate needs trained weights")
    whole = astbench("validate", *AST, *DATA, "--backbone=someone/base", "--init_from=hf://someone/base", "--run_dir=w")
    refused(whole, 6, "holds no adapter.json", "--backbone=someone/base")

    handle = load_adapter(AutoModelForCausalLM.from_pretrained("someone/base"), "hf://someone/adapter")
    assert handle.name == "ast" and handle.options["density"] == 0.5


def test_a_backbone_from_a_folder_is_called_by_no_path(hub, astbench, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(astbench, tmp_path / "run", f"--backbone={base}", "--optim.train=attention")
    refused(astbench("push", "run", "someone/a", "--adapter"), 2, "name it: --base=OWNER/NAME")
    done = astbench("push", "run", "someone/a", "--adapter", "--base=someone/base", "--out=here")
    assert done.code == 0 and "nothing was uploaded; it lies in here" in done.out and not hub.files
    for file in (tmp_path / "here").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert json.loads((tmp_path / "here" / "adapter.json").read_text())["backbone"] == "someone/base"
    refused(astbench("push", "run", "someone/a", "--out=here"), 2, "--out=here is there already")
    again = validated(astbench, tmp_path / "again", f"--backbone={base}", "--init_from=here")
    assert again["metrics"] == json.loads((tmp_path / "run" / RECORD).read_text())["metrics"]

    source = read_source(tmp_path / "run", "")
    folder = tmp_path / "leak"
    folder.mkdir()
    for text, said in ((f"from {base}", "a path of this machine"), ("hf_" + "b" * 30, "a token of the hub")):
        (folder / "README.md").write_text(text)
        with pytest.raises(ConfigError, match=said):
            check_private(source, folder)
    (folder / "README.md").write_text("nothing")
    check_private(source, folder)
    (folder / "last.ckpt").touch()
    with pytest.raises(ConfigError, match=r"last\.ckpt is no file that is pushed"):
        check_private(source, folder)


def test_refusals(hub, astbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(astbench("push", "nowhere", "someone/a"), 2, "nowhere is not the folder of a run")
    (tmp_path / "empty").mkdir()
    refused(astbench("push", "empty", "someone/a"), 3, "it holds no record.json")
    refused(astbench("push", "empty", "a/b/c"), 2, "OWNER/NAME must be a name on the hub")
    refused(astbench("push", "empty"), 2, "OWNER/NAME")
    fit(astbench, tmp_path / "run")
    refused(astbench("push", "run", "someone/a", "--adapter"), 2, "trained the preset", "leave --adapter out")
    hub.files["someone/a"] = {"README.md": b"theirs"}
    refused(astbench("push", "run", "someone/a"), 2, "on the hub already; --update")
    assert hub.files["someone/a"] == {"README.md": b"theirs"} and not hub.commits
    assert astbench("push", "run", "someone/a", "--update").code == 0 and len(hub.files["someone/a"]) > 5
    hub.deny = True
    refused(astbench("push", "run", "someone/b"), 7, "someone/b cannot be written on the hub", "hf auth login")
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    (tmp_path / "run" / RECORD).write_text(json.dumps({**record, "state": "interrupted"}))
    refused(astbench("push", "run", "someone/c"), 2, "ended as interrupted")
    (tmp_path / "run" / RECORD).write_text(json.dumps({**record, "plugins": [{"plugin": "./mine.py"}]}))
    refused(astbench("push", "run", "someone/c"), 2, "used ./mine.py, which is not astbench's")

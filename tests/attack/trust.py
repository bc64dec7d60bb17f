"""A: code that other people's files name is not run: configs, run folders, checkpoints, adapters, records, models."""

import json
import os
import pickle
import shutil
import sys

import torch
import yaml

from astbench.backbones.adapters import load_adapter
from astbench.files.writing import sha256
from astbench.runs.folder import CONFIG, LAST, MANIFEST, RECORD
from tests.astbench.conftest import NAMES, tiny_model
from tests.attack import damage
from tests.attack.commands import Child, demand, run
from tests.attack.runs import FIT

EVIL = """from pathlib import Path
Path({trace!r}).touch()
class Evil:
    def __init__(self, *a, **k): Path({trace!r}).touch()
def touch(*a, **k): Path({trace!r}).touch()
"""

CONFIGS = [
    lambda at: {"attention": f"{at}:Evil"},
    lambda at: {"attention": {"name": f"{at}:Evil"}},
    lambda at: {"attention": {"name": [f"{at}:Evil"]}},
    lambda at: {"attention.name": f"{at}:Evil"},
    lambda at: {"model": {"attention": {"name": f"{at}:Evil"}}},
    lambda at: {"attention": {"name": "ast", "options": {"name": f"{at}:Evil"}}},
    lambda at: {"task": f"{at}:Evil"},
    lambda at: {"task": {"name": f"{at}:Evil"}},
    lambda at: {"plugins": [at]},
    lambda at: {"plugins": at},
    lambda at: {"plugins+": [at]},
    lambda at: {"config": "inner.yaml"},
    lambda at: {"trust_config": True, "plugins": [at]},
    lambda at: {"trainer": {"callbacks": [{"class_path": "evil.Evil"}]}},
    lambda at: {"trainer": {"callbacks": [{"class_path": "evil.touch"}]}},
    lambda at: {"trainer": {"callbacks": {"class_path": "evil.Evil"}}},
    lambda at: {"trainer.callbacks": [{"class_path": "evil.Evil"}]},
    lambda at: {"trainer": {"callbacks+": [{"class_path": "evil.Evil"}]}},
    lambda at: {"trainer": {"logger": [{"class_path": "evil.Evil"}]}},
    lambda at: {"trainer": {"strategy": {"class_path": "evil.Evil"}}},
    lambda at: {"trainer": {"plugins": [{"class_path": "evil.Evil"}]}},
    lambda at: {"trainer": {"profiler": {"class_path": "evil.Evil"}}},
    lambda at: {"optim": {"class_path": "evil.Evil"}},
    lambda at: {"optimizer": {"class_path": "evil.Evil"}},
    lambda at: {"data": {"class_path": "evil.Evil"}},
    lambda at: {"model": {"class_path": "evil.Evil"}},
    lambda at: {"loggers": ["evil.Evil"]},
    lambda at: {"backbone": {"name": f"{at}:Evil"}},
    lambda at: lambda_callback("evil.touch"),
    lambda at: lambda_callback("lightning.pytorch.callbacks.callback.evil.touch"),
]
"""What a config may try, given how it names the file."""

TAGS = ["!!python/object/apply:evil.touch []", "!!python/name:evil.touch", "!!python/object/new:evil.Evil []",
        "!!python/module:evil"]  # fmt: skip


def lambda_callback(function):
    moment = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": function}}
    return {"trainer": {"callbacks": [moment]}}


class Touch:
    """What leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def trial(rng, folder, shared):
    shared.once("control", control)
    (folder / "evil.py").write_text(EVIL.format(trace=str(folder / "trace")))
    (folder / "link.py").symlink_to(folder / "evil.py")
    at = rng.choice(
        ["./evil.py", "evil.py", str(folder / "evil.py"), f"../{folder.name}/evil.py", "./link.py", "evil", "~/evil.py"]
    )
    kinds = [config, config, config, run_folder, run_folder, checkpoint, an_adapter, record, backbone]
    what = rng.choice(kinds)(rng, folder, shared, at)
    demand(not (folder / "trace").exists(), f"{what}: the code ran")


def control(folder):
    """With trust the code does run, and is seen to."""
    (folder / "evil.py").write_text(EVIL.format(trace=str(folder / "trace")))
    (folder / "c.yaml").write_text(f"plugins: ['{folder / 'evil.py'}']\n")
    asked([*FIT, f"--config={folder / 'c.yaml'}", "--trust_config", "--trainer.max_steps=1"], folder)
    demand((folder / "trace").exists(), "code that is trusted leaves no trace, so none of these trials could fail")


def asked(words, folder):
    """A command in a folder that Python imports from too."""
    env = {"HOME": str(folder), "PYTHONPATH": str(folder)}
    return run(words, folder, cwd=folder, env=env, before=lambda: sys.path.insert(0, str(folder)))


def tried(words, folder, how):
    """A command that ends as documented; what it was."""
    what = f"{' '.join(words)} {how}"
    asked(words, folder).must_be_clear(what=what)
    return what


def written(rng, content):
    """As YAML, laid out one way or another."""
    return yaml.safe_dump(content, default_flow_style=rng.choice([None, False, True]))


def config(rng, folder, shared, at):
    (folder / "inner.yaml").write_text(yaml.safe_dump({"plugins": [at]}))
    if rng.random() < 0.15:
        text = f"{rng.choice(['optim', 'plugins', 'attention', 'seed'])}: {rng.choice(TAGS)}\n"
    else:
        text = written(rng, rng.choice(CONFIGS)(at))
    if rng.random() < 0.2:
        text += f"seed: {rng.randrange(9)}\n" if "{" not in text[:1] else ""
    (folder / "c.yaml").write_text(text)
    use = rng.choice(["fit", "fit", "fit", "validate", "test", "predict", "bench", "group"])
    if use == "bench":
        words = ["bench", "--config=c.yaml", "--run_dir=out"]
    elif use == "group":
        group = rng.choice(["attention", "task", "data", "trainer", "optim", "backbone", "model"])
        inner = yaml.safe_load(text) if "!!" not in text else None
        if isinstance(inner, dict) and isinstance(inner.get(group), dict):
            (folder / "c.yaml").write_text(written(rng, inner[group]))
        words = [*FIT, f"--{group}=c.yaml", "--run_dir=out", "--trainer.max_steps=1"]
    else:
        names = rng.choice([NAMES, NAMES[1:], NAMES[:1], []])
        words = [use, *names, "--config=c.yaml", "--data.source=local", "--run_dir=out"]
        if use == "fit" and names is NAMES and rng.random() < 0.5:
            words = [*FIT, "--config=c.yaml", "--run_dir=out", "--trainer.max_steps=1"]
    return tried(words, folder, f"with {text.strip()!r}")


USES = [["validate", "--ckpt_path=run", "--run_dir=out"], ["fit", "--resume=run"],
        [*FIT, "--init_from=run", "--run_dir=out", "--trainer.max_steps=1"],
        ["test", "--ckpt_path=run/last.ckpt", "--run_dir=out"],
        ["predict", "--ckpt_path=run", "--data.question=who?", "--data.document=c.yaml"],
        ["fit", "--config=run/config.yaml", "--run_dir=out"]]  # fmt: skip


def run_folder(rng, folder, shared, at):
    """A run's folder whose config, record or tokenizer a stranger wrote, digests and all."""
    place = shared.stopped(folder / "run")
    (folder / "c.yaml").write_text("x\n")
    content = yaml.safe_load((place / CONFIG).read_text())
    put = rng.choice(CONFIGS)(at)
    for key, value in put.items():
        both = isinstance(value, dict) and isinstance(content.get(key), dict)
        content[key] = {**content[key], **value} if both else value
    (place / CONFIG).write_text(yaml.safe_dump(content))
    data = json.loads((place / RECORD).read_text())
    data["config_sha256"] = sha256(place / CONFIG)
    data["plugins"] = [{"plugin": at}]
    (place / RECORD).write_text(json.dumps(data))
    if rng.random() < 0.3:
        remote_code(place / "tokenizer" / "tokenizer_config.json")
        shutil.copy(folder / "evil.py", place / "tokenizer")
    words = rng.choice(USES)
    return tried(words, folder, f"of a config with {put}")


def remote_code(file):
    """A JSON file of transformers that asks for code beside it."""
    content = json.loads(file.read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")
    content["auto_map"] = {**dict.fromkeys(names, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    content |= {"trust_remote_code": True, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(content))


def checkpoint(rng, folder, shared, at):
    """A checkpoint that its manifest vouches for: with code to unpickle, or names of code."""
    place = shared.stopped(folder / "run")
    (folder / "c.yaml").write_text("x\n")
    content = torch.load(place / LAST, weights_only=True)
    evil = Touch(folder / "trace")
    how = rng.choice(["pickle", "whole", "plain", "attention", "hyper"])
    if how == "pickle":
        content[rng.choice(list(content))] = evil
    elif how == "attention":
        content["hyper_parameters"]["attention"]["name"] = f"{at}:Evil"
    elif how == "hyper":
        content["hyper_parameters"]["_target_"] = content["hyper_parameters_type"] = f"{at}:Evil"
        content["hparams_name"], content["datamodule_hyper_parameters"] = "evil.Evil", {"_class_path": "evil.Evil"}
        content["callbacks"] = {"evil.Evil": {}, f"{at}:Evil{{}}": {}}
    if how == "plain":
        (place / LAST).write_bytes(pickle.dumps(evil, protocol=rng.randrange(2, 5)))
    else:
        torch.save(evil if how == "whole" else content, place / LAST)
    (place / MANIFEST).write_text(json.dumps({sha256(place / LAST): {"step": 4, "epoch": 0}}))
    words = rng.choice(USES[:-1])
    return tried(words, folder, f"of a checkpoint ({how})")


def an_adapter(rng, folder, shared, at):
    _, whole, _ = shared.once("adapter", damage.adapter)
    shutil.copytree(whole, folder / "adapter")
    content = json.loads((folder / "adapter/adapter.json").read_text())
    del content["sha256"]
    content[rng.choice(["attention", "attention", "backbone"])] = f"{at}:Evil"
    if rng.random() < 0.3:
        (folder / "adapter/adapter.safetensors").write_bytes(pickle.dumps(Touch(folder / "trace")))
    (folder / "adapter/adapter.json").write_text(json.dumps(content))

    def load():
        sys.path.insert(0, str(folder))
        load_adapter(tiny_model("llama"), folder / "adapter")

    Child(load, folder, cwd=folder).ended()
    return f"an adapter of {content['attention']}"


def record(rng, folder, shared, at):
    """A stranger's record among results."""
    place = folder / "results/stranger/one"
    place.mkdir(parents=True)
    names = {"attention": {"name": f"{at}:Evil"}, "task": {"name": "triviaqa"}, "data": {"source": "demo"}}
    if rng.random() < 0.5:
        names = {**names, "attention": {"name": "ast"}, "task": {"name": f"{at}:Evil"}}
    data = {"schema": 1, "command": "fit", "state": "done", "started": "2026-01-01T00:00:00Z", "config_hash": "1"}
    data |= {"config": {**names, "plugins": [at]}, "plugins": [{"plugin": at}], "argv": ["astbench", "fit"]}
    (place / RECORD).write_text(json.dumps(data))
    if rng.random() < 0.5:
        (place.parent / "table.yaml").write_text(f"title: {rng.choice([at, TAGS[0]])}\nplugins: [{at}]\n")
    words = ["table", *rng.choice([["stranger"], [], ["--check"]]), "--results=results", "--docs=."]
    ended = asked(words, folder)
    if "--check" not in words:  # which ends with 1 where it finds something
        ended.must_be_clear()
    return " ".join(words)


def backbone(rng, folder, shared, at):
    """A pretrained model with code beside it, or pickled weights."""
    place = folder / "model"

    def saved(where):
        Child(lambda: tiny_model("bert").save_pretrained(where / "model"), where).ended()
        return where / "model"

    shutil.copytree(shared.once("model", saved), place)
    shutil.copytree(shared.stopped(folder / "run") / "tokenizer", place, dirs_exist_ok=True)
    shutil.copy(folder / "evil.py", place)
    how = rng.choice(["code", "code", "pickle"])
    if how == "code":
        remote_code(place / rng.choice(["config.json", "config.json", "tokenizer_config.json"]))
    else:
        (place / "model.safetensors").unlink()
        torch.save({"x": Touch(folder / "trace")}, place / "pytorch_model.bin")
    words = [*FIT, "--backbone=./model", "--run_dir=out", "--trainer.max_steps=1"]
    return tried(words, folder, f"with {how}")

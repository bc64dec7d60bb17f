"""lm-eval's tasks asked of swapped models: against lm-eval's own command, and what is refused."""

import json
from importlib.util import find_spec

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from astbench.runs.folder import RECORD
from astbench.tasks.harness.prompts import leading
from tests.astbench.conftest import tiny_model

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lmeval is not installed")

AST = ["--attention=ast", "--attention.block_size=4", "--attention.density=0.5", "--attention.min_blocks=2"]


@pytest.fixture
def ask(astbench, backbone, own_tasks, tmp_path):
    """`ask("run", options)`: what `astbench test --task=lm_eval` left, or how it was refused."""

    def ask(name, *options, tasks="own_choice,own_write", attention=("--attention=dense",), include=True):
        given = [f"--data.include={own_tasks}"] if include else []
        done = astbench(
            *("test", "--task=lm_eval", *attention, f"--backbone={backbone}", f"--data.tasks={tasks}", *given),
            *("--data.max_length=128", "--trainer.threads=1", f"--run_dir={tmp_path / name}", *options),
        )
        if done.code:
            assert len(done.err.splitlines()) == 1, done.err
            assert not (tmp_path / name).exists(), "a refused run leaves nothing behind"
            return done, None
        record = json.loads((tmp_path / name / RECORD).read_text())
        return record, json.loads((tmp_path / name / "items.json").read_text())

    return ask


def test_a_dense_model_scores_as_in_lm_evals_own_class(ask, backbone, own_tasks):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    record, items = ask("dense")
    model = HFLM(
        AutoModelForCausalLM.from_pretrained(backbone),
        tokenizer=AutoTokenizer.from_pretrained(backbone),
        max_length=128,
    )
    own = simple_evaluate(
        model, tasks=["own_choice", "own_write"], task_manager=TaskManager(include_path=own_tasks), bootstrap_iters=0
    )
    assert record["metrics"]["own_choice/acc"] == own["results"]["own_choice"]["acc,none"]
    assert record["metrics"]["own_write/letters"] == own["results"]["own_write"]["letters,none"] > 0
    for task, samples in own["samples"].items():
        for sample in samples:
            item = items[f"{task}/{sample['doc_id']}"]
            assert item["prompt_sha256"] == sample["prompt_hash"]
            if task == "own_write":
                assert item["answer"] == sample["filtered_resps"][0]
            else:
                scored = [part[0] for part in sample["filtered_resps"]]
                assert [part[0] for part in item["answer"]] == pytest.approx(scored, abs=1e-4)
    assert len(items) == 16 and record["data"]["examples"] == {"test": 16}
    mean = sum(item["score"] for item in items.values()) / 16
    assert record["metrics"]["score"] == pytest.approx(mean)
    assert record["density"]["mean"] == 1.0 and record["state"] == "done"
    tasks = record["data"]["tasks"]
    assert tasks["own_choice"]["version"] == 2.0 and tasks["own_choice"]["from"] == "--data.include"
    assert len(tasks["own_write"]["sha256"]) == 64
    assert "own_choice (version 2.0)" in record["signature"] and "no chat template" in record["signature"]


def test_two_attentions_are_asked_the_same_and_stand_in_one_table(ask, astbench, tmp_path):
    dense, dense_items = ask("runs/dense", "--data.max_eval=5")
    ast, ast_items = ask("runs/ast", "--data.max_eval=5", attention=AST)
    assert dense["data"]["fingerprints"] == ast["data"]["fingerprints"]
    assert dense_items.keys() == ast_items.keys() and len(ast_items) == 10
    for name, item in dense_items.items():
        assert item["prompt_sha256"] == ast_items[name]["prompt_sha256"]
    assert any(dense_items[name]["answer"] != ast_items[name]["answer"] for name in ast_items), "another attention ran"
    assert 0 < ast["density"]["mean"] < 1
    other, _ = ask("other", "--data.max_eval=4")
    assert other["data"]["fingerprints"] != dense["data"]["fingerprints"]
    shown = astbench("table", "runs", f"--results={tmp_path}")
    assert shown.code == 0 and "over dense" in shown.out and "score" in shown.out, shown.err


def test_the_audit_tells_what_was_put_before_a_prompt(ask):
    plain, _ = ask("plain", "--data.max_eval=2", tasks="own_write")
    audit = plain["audit"]
    assert audit["bos_token"] == "<s>" and audit["tokenizer_puts"] == {"before": ["<s>"], "behind": []}
    assert audit["chat_template"]["there"] and not audit["chat_template"]["applied"]
    assert audit["prompts"]["by_leading_bos"] == audit["model_got"]["by_leading_bos"] == {"1": 2}
    assert audit["prompts"]["tokens"] == audit["model_got"]["tokens"]
    assert audit["first"]["own_write"]["begins"].startswith("<s>The ship")
    assert "start token (BOS) <s>: 2 prompts begin with 1; the tokenizer itself adds <s>" in plain["notes"]
    assert any("has a chat template, which is not applied" in note for note in plain["notes"])

    chat, _ = ask(
        "chat", "--data.max_eval=2", "--data.chat_template=true", "--data.system=Be brief.", tasks="own_write"
    )
    template = chat["audit"]["chat_template"]
    assert template["applied"] and template["before"] == "[system] Be brief. [user] "
    assert template["behind"].endswith("[go]") and len(template["sha256"]) == 64
    assert chat["audit"]["first"]["own_write"]["begins"].startswith("<s>[system] Be brief. [user] The ship")
    assert "chat template," in chat["signature"]
    assert chat["data"]["fingerprints"] != plain["data"]["fingerprints"]


@pytest.mark.parametrize(("ids", "bos", "number"), [([1, 1, 5, 1], 1, 2), ([5, 1], 1, 0), ([1], 1, 1), ([1], None, 0)])
def test_start_tokens_in_front(ids, bos, number):
    assert leading(ids, bos) == number


def test_what_is_too_long_is_refused_or_cut_and_said(ask):
    done, _ = ask("refused", "--data.max_length=20")
    assert done.code == 2 and "prompts are longer than --data.max_length=20 allows" in done.err
    assert "--data.too_long=cut" in done.err
    record, items = ask("cut", "--data.max_length=20", "--data.too_long=cut", "--data.max_eval=3")
    assert record["audit"]["cut"] > 0 and any("cut off their beginning" in note for note in record["notes"])
    assert all(item["cut"] > 0 for item in items.values())
    assert record["audit"]["model_got"]["tokens"]["most"] <= 20
    assert record["audit"]["model_got"]["by_leading_bos"] == {"0": record["audit"]["model_got"]["inputs"]}, "cut too"
    done, _ = ask("no-room", "--data.max_length=6", tasks="own_write")
    assert done.code == 2 and "leaves no room for its prompt" in done.err
    done, _ = ask("positions", "--data.max_length=2049")
    assert done.code == 2 and "longer than the backbone's position table of 2048" in done.err


def test_refusals(ask, astbench, backbone, own_tasks, tmp_path, monkeypatch):
    done, _ = ask("a", tasks="niah_singel_1")
    assert done.code == 4 and "lm-eval has no task 'niah_singel_1'; did you mean 'niah_single_1'?" in done.err
    done, _ = ask("a", tasks=str(own_tasks / "own_write.yaml"), include=False)
    assert done.code == 4, "a path is no name, whatever lm-eval would make of it"
    done, _ = ask("a", tasks=" , ")
    assert done.code == 2 and "--data.tasks=NAMES is required" in done.err
    done, _ = ask("a", "--data.system=x")
    assert done.code == 2 and "--data.chat_template=true" in done.err
    done, _ = ask("a", "--data.include=nowhere", include=False)
    assert done.code == 3 and "--data.include=nowhere is not a folder" in done.err
    done, _ = ask("a", "--data.haystack=nowhere")
    assert done.code == 3 and "--data.haystack=nowhere does not exist" in done.err
    done, _ = ask("a", "--data.lengths=[64,256]")
    assert done.code == 2 and "--data.lengths must lie between 1 and --data.max_length=128" in done.err
    done, _ = ask("a", attention=["--attention=dsa"])
    assert done.code == 2 and "cannot decode" in done.err
    done, _ = ask("a", tasks="own_unsafe")
    assert done.code == 2 and "own_unsafe runs code that the model wrote" in done.err
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    done, _ = ask("a", tasks="longbench_triviaqa", include=False)
    assert done.code in (3, 7) and "longbench_triviaqa" in done.err, "no network, or no jieba: one line"

    tiny_model("bert").save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "bert")
    encoder, _ = ask("a", f"--backbone={tmp_path / 'bert'}", "--data.max_length=64")
    assert encoder.code == 2 and "needs a causal language model" in encoder.err and "BertForMaskedLM" in encoder.err

    for command in ("fit", "predict"):
        other = astbench(command, "--attention=dense", "--task=lm_eval", "--data.tasks=own_write")
        assert other.code == 2 and "has only `astbench test`" in other.err

    monkeypatch.setattr("astbench.tasks.harness.catalogue.find_spec", lambda name: None)
    missing, _ = ask("a")
    assert missing.code == 7 and "pip install 'astbench[lmeval]'" in missing.err


def test_code_runs_only_where_the_command_line_says_so(ask, astbench, backbone, own_tasks, tmp_path):
    trace = own_tasks / "trace"
    trace.unlink(missing_ok=True)
    config = tmp_path / "theirs.yaml"
    config.write_text(f"data:\n  include: {own_tasks}\n  tasks: own_write\n  max_eval: 1\n  max_length: 128\n")
    words = ["test", "--attention=dense", "--task=lm_eval", f"--backbone={backbone}", f"--config={config}"]
    done = astbench(*words, f"--run_dir={tmp_path / 'run'}")
    assert done.code == 2 and "what lies there is code: type the option to run it" in done.err
    (tmp_path / "group.yaml").write_text(f"include: {own_tasks}\ntasks: own_write\nmax_eval: 1\nmax_length: 128\n")
    done = astbench(*words[:-1], f"--data={tmp_path / 'group.yaml'}", f"--run_dir={tmp_path / 'run'}")
    assert done.code == 2 and "what lies there is code" in done.err, "a file of options is a file too"
    assert not trace.exists()
    for more in ("--trust_config", f"--data.include={own_tasks}"):
        trace.unlink(missing_ok=True)
        done = astbench(*words, f"--run_dir={tmp_path / more.partition('=')[0]}", more)
        assert done.code == 0 and trace.exists(), done.err


def test_a_run_is_asked_with_the_weights_it_trained(ask, astbench, tmp_path):
    fit = [
        *("fit", *AST, "--task=wikitext103", "--data.demo_train=20", "--data.demo_eval=3", "--data.context=128"),
        *("--data.batch_size=2", "--trainer.max_steps=2", "--trainer.threads=1", f"--run_dir={tmp_path / 'fit'}"),
    ]
    assert astbench(*fit).code == 0
    given = [f"--ckpt_path={tmp_path / 'fit'}", "--data.max_eval=2", "--backbone.name=llama-copying-tiny"]
    record, items = ask("run", *given, attention=())
    assert record["config"]["attention"]["name"] == "ast" and record["checkpoint"].endswith("last.ckpt")
    assert len(items) == 4 and record["audit"]["bos_token"] == "<|endoftext|>"


@pytest.mark.slow
def test_ruler_hides_its_needles_in_local_text(ask, backbone, tmp_path):
    """At seed 0 the texts are those of lm-eval's own command; essays come from the file alone."""
    import random

    from lm_eval.tasks import TaskManager
    from lm_eval.utils import hash_string

    (tmp_path / "hay.txt").write_text(" ".join(f"It is {n}." for n in range(3000)))
    given = [f"--data.haystack={tmp_path}", "--data.max_length=2048", "--data.max_eval=2"]
    record, items = ask("ruler", *given, tasks="niah_single_1,niah_single_2", include=False)
    assert set(record["metrics"]) == {"score", "niah_single_1/2048", "niah_single_2/2048"}
    assert len(record["data"]["haystack_sha256"]) == 64
    assert all(item["prompt_tokens"] > 500 for item in items.values()), "the essays are there"
    assert all(item["target"].strip("[']").isdecimal() for item in items.values())

    random.seed(0)
    (task,) = (
        TaskManager(metadata={"max_seq_lengths": [2048], "tokenizer": str(backbone)})
        .load("niah_single_1")["tasks"]
        .values()
    )
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=2)
    own = [hash_string(request.args[0]) for request in task.instances]
    assert own == [items[f"niah_single_1/{n}"]["prompt_sha256"] for n in range(2)]

    unread, _ = ask("unread", *given, tasks="niah_single_1", include=False)
    assert any("--data.haystack was not read" in note for note in unread["notes"])

"""A tokenizer that begins every text with a token of its own: prompts and windows begin with it, and it is said."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from astbench.backbones.tokenizers import start_token, train_byte_tokenizer, train_tokenizer
from astbench.runs.folder import RECORD
from astbench.tasks.lm import demo as lm_demo
from tests.astbench.cli.test_cli import assert_refused

TEXT = lm_demo.generate("test", 2).text
CONTEXT = 48
START = "<s>"


def with_template(single):
    """A byte-level tokenizer that puts special tokens around every text."""
    tokenizer = train_byte_tokenizer([TEXT], 400)
    tokenizer.add_special_tokens({"bos_token": START, "eos_token": "</s>"})
    inner = tokenizer.backend_tokenizer
    special = [(token, inner.token_to_id(token)) for token in (START, "</s>")]
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=START, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folder, model and tokenizer of a random Llama."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), with_template(f"{START} $A")
    torch.manual_seed(4)
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
    settings |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **settings))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wiki.test.raw").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(astbench, command, folder, *options):
    done = astbench(
        command, "--task=wikitext103", "--attention=dense", f"--backbone={folder}", "--run_dir=run", *options
    )
    assert done.code == 0, done.err
    return json.loads(Path("run", RECORD).read_text())


def test_where_a_tokenizer_begins_its_texts():
    assert start_token(with_template(f"{START} $A")) is not None
    assert start_token(with_template(f"{START} $A </s>")) is not None
    assert start_token(with_template("$A </s>")) is None
    assert start_token(train_byte_tokenizer([TEXT], 300)) is None
    assert start_token(train_tokenizer([TEXT], 100)) is None  # [CLS] is no beginning of a sequence


def test_a_prompt_is_tokenized_as_transformers_does(astbench, pretrained, here):
    folder, model, tokenizer = pretrained
    record = run(astbench, "predict", folder, "--data.prompt=Old maps show the ship", "--task.max_new_tokens=9")
    ids = tokenizer("Old maps show the ship", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    out = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :].tolist()
    assert record["continuation"]["tokens"] == out
    assert (
        record["signature"] == f"{len(out)} tokens after a prompt of {ids.shape[1]} with <s> from its tokenizer, greedy"
    )


def test_an_empty_prompt_is_refused_although_it_would_begin(astbench, pretrained, here):
    words = ["predict", "--task=wikitext103", "--attention=dense", f"--backbone={pretrained[0]}", "--run_dir=run"]
    (here / "blank.txt").write_text("")
    assert_refused(astbench(*words, "--data.prompt_file=blank.txt"), 3, "is empty")


def plain(model, tokenizer, stride):
    """Every window begins with the start token, which is never scored; nor is the text's first token."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    room, nll, count, scored_to = CONTEXT - 1, 0.0, 0, 1
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + room]
        with torch.no_grad():
            log_p = model(torch.tensor([[tokenizer.bos_token_id, *window]])).logits[0].double().log_softmax(-1)
        for place in range(max(scored_to, begin + 1), begin + len(window)):
            nll -= float(log_p[place - begin, ids[place]])
            count += 1
        scored_to = begin + len(window)
        if scored_to == len(ids):
            break
    return math.exp(nll / count), count


@pytest.mark.parametrize("stride", [CONTEXT, 20])
@pytest.mark.parametrize("incremental", [False, True])
def test_windows_begin_with_it_and_the_signature_says_so(astbench, pretrained, here, stride, incremental):
    folder, model, tokenizer = pretrained
    options = ["--data.source=local", "--data.path=.", f"--data.context={CONTEXT}", f"--data.stride={stride}"]
    record = run(astbench, "test", folder, *options, f"--task.incremental={str(incremental).lower()}")
    expected, count = plain(model, tokenizer, min(stride, CONTEXT - 1))
    assert record["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert record["data"]["scored"] == count
    assert (
        f"context {CONTEXT} (the first of them <s>, never scored), stride {min(stride, CONTEXT - 1)}, {count} tokens"
        in record["signature"]
    )


def test_a_window_is_never_longer_than_its_context(astbench, pretrained, here):
    """The model has 64 positions."""
    options = ["--data.source=local", "--data.path=.", "--data.context=64"]
    assert run(astbench, "test", pretrained[0], *options)["data"]["context"] == 64
    words = ["test", "--task=wikitext103", "--attention=dense", f"--backbone={pretrained[0]}", *options[:2]]
    assert_refused(astbench(*words, "--data.context=2", "--run_dir=r"), 2, "at least 3 tokens", "begins with <s>")


@pytest.mark.parametrize("documents", ["packed", "separate"])
def test_training_windows_begin_with_it_too(astbench, pretrained, here, documents):
    for split in ("train", "valid"):
        Path(f"wiki.{split}.raw").write_text(TEXT, encoding="utf-8")
    options = ["--data.source=local", "--data.path=.", "--data.context=32", f"--data.documents={documents}"]
    record = run(astbench, "fit", pretrained[0], *options, "--trainer.max_steps=2", "--data.batch_size=2")
    assert "(the first of them <s>, never scored)" in record["signature"]


@pytest.mark.parametrize(("split", "file"), [("validation", "wiki.valid.raw"), ("test", "wiki.test.raw")])
def test_the_evaluation_split_is_an_option(astbench, pretrained, here, split, file):
    for name in ("train", "valid"):
        Path(f"wiki.{name}.raw").write_text(TEXT, encoding="utf-8")
    options = ["--data.source=local", "--data.path=.", "--data.context=32", f"--data.eval_split={split}"]
    record = run(astbench, "validate", pretrained[0], *options)
    assert (
        record["split"] == split
        and f"scored of wiki.{split[:5] if split != 'test' else 'test'}.raw" in record["signature"]
    )


def test_a_split_that_is_not_there_is_an_error(astbench, pretrained, here):
    words = ["validate", "--task=wikitext103", "--attention=dense", f"--backbone={pretrained[0]}", "--run_dir=run"]
    assert_refused(astbench(*words, "--data.source=local", "--data.path=."), 3, "holds none of wiki.valid.raw")

"""Perplexity of a tiny pretrained Llama through the command line, against a plain loop."""

import gzip
import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from astbench.runs.folder import RECORD
from astbench.tasks import qa_demo
from astbench.tasks.lm_data import WikiTextData
from astbench.tokenizers import train_tokenizer

CONTEXT = 48


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama whose logits are far from uniform, and its tokenizer, as a pretrained folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([text()], 300)
    torch.manual_seed(4)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


def text():
    return qa_demo.generate("test", 2)[0].context


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with the test split in its original form."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "wikitext"
    folder.mkdir()
    (folder / "wiki.test.raw").write_text(text(), encoding="utf-8")
    return folder


def plain_perplexity(model, tokenizer, context, stride):
    """Hugging Face's recipe, one window after the other, on the stock model."""
    ids = torch.tensor(tokenizer(text(), add_special_tokens=False)["input_ids"])
    nll, count, scored_to = 0.0, 0, 1
    for start in range(0, len(ids), stride):
        stop = min(start + context, len(ids))
        with torch.no_grad():
            log_p = model(ids[None, start:stop]).logits[0].double().log_softmax(-1)
        for position in range(max(scored_to, start + 1), stop):
            nll -= float(log_p[position - 1 - start, ids[position]])
            count += 1
        scored_to = max(scored_to, stop)
        if stop == len(ids):
            break
    return math.exp(nll / count), count


def record_after(astbench, model_folder, data, *options, attention="dense"):
    words = ["test", "--task=wikitext103", f"--attention={attention}", f"--backbone={model_folder}"]
    done = astbench(*words, f"--data.path={data}", f"--data.context={CONTEXT}", "--run_dir=run", *options)
    assert done.code == 0, done.err
    return json.loads((data.parent / "run" / RECORD).read_text())


@pytest.mark.parametrize("stride", [CONTEXT, 20, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity_is_the_plain_loops(astbench, model_folder, data, stride, batch):
    folder, model, tokenizer = model_folder
    record = record_after(astbench, folder, data, f"--data.stride={stride}", f"--data.eval_batch_size={batch}")
    expected, count = plain_perplexity(model, tokenizer, CONTEXT, stride)
    assert record["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert record["data"]["scored"] == count
    assert f"context {CONTEXT}, stride {stride}, {count} tokens scored of wiki.test.raw" in record["signature"]


def test_ast_at_full_density_is_dense_and_sparse_is_not(astbench, model_folder, data):
    folder, model, tokenizer = model_folder
    expected, _ = plain_perplexity(model, tokenizer, CONTEXT, CONTEXT)
    options = ["--attention.block_size=4", "--attention.min_blocks=1"]
    full = record_after(astbench, folder, data, "--attention.density=1.0", *options, attention="ast")
    assert full["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert full["density"]["mean"] == pytest.approx(1.0)
    words = ["--attention.density=0.25", *options, "--run_dir=sparse"]
    record_after(astbench, folder, data, *words, attention="ast")
    sparse = json.loads((data.parent / "sparse" / RECORD).read_text())
    assert sparse["metrics"]["perplexity"] != pytest.approx(expected, rel=1e-3)
    assert sparse["density"]["mean"] < 0.7


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("length", [2, 15, 16, 17, 100])
def test_each_token_but_the_first_is_scored_exactly_once(length, stride):
    data = WikiTextData(context=16, stride=stride)
    ids = torch.arange(length)
    scored = [int(i) for window, count in data._cut(ids) for i in window[len(window) - count :]]
    if stride == 16:
        # Without overlap nothing comes before a window's first token.
        assert scored == [i for i in range(length) if i % 16]
    else:
        assert scored == list(range(1, length))


def test_windows_are_spread_over_the_text(model_folder, astbench, data):
    cut = WikiTextData(context=10, windows=4)._cut(torch.arange(90))
    assert [(int(w[0]), len(w), count) for w, count in cut] == [(s, 10, 9) for s in (0, 20, 40, 60)]
    record = record_after(astbench, model_folder[0], data, "--data.windows=3")
    assert record["data"]["windows"] == 3
    assert record["data"]["scored"] == 3 * (CONTEXT - 1)


def test_gzipped_and_single_files(astbench, model_folder, data):
    plain = record_after(astbench, model_folder[0], data)["metrics"]
    file = data / "wiki.test.raw"
    packed = data / "wiki.test.raw.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    for number, path in enumerate((data, packed)):
        words = ["test", "--task=wikitext103", "--attention=dense", f"--backbone={model_folder[0]}"]
        done = astbench(*words, f"--data.path={path}", f"--data.context={CONTEXT}", f"--run_dir=again{number}")
        assert done.code == 0, done.err
        assert json.loads((data.parent / f"again{number}" / RECORD).read_text())["metrics"] == plain


def refused(astbench, model_folder, data, *options):
    words = ["test", "--task=wikitext103", "--attention=dense", f"--backbone={model_folder}", f"--data.path={data}"]
    outcome = astbench(*words, "--data.context=48", "--run_dir=run", *options)
    assert len(outcome.err.splitlines()) == 1 and outcome.err.startswith("astbench: error: ")
    assert not (data.parent / "run").exists()
    return outcome


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--data.context=1"], 2, "--data.context must be at least 2"),
        (["--data.stride=49"], 2, "--data.stride must be between 1 and context=48"),
        (["--data.windows=0"], 2, "--data.windows must be at least 1"),
        (["--data.eval_batch_size=0"], 2, "--data.eval_batch_size must be at least 1"),
        (["--data.context=257"], 2, "longer than the backbone's position table of 256"),
        (["--backbone=tiny"], 2, "needs trained weights"),
        (["--data.path=/no/where"], 3, "/no/where does not exist"),
        (["--data.path="], 3, "needs --data.path"),
    ],
)
def test_bad_options(astbench, model_folder, data, options, code, part):
    outcome = refused(astbench, model_folder[0], data, *options)
    assert part in outcome.err
    assert outcome.code == code


def test_bad_files(astbench, model_folder, data):
    file = data / "wiki.test.raw"
    file.write_text("")
    assert "holds no text" in refused(astbench, model_folder[0], data).err
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in refused(astbench, model_folder[0], data).err
    packed = data / "wiki.test.raw.gz"
    packed.write_bytes(gzip.compress(text().encode())[:-20])
    file.unlink()
    assert "cannot be read" in refused(astbench, model_folder[0], data).err
    packed.unlink()
    assert "holds none of wiki.test.raw" in refused(astbench, model_folder[0], data).err

"""Language modelling through the command line, on a tiny pretrained Llama and from scratch, against plain loops."""

import csv
import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from astbench.backbones.hooks import AttentionSlot
from astbench.backbones.swap import swap_attention
from astbench.backbones.tokenizers import train_tokenizer
from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import METRICS, RECORD
from astbench.tasks.lm.task import LanguageModel, Scored, perplexities
from astbench.tasks.lm.windows import pad
from astbench.tasks.qa import demo as qa_demo
from tests.astbench.cli.test_cli import assert_refused

CONTEXT = 48


def make_model(folder, num_kv_heads=2):
    """A random Llama whose logits are far from uniform, and its tokenizer, as a pretrained folder."""
    tokenizer = train_tokenizer([text()], 300)
    torch.manual_seed(4)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=256,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Folder, model and tokenizer."""
    return make_model(tmp_path_factory.mktemp("model"))


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


def plain_nll(model, tokenizer, context, stride, text):
    """Hugging Face's recipe, one window after the other, on the stock model: the sum, and which tokens it is over."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    nll, scored = 0.0, []
    for start in range(0, len(ids), stride):
        stop = min(start + context, len(ids))
        with torch.no_grad():
            log_p = model(ids[None, start:stop]).logits[0].double().log_softmax(-1)
        for position in range(max(scored[-1] + 1 if scored else 1, start + 1), stop):
            nll -= float(log_p[position - 1 - start, ids[position]])
            scored.append(position)
        if stop == len(ids):
            break
    return nll, scored


def plain_perplexity(model, tokenizer, context, stride):
    nll, scored = plain_nll(model, tokenizer, context, stride, text())
    return math.exp(nll / len(scored)), len(scored)


def plain_words(tokenizer, text, scored):
    """Words and ends of lines that the scored tokens hold the last character of; what no token holds, the next does."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in coded["offset_mapping"]]
    count, begin = 0, 0
    for line in text.splitlines(keepends=True):
        places = [begin + line.index(word, at) + len(word) for word, at in _places(line)]
        places += [begin + len(line)] if line.endswith("\n") else []
        begin += len(line)
        for place in places:
            count += next((i for i, end in enumerate(ends) if end >= place), len(ends) - 1) in scored
    return count


def _places(line):
    """(word, where to look for it) for each word of a line."""
    at, found = 0, []
    for word in line.split():
        found.append((word, at))
        at = line.index(word, at) + len(word)
    return found


def record_after(astbench, model_folder, data, *options, attention="dense"):
    words = ["test", "--task=wikitext103", f"--attention={attention}", f"--backbone={model_folder}"]
    local = ["--data.source=local", f"--data.path={data}"]
    done = astbench(*words, *local, f"--data.context={CONTEXT}", "--run_dir=run", *options)
    assert done.code == 0, done.err
    folder = next(word.partition("=")[2] for word in ["--run_dir=run", *options][::-1] if word.startswith("--run_dir"))
    return json.loads(Path(folder, RECORD).read_text())


@pytest.mark.parametrize("stride", [CONTEXT, 20, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity_is_the_plain_loops(astbench, model_folder, data, stride, batch):
    folder, model, tokenizer = model_folder
    record = record_after(astbench, folder, data, f"--data.stride={stride}", f"--data.eval_batch_size={batch}")
    expected, count = plain_perplexity(model, tokenizer, CONTEXT, stride)
    assert record["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert record["data"]["scored"] == count
    assert f"context {CONTEXT}, stride {stride}, {count} tokens scored of wiki.test.raw" in record["signature"]
    nll, scored = plain_nll(model, tokenizer, CONTEXT, stride, text())
    words = plain_words(tokenizer, text(), set(scored))
    assert record["metrics"]["word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert f"over {words} words, split at white space and one <eos> a line" in record["signature"]
    if stride < CONTEXT:  # all but the first token, whose bytes are left out
        size = len(text().encode()) - len(
            tokenizer.decode(tokenizer(text(), add_special_tokens=False)["input_ids"][:1])
        )
        assert record["metrics"]["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)


def two_articles():
    first, second = (example.context for example in qa_demo.generate("test", 4)[::2])
    return [f" = One = \n \n {first} \n \n", f" = Two = \n \n {second} \n"]


@pytest.mark.parametrize("stride", [CONTEXT, 20])
def test_separate_articles_are_scored_one_by_one(astbench, model_folder, data, stride):
    folder, model, tokenizer = model_folder
    (data / "wiki.test.raw").write_text("".join(two_articles()), encoding="utf-8")
    options = ["--data.documents=separate", f"--data.stride={stride}", "--data.eval_batch_size=2"]
    record = record_after(astbench, folder, data, *options)
    parts = [plain_nll(model, tokenizer, CONTEXT, stride, article) for article in two_articles()]
    nll, count = sum(part[0] for part in parts), sum(len(part[1]) for part in parts)
    assert record["metrics"]["nll"] == pytest.approx(nll / count, rel=1e-5)
    assert (record["data"]["articles"], record["data"]["scored"]) == (2, count)
    assert "articles separate" in record["signature"]
    packed = record_after(astbench, folder, data, f"--data.stride={stride}", "--run_dir=packed")
    assert "articles packed" in packed["signature"]
    assert packed["metrics"]["nll"] != pytest.approx(nll / count, rel=1e-5)


def test_token_by_token_is_the_same_number_where_nothing_looks_ahead(astbench, model_folder, data):
    """With the KV cache, and from each prefix anew for groups of queries, which cannot decode."""
    folder, model, tokenizer = model_folder
    nll, scored = plain_nll(model, tokenizer, CONTEXT, 20, text())
    words = ["--data.stride=20", "--data.eval_batch_size=3", "--task.incremental=true"]
    record = record_after(astbench, folder, data, *words)
    assert record["metrics"]["nll"] == pytest.approx(nll / len(scored), rel=1e-5)
    assert record["signature"].endswith("token by token with the KV cache") and record["strictly_causal"]
    groups = ["--data.windows=2", *(f"--attention.{o}" for o in ("query_group=4", "block_size=4", "min_blocks=1"))]
    whole = record_after(astbench, folder, data, *groups, "--run_dir=whole", attention="ast")
    steps = record_after(astbench, folder, data, *groups, *words[2:], "--run_dir=steps", attention="ast")
    assert steps["metrics"]["nll"] == pytest.approx(whole["metrics"]["nll"], rel=1e-5)
    assert steps["signature"].endswith("token by token, from each prefix anew")


def test_token_by_token_hides_the_future_from_what_is_not_strictly_causal(astbench, data, tmp_path):
    folder, model, tokenizer = make_model(tmp_path / "model", num_kv_heads=6)
    words = ["--data.windows=1", "--attention.bucket_size=4", "--attention.num_hashes=1"]
    whole = record_after(astbench, folder, data, *words, "--run_dir=whole", attention="reformer")
    record = record_after(astbench, folder, data, *words, "--task.incremental=true", attention="reformer")
    swap_attention(model, "reformer", {"bucket_size": 4, "num_hashes": 1})
    ids = torch.tensor([tokenizer(text(), add_special_tokens=False)["input_ids"][:CONTEXT]])
    with torch.no_grad():
        log_p = [model(ids[:, :n]).logits[0, -1].double().log_softmax(-1)[ids[0, n]] for n in range(1, CONTEXT)]
    expected = -float(sum(log_p)) / (CONTEXT - 1)
    assert record["metrics"]["nll"] == pytest.approx(expected, rel=1e-5)
    assert whole["metrics"]["nll"] != pytest.approx(expected, rel=1e-3)
    assert not whole["strictly_causal"] and not record["strictly_causal"]
    assert "reformer chooses a token's keys with later tokens in sight" in whole["notes"][0]
    assert not record["notes"]


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


def test_windows_are_spread_over_the_text(model_folder, astbench, data):
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
        record_after(astbench, model_folder[0], path, f"--run_dir=again{number}")
        assert json.loads((data.parent / f"again{number}" / RECORD).read_text())["metrics"] == plain


# -- continuing a prompt --------------------------------------------------------------------------------------------

PROMPT = "Few valleys can claim as many makers"


def continuation(astbench, folder, *options, attention="dense"):
    words = ["predict", "--task=wikitext103", f"--attention={attention}", f"--backbone={folder}"]
    done = astbench(*words, "--task.max_new_tokens=9", *options)
    assert done.code == 0, done.err
    return done.out


def record_in(folder):
    return json.loads(Path(folder, RECORD).read_text())


@pytest.mark.parametrize("attention", ["dense", "ast"])
def test_greedy_continuation_is_the_plain_loops(astbench, model_folder, data, attention):
    folder, model, tokenizer = model_folder
    out = continuation(astbench, folder, f"--data.prompt={PROMPT}", "--run_dir=run", attention=attention)
    found = record_in("run")["continuation"]
    ids = tokenizer(PROMPT)["input_ids"]
    start = len(ids)
    for _ in range(9):
        with torch.no_grad():  # at this length ast keeps every block
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found["tokens"] == ids[start:]
    assert found["text"] == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert f"continuation  {found['text']}" in out
    assert record_in("run")["signature"] == (
        f"9 tokens after a prompt of {start} with [CLS] and [SEP] from its tokenizer, greedy"
    )


def test_sampling_is_seeded(astbench, model_folder, data):
    folder = model_folder[0]
    (data / "prompt.txt").write_text(PROMPT)
    ask = [f"--data.prompt_file={data / 'prompt.txt'}", "--task.temperature=1.3"]
    seen = []
    for number, seed in enumerate((5, 5, 6)):
        continuation(astbench, folder, *ask, f"--seed={seed}", f"--run_dir=run{number}")
        seen.append(record_in(f"run{number}")["continuation"]["tokens"])
    assert seen[0] == seen[1] != seen[2]
    assert record_in("run2")["signature"].endswith("sampled at temperature 1.3, seed 6")
    assert record_in("run2")["data"]["source"] == "prompt"


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        ([], 2, "predict needs --data.prompt='...' or --data.prompt_file=FILE"),
        (["--data.prompt=a", "--data.prompt_file=b"], 2, "are two prompts"),
        (["--data.prompt_file=no.txt"], 3, "--data.prompt_file=no.txt does not exist"),
        (["--data.prompt_file=binary.txt"], 3, "--data.prompt_file=binary.txt cannot be read as UTF-8 text"),
        (["--data.prompt_file=empty.txt"], 3, "--data.prompt_file=empty.txt is empty"),
        (["--data.prompt= "], 3, "the prompt holds no token"),
        (["--data.prompt=makers", "--task.max_new_tokens=256"], 2, "are more than the backbone's 256 positions"),
        (["--data.prompt=makers", "--task.temperature=-1"], 2, "--task.temperature must be 0 or more"),
        (["--data.prompt=makers", "--task.max_new_tokens=0"], 2, "--task.max_new_tokens must be at least 1"),
    ],
    ids=["none", "two", "missing", "binary", "empty", "no-token", "too-long", "temperature", "nothing-to-write"],
)
def test_bad_prompts(astbench, model_folder, data, options, code, part):
    (data.parent / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (data.parent / "empty.txt").touch()
    words = ["predict", "--task=wikitext103", "--attention=dense", f"--backbone={model_folder[0]}", "--run_dir=run"]
    assert_refused(astbench(*words, *options), code, part)
    assert not (data.parent / "run").exists()


@pytest.mark.parametrize("options", [["reformer"], ["ast", "--attention.query_group=4"]], ids=["reformer", "groups"])
def test_what_cannot_decode_says_so_before_anything_is_loaded(astbench, data, options):
    words = ["predict", "--task=wikitext103", "--backbone=/no/where", "--data.prompt=a", f"--attention={options[0]}"]
    assert_refused(astbench(*words, *options[1:]), 2, "cannot decode: a step with a KV cache is not what one full pass")


def test_predict_needs_trained_weights(astbench, data):
    words = ["predict", "--task=wikitext103", "--attention=dense", "--data.prompt=a"]
    assert_refused(astbench(*words), 2, "predict needs trained weights", "--init_from=runs/NAME")


# -- refusals -------------------------------------------------------------------------------------------------------


def refused(astbench, model_folder, data, *options):
    words = ["test", "--task=wikitext103", "--attention=dense", f"--backbone={model_folder}", "--data.source=local"]
    outcome = astbench(*words, f"--data.path={data}", "--data.context=48", "--run_dir=run", *options)
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
        (["--data.batch_size=0"], 2, "--data.batch_size must be at least 1"),
        (["--data.max_train=0"], 2, "--data.max_train must be at least 1"),
        (["--data.vocab_size=256"], 2, "--data.vocab_size must be at least 257"),
        (["--data.demo_train=0"], 2, "--data.demo_train must be at least 1"),
        (["--data.source=demo"], 2, "is read with --data.source=local only; --data.source is demo"),
        (["--data.documents=cut"], 2, "--data.documents must be one of 'packed', 'separate', got cut"),
        (["--trainer.limit_test_batches=1"], 2, "would count what it leaves out as done; use --data.windows=N"),
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


def damage(file, how):
    """Make a file one that cannot be used."""
    whole = file.read_bytes()
    if how == "empty":
        file.write_bytes(b"")
    elif how == "blank":
        file.write_bytes(b" \n \n")
    elif how == "encoding":
        file.write_text(whole.decode() + "é!", encoding="latin-1")
    elif how == "gzip":
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(whole)[:-20])
    elif how == "gzip without bytes":
        file.with_name(f"{file.name}.gz").write_bytes(b"")
    elif how == "gzip bytes":
        packed = gzip.compress(whole)
        file.with_name(f"{file.name}.gz").write_bytes(packed[:10] + b"\xff" * 9 + packed[19:])
    if how in ("gzip", "gzip bytes", "gzip without bytes", "missing"):
        file.unlink()


DAMAGES = {
    "empty": "holds no text",
    "blank": "holds no text",
    "encoding": "cannot be read as UTF-8 text: 'utf-8' codec can't decode byte 0xe9",
    "gzip": ".raw.gz cannot be unpacked, the gzip file is cut short or damaged: Compressed file ended",
    "gzip without bytes": ".raw.gz cannot be unpacked, the gzip file is cut short or damaged: it holds no bytes",
    "gzip bytes": ".raw.gz cannot be unpacked, the gzip file is cut short or damaged: Error -3",
    "missing": "holds none of wiki.",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_bad_files(astbench, model_folder, data, how):
    damage(data / "wiki.test.raw", how)
    assert_refused(refused(astbench, model_folder[0], data), 3, DAMAGES[how])


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_bad_training_files_leave_nothing_behind(astbench, data, split, how):
    for name in ("train", "valid"):
        (data / f"wiki.{name}.raw").write_text("".join(two_articles()), encoding="utf-8")
    damage(data / f"wiki.{split}.raw", how)
    words = ["fit", "--task=wikitext103", "--attention=dense", "--data.source=local", f"--data.path={data}"]
    assert_refused(astbench(*words, "--run_dir=run"), 3, DAMAGES[how], str(split))
    assert not (data.parent / "run").exists()


# -- training -------------------------------------------------------------------------------------------------------

FIT = ["fit", "--task=wikitext103", "--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--data.batch_size=2"]
DEMO = ["--data.demo_train=9", "--data.demo_eval=3", "--data.vocab_size=400"]


def losses(folder):
    with open(Path(folder, METRICS), newline="") as lines:
        return [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]


def test_a_run_on_the_demo_from_end_to_end(astbench, data):
    done = astbench(*FIT, *DEMO, "--attention=ast", "--run_dir=run")
    assert done.code == 0, done.err
    assert "demo (generated, not the real data set): " in done.out and " train tokens, " in done.out
    assert "on the real data: astbench fit --attention=ast --task=wikitext103 --data.source=hub" in done.out
    record = record_in("run")
    assert record["metrics"].keys() >= {"perplexity", "word_perplexity", "bits_per_byte", "recall_perplexity"}
    assert (record["split"], record["data"]["articles"], record["data"]["train"]["articles"]) == ("validation", 3, 9)
    assert "tokens known from far before" in record["signature"]
    assert record["attached"] == {"layers": 2, "patterns": ["causal_self"]}
    assert astbench("validate", "--ckpt_path=run", "--run_dir=val").code == 0
    assert record_in("val")["metrics"] == record["metrics"]
    assert astbench("test", "--ckpt_path=run", "--run_dir=test").code == 0
    assert record_in("test")["data"]["file"] == "demo/test"
    ask = ["predict", "--ckpt_path=run", "--data.prompt= = The", "--task.max_new_tokens=5"]
    assert astbench(*ask, "--run_dir=p").code == 0
    assert len(record_in("p")["continuation"]["tokens"]) == 5


def test_recall_perplexity_is_that_of_the_names_alone(astbench, data):
    """A model that gives every token the same probability but names: those are never said."""
    totals = Scored(nll=6 * math.log(8), tokens=4, words=3, bytes=20, recall_nll=2 * math.log(50), recalls=2)
    found = perplexities(totals)
    assert found["recall_perplexity"] == pytest.approx(50)
    assert found["perplexity"] == pytest.approx(8**1.5) and found["word_perplexity"] == pytest.approx(64)
    assert found["bits_per_byte"] == pytest.approx(18 / 20)
    assert perplexities(totals._replace(nll=5000.0))["perplexity"] == math.inf
    assert "recall_perplexity" not in perplexities(totals._replace(recalls=0))


def local_words(data, *options):
    for name in ("train", "valid"):
        (data / f"wiki.{name}.tokens").write_text("".join(two_articles()), encoding="utf-8")
    local = ["--data.source=local", f"--data.path={data}", "--data.vocab_size=300", "--data.context=64"]
    return [*FIT, *local, *options]


@pytest.mark.parametrize("documents", ["packed", "separate"])
def test_training_windows(astbench, data, documents):
    done = astbench(*local_words(data, "--attention=dense", f"--data.documents={documents}", "--run_dir=run"))
    assert done.code == 0, done.err
    train = record_in("run")["data"]["train"]
    tokenizer = AutoTokenizer.from_pretrained("run/tokenizer")
    lengths = [len(tokenizer(article)["input_ids"]) for article in two_articles()]
    assert train["tokens"] == sum(lengths)
    assert train["windows"] == (sum(lengths) // 64 if documents == "packed" else sum(-(-n // 64) for n in lengths))
    assert astbench(*local_words(data, "--attention=dense", "--data.max_train=5", "--run_dir=few")).code == 0
    assert record_in("few")["data"]["train"]["windows"] == 5


def test_the_first_loss_is_the_mean_over_real_tokens():
    """In a padded batch; and with the losses of the attention."""
    torch.manual_seed(3)
    module = LanguageModel({"name": "dense"})
    module.model = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=40,
                                                num_hidden_layers=2, num_attention_heads=6))  # fmt: skip
    module.handle = swap_attention(module.model, "dense")
    module.total_loss = lambda loss, each: (loss, each)
    rows = [torch.randint(61, (n,)) for n in (11, 7, 2)]
    loss, each = module.training_step(pad([{"input_ids": row} for row in rows]), 0)
    alone = [module({"input_ids": row[None]})[0] for row in rows]
    assert [len(nll) for nll in alone] == [10, 6, 1]
    torch.testing.assert_close(loss, torch.cat(alone).mean())
    torch.testing.assert_close(each, torch.stack([nll.mean() for nll in alone]))


def test_gradient_checkpointing_changes_nothing_but_the_memory(astbench, data, monkeypatch):
    """The attention's own losses included: they leave the layers on the side."""
    words = local_words(data, "--attention=ast", "--attention.distill_fraction=1.0")
    calls, forward = [], AttentionSlot.forward
    monkeypatch.setattr(AttentionSlot, "forward", lambda *a: (calls.append(a[0].training), forward(*a))[1])
    assert astbench(*words, "--run_dir=plain").code == 0
    assert sum(calls) == 3 * 2  # three steps of two layers
    calls.clear()
    assert astbench(*words, "--run_dir=saving", "--backbone.gradient_checkpointing=true").code == 0
    assert sum(calls) == 2 * 3 * 2
    plain, saving = (read_checkpoint(folder)["state_dict"] for folder in ("plain", "saving"))
    assert plain.keys() == saving.keys() and any("astbench" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name])
    assert losses("saving") == pytest.approx(losses("plain"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's tracer looks at tensors between graphs
@pytest.mark.parametrize(("attention", "saving"), [("ast", "true"), ("dense", "false")])
def test_compiled_layers_learn_the_same(astbench, data, monkeypatch, attention, saving):
    """Traced as for the real compiler, which would take a minute; its own digits differ by rounding."""
    compiled, compile_module = [], torch.nn.Module.compile

    def traced(module):
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    words = local_words(data, f"--attention={attention}", f"--backbone.gradient_checkpointing={saving}")
    assert astbench(*words, "--run_dir=eager").code == 0
    assert not compiled
    assert astbench(*words, "--run_dir=compiled", "--backbone.compile=true").code == 0
    assert compiled == ["LlamaDecoderLayer"] * 2
    eager, traced_weights = (read_checkpoint(folder)["state_dict"] for folder in ("eager", "compiled"))
    assert eager.keys() == traced_weights.keys()
    for name in eager:
        torch.testing.assert_close(traced_weights[name], eager[name])
    # Evaluation of what was compiled needs no compiler.
    assert astbench("validate", "--attention", attention, *words[1:], "--ckpt_path=compiled").code == 0
    assert len(compiled) == 2


def test_mixed_precision(astbench, data):
    words = local_words(data, "--attention=ast")
    assert astbench(*words, "--run_dir=full").code == 0
    assert astbench(*words, "--run_dir=mixed", "--trainer.precision=bf16-mixed").code == 0
    assert record_in("mixed")["precision"] == "bf16-mixed"
    assert losses("mixed") == pytest.approx(losses("full"), rel=0.02)
    assert losses("mixed") != losses("full")

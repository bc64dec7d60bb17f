"""Recall probes: generators against the published recipe by other means, and the task through the command line."""

import json
import random
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from astbench.backbones.presets import BackboneConfig
from astbench.backbones.tokenizers import train_tokenizer
from astbench.errors import ConfigError
from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import CONFIG, RECORD
from astbench.tasks.recall import needle_text
from astbench.tasks.recall.data import IGNORED
from astbench.tasks.recall.mqar import MQARData, make_sequence
from astbench.tasks.recall.needle import NeedleData

MQAR = ["--data.length=24", "--data.num_pairs=3", "--data.vocab_size=50", "--data.num_train=20", "--data.num_eval=5"]
NEEDLE = ["--data.length=120", "--data.num_keys=3", "--data.num_train=9", "--data.num_eval=7"]
SHORT = ["--attention=dense", "--data.batch_size=4", "--data.eval_batch_size=3", "--trainer.log_every_n_steps=1"]


def fit(astbench, folder, task, *options, steps=2):
    words = ["fit", f"--task={task}", *SHORT, f"--trainer.max_steps={steps}", f"--run_dir={folder}", *options]
    done = astbench(*words)
    assert done.code == 0, done.err
    return json.loads((folder / RECORD).read_text())


def assert_refused(outcome, folder, code, *parts):
    assert len(outcome.err.splitlines()) == 1 and outcome.err.startswith("astbench: error: "), outcome.err
    for part in parts:
        assert part in outcome.err
    assert outcome.code == code
    assert not folder.exists()


# -- multi-query associative recall ------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(16, 4, 17), (24, 3, 50), (70, 5, 128), (64, 16, 8192)])
def test_a_mqar_sequence_holds_what_its_labels_ask_for(length, pairs, vocab):
    for seed in range(20):
        row = make_sequence(seed, length=length, num_pairs=pairs, vocab_size=vocab, power=0.01)
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        assert len(ids) == length and all(0 <= i < vocab for i in ids)
        keys, values = ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert max(keys) < vocab // 2 <= min(values) and min(keys) >= 1
        memory = dict(zip(keys, values, strict=True))
        asked = [at for at, label in enumerate(labels) if label != IGNORED]
        assert sorted(ids[at] for at in asked) == sorted(keys)
        for at in asked:
            assert at >= 2 * pairs and at % 2 == 0
            assert labels[at] == memory[ids[at]]
            assert keys[row["question"][at]] == ids[at]
        assert all((q >= 0) == (label != IGNORED) for q, label in zip(row["question"].tolist(), labels, strict=True))


def test_mqar_gaps_follow_the_power_law():
    """The first key's place alone is a plain draw from the law; its chi-square against it, and not against another."""
    places, draws, power = 8, 4000, 0.3
    seen = Counter()
    for seed in range(draws):
        row = make_sequence(seed, length=2 * places + 2, num_pairs=1, vocab_size=64, power=power)
        seen[int((row["labels"] != IGNORED).nonzero()) // 2 - 1] += 1

    def distance(exponent):
        weights = [(place + 1) ** (exponent - 1) for place in range(places)]
        expected = [draws * w / sum(weights) for w in weights]
        return sum((seen[n] - e) ** 2 / e for n, e in enumerate(expected))

    assert distance(power) < 24.3  # 99.9% of chi-square with 7 degrees of freedom
    assert min(distance(0.01), distance(1.0)) > 100


def test_mqar_is_determined_by_its_seed_and_splits_differ():
    def rows(split, seed):
        data = MQARData(length=24, num_pairs=3, vocab_size=50, num_train=9, num_eval=9, data_seed=seed)
        return [tuple(row["input_ids"].tolist()) for row in data.read(split)]

    sets = {(split, seed): rows(split, seed) for split in ("train", "validation", "test") for seed in (0, 1)}
    assert rows("train", 0) == sets["train", 0]
    everything = [row for part in sets.values() for row in part]
    assert len(set(everything)) == len(everything) == 54


def test_distances_are_those_between_query_and_key():
    data = MQARData(length=64, num_pairs=5, vocab_size=128, num_eval=6)
    data.setup("test")
    for index in range(6):
        ids = data.sets["test"][index]["input_ids"].tolist()
        labels = data.sets["test"][index]["labels"].tolist()
        asked = {ids[at]: at for at in range(64) if labels[at] != IGNORED}
        for question, group in enumerate(data.groups("test", index)):
            low, high = map(int, group.split("-"))
            assert low <= asked[ids[2 * question]] - 2 * question <= high == 2 * low - 1


def test_mqar_through_the_command_line(astbench, tmp_path):
    record = fit(astbench, tmp_path / "run", "mqar", *MQAR)
    assert record["data"]["source"] == "generated" and record["data"]["examples"] == {"train": 20, "validation": 5}
    assert record["signature"].endswith("15 questions in 5 inputs")
    items = json.loads((tmp_path / "run" / "items.json").read_text())
    right = [ok for row in items.values() for ok in row["right"]]
    assert len(right) == 15 and record["metrics"]["accuracy"] == pytest.approx(100 * sum(right) / 15)
    groups = record["accuracy_by_distance"].values()
    assert sum(group["count"] for group in groups) == 15
    assert sum(group["count"] * group["accuracy"] for group in groups) == pytest.approx(100 * sum(right))
    again = astbench("validate", f"--ckpt_path={tmp_path / 'run'}", f"--run_dir={tmp_path / 'again'}")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again" / RECORD).read_text())["metrics"] == record["metrics"]


def test_the_loss_is_that_of_the_labels_alone(astbench, tmp_path):
    """One example, trained on until it is known by heart: only where labels stand can that be."""
    options = [*MQAR, "--backbone=tiny", "--data.max_train=1", "--data.num_eval=1", "--data.batch_size=1"]
    fit(astbench, tmp_path / "run", "mqar", *options, "--optim.lr=1e-2", steps=40)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[0] > 3 and losses[-1] < 0.1


def test_resumed_mqar_ends_where_the_uninterrupted_run_does(astbench, tmp_path, monkeypatch):
    from astbench.cli.run_callback import RunCallback
    from astbench.errors import Terminated

    options = [*MQAR, "--checkpoint_every=2"]
    whole = fit(astbench, tmp_path / "whole", "mqar", *options, steps=7)
    before = RunCallback.on_train_batch_end
    ends = []

    def stop(self, trainer, *arguments):
        before(self, trainer, *arguments)
        ends.append(trainer.global_step)
        if len(ends) == 5:
            raise Terminated("here")

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_train_batch_end", stop)
        words = ["fit", "--task=mqar", *SHORT, *options, "--trainer.max_steps=7", f"--run_dir={tmp_path / 'run'}"]
        assert astbench(*words).code == 143
    assert read_checkpoint(tmp_path / "run")["global_step"] == 4
    done = astbench("fit", f"--resume={tmp_path / 'run'}")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    for key in ("metrics", "data", "accuracy_by_distance"):
        assert record[key] == whole[key]
    ours, theirs = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--data.length=25"], 2, "--data.length must be even and at least 4 * num_pairs = 12 tokens, got 25"),
        (["--data.num_pairs=7"], 2, "at least 4 * num_pairs = 28 tokens, got 24"),
        (["--data.num_pairs=0"], 2, "--data.num_pairs must be at least 1"),
        (["--data.vocab_size=24"], 2, "--data.vocab_size must be above --data.length=24"),
        (["--data.power=0"], 2, "--data.power must be above 0"),
        (["--data.num_eval=0"], 2, "--data.num_eval must be at least 1"),
        (["--data.batch_size=0"], 2, "--data.batch_size must be at least 1"),
        (["--data.source=hub"], 2, "'generated'"),
        (["--backbone=/tmp"], 2, "task mqar trains from scratch"),
        (["--attention=bigbird"], 2, "no causal self attention"),
    ],
)
def test_bad_mqar_options(astbench, tmp_path, options, code, part):
    words = ["fit", "--task=mqar", *SHORT, *MQAR, f"--run_dir={tmp_path / 'run'}", *options]
    assert_refused(astbench(*words), tmp_path / "run", code, part)


# -- needles -----------------------------------------------------------------------------------------------------


def test_needle_words_are_told_apart():
    assert not set(needle_text.KEYS) & set(needle_text.VALUES)
    for words in (needle_text.KEYS, needle_text.VALUES):
        assert len(set(words)) == len(words)
    filler = {word for seed in range(500) for word in needle_text._filler(random.Random(seed)).strip(".").split()}
    assert not filler & {*needle_text.KEYS, *needle_text.VALUES}


@pytest.mark.parametrize("values", ["words", "numbers"])
@pytest.mark.parametrize("asked", [1, 3])
def test_a_needle_text_answers_its_questions(values, asked):
    data = NeedleData(length=230, num_keys=4, num_questions=asked, values=values, num_depths=5, num_eval=10)
    data.setup("test")
    tokenizer, depths = data.tokenizer, Counter()
    for index in range(10):
        row = data.sets["test"][index]
        text = tokenizer.decode(row["input_ids"])
        assert len(row["input_ids"]) == 230
        hay, _, tail = text.partition(" What is")
        memory = {}
        for sentence in hay.lstrip(". ").split(" . "):
            if sentence.startswith("The secret of the"):
                key, _, value = sentence.removeprefix("The secret of the ").partition(" is ")
                memory[key] = value.removesuffix(" .")
        assert len(memory) == 4 and tail.count("?") == asked
        for question in range(asked):
            places = (row["question"] == question).nonzero().flatten().tolist()
            value = tokenizer.decode(row["labels"][places])
            before = tokenizer.decode(row["input_ids"][places[0] - 4 : places[0] + 1])
            key = before.split()[-2]
            assert before == f"secret of the {key} is" and memory[key] == value
            assert tokenizer.decode(row["input_ids"][places[0] + 1 :]).startswith(value)
            # Where it stands in the haystack, to within the filler sentence in front and the other needles.
            share = 100 * hay.index(f"the {key} is") / len(hay)
            depth = int(data.groups("test", index)[question])
            assert abs(share - depth) < 25
            depths[depth] += 1
    assert set(depths) == {0, 25, 50, 75, 100} and len(set(depths.values())) == 1


def test_needles_are_determined_by_their_seed():
    def texts(seed):
        data = NeedleData(length=150, num_train=4, num_eval=4, data_seed=seed)
        data.setup("fit")
        return [tuple(data.sets[s][i]["input_ids"].tolist()) for s in ("train", "validation") for i in range(4)]

    assert texts(3) == texts(3)
    assert len({*texts(3), *texts(4)}) == 16


def test_needle_through_the_command_line(astbench, tmp_path):
    record = fit(astbench, tmp_path / "run", "needle", *NEEDLE, "--data.num_questions=2", "--data.num_depths=3")
    counts = {depth: group["count"] for depth, group in record["accuracy_by_depth"].items()}
    assert counts == {"0": 5, "50": 5, "100": 4} and list(counts) == ["0", "50", "100"]
    again = astbench("test", f"--ckpt_path={tmp_path / 'run'}", f"--run_dir={tmp_path / 'again'}")
    assert again.code == 0, again.err


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A random Llama and a tokenizer of subwords that begins texts with [CLS] and ends them with [SEP]."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([" ".join(needle_text.words())], 300)
    torch.manual_seed(4)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_begins_as_its_tokenizer_begins_and_ends_with_an_answer(pretrained):
    data = NeedleData(length=128, num_eval=2)
    data.prepare(BackboneConfig(name=str(pretrained)), 0, None)
    data.setup("test")
    ids = data.sets["test"][0]["input_ids"].tolist()
    assert ids[0] == data.tokenizer.cls_token_id and data.tokenizer.sep_token_id not in ids


def test_right_is_what_greedy_decoding_writes(astbench, pretrained, tmp_path, monkeypatch):
    """A pretrained model's answers in one pass are those of `generate`; a random one would only ever be wrong, so
    what is asked for is made what the model says."""
    model = LlamaForCausalLM.from_pretrained(pretrained).eval()
    make, spoken = NeedleData._make, []

    def with_the_models_answer(self, index, seed):
        row = make(self, index, seed)
        places = (row["labels"] != IGNORED).nonzero().flatten()
        prompt = row["input_ids"][: int(places[0]) + 1]
        said = model.generate(prompt[None], max_new_tokens=len(places), do_sample=False, pad_token_id=0)[0]
        right = index % 3 != 1
        if right:
            row["labels"][places] = said[len(prompt) :]
            row["input_ids"][places[1:]] = said[len(prompt) : -1]
        spoken.append(right)
        return row

    monkeypatch.setattr(NeedleData, "_make", with_the_models_answer)
    words = ["test", "--task=needle", "--attention=dense", f"--backbone={pretrained}", *NEEDLE]
    done = astbench(*words, "--data.values=numbers", "--data.length=400", f"--run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    items = json.loads((tmp_path / "run" / "items.json").read_text())
    assert [row["right"] for row in items.values()] == [[int(n % 3 != 1)] for n in range(7)]
    assert spoken.count(True) > spoken.count(False) > 0


def test_needle_refuses_what_it_cannot_do(astbench, pretrained, tmp_path):
    run, most = tmp_path / "run", len(needle_text.KEYS)
    for options, part in (
        ([f"--backbone={pretrained}"], "task needle trains from scratch"),
        ([f"--data.num_keys={most + 1}"], f"must be between num_questions=1 and {most}, got {most + 1}"),
        (["--data.num_questions=4"], "--data.num_keys must be between num_questions=4"),
        (["--data.length=40"], "--data.length must be at least"),
        (["--data.num_depths=1"], "--data.num_depths must be at least 2"),
    ):
        words = ["fit", "--task=needle", *SHORT, *NEEDLE, f"--run_dir={run}", *options]
        assert_refused(astbench(*words), run, 2, part)
    with pytest.raises(ConfigError, match="data_seed must be at least 0"):
        NeedleData(data_seed=-1)


def test_a_generated_task_reruns_from_its_config(astbench, tmp_path):
    record = fit(astbench, tmp_path / "run", "mqar", *MQAR)
    done = astbench("fit", f"--config={tmp_path / 'run' / CONFIG}", f"--run_dir={tmp_path / 'again'}")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "again" / RECORD).read_text())["config_hash"] == record["config_hash"]

"""The command line of translation: fit, test and predict, where the attention stands, bad input, resuming."""

import gzip
import json
import signal

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from astbench.backbones.tokenizers import SEQ2SEQ_SPECIAL, train_bpe
from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import CONFIG, LAST, METRICS, RECORD
from astbench.training.averaging import KEY
from tests.astbench.cli.test_cli import assert_refused, record_of
from tests.astbench.conftest import SETTINGS, tiny_model
from tests.astbench.training.test_resume import assert_same_part

TINY = [
    "--task=wmt14",
    "--data.demo_train=60",
    "--data.demo_eval=7",
    "--data.vocab_size=400",
    "--data.max_length=32",
    "--data.batch_size=5",
    "--trainer.max_steps=4",
    "--trainer.log_every_n_steps=1",
    "--task.beams=2",
]
AST = ["--attention=ast", "--attention.block_size=4", "--attention.query_group=1", "--attention.min_blocks=2"]
FIT = ["fit", *AST, *TINY]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A finished run that evaluates the mean of its last three steps, and what it printed."""
    folder = tmp_path_factory.mktemp("mt") / "run"
    words = [*FIT, "--task.average=3", "--task.average_every=1", f"--run_dir={folder}"]
    code, out = run(words)
    assert (code, run.errors) == (0, "")
    return folder, out


def test_a_run_says_what_it_scored_and_how(trained):
    folder, out = trained
    record = record_of(folder)
    assert record["metrics"].keys() == {"bleu", "chrf"}
    for part in ("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:", "demo validation (7 lines), en-de"):
        assert part in record["signature"]
    assert record["signature"].endswith("beam 2, length penalty 0.6, mean of the weights at 3 steps")
    assert record["attached"] == {"layers": 6, "patterns": ["bidirectional_self", "causal_cross", "causal_self"]}
    assert len(record["density"]["layers"]) == 6 and record["picture"] == "pattern.png"
    assert record["data"]["pairs"] == {"train": 60, "validation": 7} and record["data"]["direction"] == "en-de"
    assert "sacrebleu" in record["versions"]
    assert "demo (generated, not the real data set): 60 train, 7 validation" in out
    assert out.splitlines()[-1].endswith("--attention=ast --task=wmt14 --data.source=hub --backbone=small")
    items = json.loads((folder / "items.json").read_text())
    assert list(items) == [str(n) for n in range(1, 8)]
    assert all(row.keys() == {"bleu", "chrf", "prediction"} for row in items.values())


def test_the_checkpoint_holds_last_weights_and_mean(trained):
    checkpoint = read_checkpoint(trained[0])
    assert (checkpoint[KEY]["taken"], checkpoint[KEY]["steps"]) == (3, [2, 3, 4])
    name = "model.model.shared.weight"
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint[KEY]["weights"][name])


def test_validate_and_init_from_evaluate_the_mean_again(astbench, here, trained):
    folder, _ = trained
    assert astbench("validate", f"--ckpt_path={folder}", "--run_dir=v").code == 0
    words = ["validate", f"--config={folder / CONFIG}", f"--init_from={folder}", "--run_dir=i"]
    assert astbench(*words).code == 0
    items = [(f / "items.json").read_text() for f in (folder, here / "v", here / "i")]
    assert items[0] == items[1] == items[2]
    assert record_of(here / "v")["density"] == record_of(folder)["density"]


def test_another_search_is_an_option_and_another_place_is_not(astbench, here, trained):
    folder, _ = trained
    done = astbench("test", f"--ckpt_path={folder}", "--task.beams=1", "--data.max_eval=3", "--run_dir=t")
    assert done.code == 0, done.err
    record = record_of(here / "t")
    assert "demo test (the first 3 of 7 lines), en-de; beam 1" in record["signature"] and record["split"] == "test"
    refused = astbench("test", f"--ckpt_path={folder}", "--task.where=cross", "--run_dir=w")
    assert_refused(refused, 6, "trained with other task options", "where")


def test_predict_translates_a_sentence_and_a_file(astbench, here, trained):
    folder, _ = trained
    sentence = "The quick brown fox jumps over the lazy dog."
    done = astbench("predict", f"--ckpt_path={folder}", f"--data.text={sentence}", "--run_dir=p")
    assert done.code == 0, done.err
    items = json.loads((here / "p" / "items.json").read_text())
    assert items.keys() == {"1"} and items["1"]["source"] == sentence
    assert f"\n  translation  {items['1']['prediction']}" in done.out
    record = record_of(here / "p")
    assert 0 < record["density"]["mean"] <= 1 and len(record["density"]["layers"]) == 6
    assert record["data"]["source"] == "text" and (here / "p" / "pattern.png").exists()
    (here / "in.txt").write_text(f"The king.\n\n{sentence}\n")
    done = astbench("predict", f"--ckpt_path={folder}", "--data.file=in.txt", "--run_dir=f")
    assert done.code == 0, done.err
    found = json.loads((here / "f" / "items.json").read_text())
    assert [row["source"] for row in found.values()] == ["The king.", "", sentence]
    assert found["2"]["prediction"] == "" and found["3"] == items["1"]
    for part in ("source      file in.txt", f"line 3   {items['1']['prediction']}", "items    f/items.json"):
        assert part in done.out


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ([], 2, ["predict needs --data.text='...' or --data.file=FILE"]),
        (["--data.text=a", "--data.file=in.txt"], 2, ["one of them"]),
        (["--data.file=gone.txt"], 3, ["--data.file=gone.txt does not exist"]),
        (["--data.file=empty.txt"], 3, ["empty.txt is empty"]),
        (["--data.file=latin.txt"], 3, ["latin.txt cannot be read as UTF-8 text"]),
        (["--data.file=cut.gz"], 3, ["cut.gz cannot be unpacked, the gzip file is cut short"]),
    ],
    ids=["nothing", "both", "missing", "empty", "latin-1", "truncated"],
)
def test_predict_refuses(astbench, here, trained, words, code, parts):
    (here / "empty.txt").write_text(" \n\n")
    (here / "latin.txt").write_bytes("Größe\n".encode("latin-1"))
    (here / "cut.gz").write_bytes(gzip.compress(b"The king.\n" * 50)[:-9])
    assert_refused(astbench("predict", f"--ckpt_path={trained[0]}", *words, "--run_dir=q"), code, *parts)
    assert not (here / "q").exists()


# -- where it stands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "layers", "where"),
    [("local", 4, "encoder_self,decoder_self"), ("reformer", 4, "encoder_self,decoder_self"),
     ("bigbird", 2, "encoder_self"), ("linformer", 4, "encoder_self,cross")],
)  # fmt: skip
def test_a_variant_that_cannot_serve_all_places_says_which_it_can(astbench, here, attention, layers, where):
    words = ["fit", f"--attention={attention}", *TINY, "--trainer.max_steps=1", "--run_dir=run"]
    assert_refused(astbench(*words), 2, f"attention '{attention}' cannot serve", f"--task.where={where} leaves")
    assert not (here / "run").exists()
    done = astbench(*words, f"--task.where={where}", "--data.demo_eval=2")
    assert done.code == 0, done.err
    record = record_of(here / "run")
    assert record["attached"]["layers"] == layers and record["config"]["task"]["where"] == where


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("train.de", b"nur eine\n", ["train.en has 20 lines", "train.de has 1"]),
        ("train.de", b"\xff\xfe" * 20, ["train.de cannot be read as UTF-8 text"]),
        ("train.de", None, ["holds no train.de|deu (also .gz)", "--data.train_name"]),
        ("val.en", None, ["holds no val.en|eng (also .gz)", "--data.validation_name"]),
        ("train.de", b"\n" * 20, ["the train split of source local holds no sentence pair"]),
        (
            "train.de.gz",
            gzip.compress(b"ein Satz\n" * 20)[:-9],
            ["train.de.gz cannot be unpacked, the gzip file is cut short"],
        ),
    ],
    ids=["ragged", "latin-1", "missing", "no-validation", "empty", "truncated"],
)
def test_bad_files_are_one_line_and_leave_nothing(astbench, here, name, data, parts):
    folder = here / "data"
    folder.mkdir()
    for file in ("train.en", "train.de", "val.en", "val.de"):
        (folder / file).write_text("a sentence\n" * 20)
    (folder / name.removesuffix(".gz")).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    words = [*FIT, "--data.source=local", "--data.path=data", "--run_dir=run"]
    assert_refused(astbench(*words), 3, *parts)
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--data.source=local"], 3, "--data.source=local needs --data.path"),
        (["--data.source=local", "--data.path=/no/where"], 3, "/no/where does not exist"),
        (["--task.where=encoder"], 2, "--task.where must be some of encoder_self,decoder_self,cross"),
        (["--task.average=3", "--task.average_every=2"], 2, "begin before the training of --trainer.max_steps=4"),
        (["--data.max_length=2000"], 2, "--data.max_length=2000 tokens is longer than the backbone's"),
        (["--data.direction=en-fr"], 2, "data.direction"),
    ],
    ids=["no-path", "missing", "where", "average", "too-long", "direction"],
)
def test_bad_options_are_one_line_and_leave_nothing(astbench, here, words, code, part):
    assert_refused(astbench(*FIT, *words, "--run_dir=run"), code, part)
    assert list(here.iterdir()) == []


# -- from files, from pretrained weights, and killed ----------------------------------------------------------------


@pytest.mark.slow
def test_a_table_of_pairs_both_ways(astbench, here):
    (here / "deu.txt").write_text("".join(f"Sentence {i}.\tSatz Nummer {i}.\tlicence\n" for i in range(90)))
    words = [*FIT, "--data.source=local", "--data.path=deu.txt", "--data.holdout=9", "--data.direction=de-en"]
    done = astbench(*words, "--run_dir=run")
    assert done.code == 0, done.err
    counts = record_of(here / "run")["data"]["pairs"]
    assert counts["train"] > 60 and 1 <= counts["validation"] <= 25
    assert "deu.txt, validation" in record_of(here / "run")["signature"]
    assert astbench("test", "--ckpt_path=run", "--run_dir=t").code == 0
    assert sum({**counts, **record_of(here / "t")["data"]["pairs"]}.values()) == 90


@pytest.mark.parametrize("family", [pytest.param("bart", marks=pytest.mark.slow), "marian"])
def test_a_pretrained_encoder_decoder(astbench, here, family):
    tokenizer = train_bpe(["The king saw the queen.", "Der König hat die Königin gesehen."], 300)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SEQ2SEQ_SPECIAL.items()}
    settings = {**SETTINGS[family], **{f"{name}_id": number for name, number in ids.items()}}
    config = AutoConfig.for_model(family, **{**settings, "vocab_size": 304, "decoder_start_token_id": ids["eos_token"]})
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(here / "base")
    tokenizer.save_pretrained(here / "base")
    done = astbench(*FIT, "--backbone=base", "--data.demo_eval=3", "--run_dir=run")
    assert done.code == 0, done.err
    assert record_of(here / "run")["data"]["vocabulary"] == len(tokenizer)
    assert astbench("predict", "--ckpt_path=run", "--data.text=The king.", "--run_dir=p").code == 0


def test_an_encoder_alone_is_refused(astbench, here):
    tiny_model("bert").save_pretrained(here / "bert")
    train_bpe(["The king."], 300).save_pretrained(here / "bert")
    words = [*FIT, "--backbone=bert", "--data.max_length=64", "--run_dir=run"]
    assert_refused(astbench(*words), 3, "--backbone.name=bert cannot be loaded")


@pytest.mark.parametrize(
    "what", [("on_train_batch_start", 3), ("evaluate", 0)], ids=["while-averaging", "before-evaluation"]
)
def test_a_killed_run_ends_bitwise_where_the_whole_one_does(run, trained, tmp_path, what):
    folder = tmp_path / "run"
    words = [*FIT, "--task.average=3", "--task.average_every=1", "--checkpoint_every=3", f"--run_dir={folder}"]
    code, out = run(words, (*what, signal.SIGKILL))
    assert code == -signal.SIGKILL, out
    code, out = run(["fit", f"--resume={folder}"])
    assert code == 0, out
    ours, theirs = (read_checkpoint(f / LAST) for f in (folder, trained[0]))
    for part in ("state_dict", "optimizer_states", KEY):
        assert_same_part(ours[part], theirs[part])
    assert (folder / METRICS).read_bytes() == (trained[0] / METRICS).read_bytes()
    assert (folder / "items.json").read_text() == (trained[0] / "items.json").read_text()
    assert json.loads((folder / RECORD).read_text())["metrics"] == record_of(trained[0])["metrics"]

"""Translation: readers, the demo grammar, tokens and batches, the mean of weights, attention in an encoder-decoder."""

import gzip
import random
import re
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sacrebleu import corpus_bleu, sentence_bleu, sentence_chrf

from astbench.backbones.presets import BackboneConfig
from astbench.backbones.swap import swap_attention
from astbench.backbones.tokenizers import train_bpe
from astbench.errors import ConfigError, DataError
from astbench.tasks.mt import demo as mt_demo
from astbench.tasks.mt.batches import IGNORED, Collate, PairDataset, TokenRows, by_length
from astbench.tasks.mt.config import TranslationConfig
from astbench.tasks.mt.data import TranslationData
from astbench.tasks.mt.sources import HUB, Pair, fingerprint, read_parallel, read_sentences, read_table, split_of
from astbench.tasks.mt.task import Translation, score_sentences
from astbench.training.averaging import KEY, WeightAverage, final_weights
from tests.astbench.conftest import VOCABULARY, tiny_model

# -- readers --------------------------------------------------------------------------------------------------

EN, DE = ["A dog runs.", "Two\u2028women", "", "Last"], ["Ein Hund läuft.", "Zwei Frauen", "leer", "Letzte"]


def write_parallel(folder, name="train", endings=("en", "de"), packed=("", ""), sides=(EN, DE)):
    for ending, gz, lines in zip(endings, packed, sides, strict=True):
        data = "".join(f"{line}\n" for line in lines).encode()
        (folder / f"{name}.{ending}{gz}").write_bytes(gzip.compress(data) if gz else data)


@pytest.mark.parametrize("endings", [("en", "de"), ("eng", "deu"), ("eng", "de")], ids="/".join)
@pytest.mark.parametrize("packed", [("", ""), (".gz", ".gz"), ("", ".gz")], ids=["plain", "gz", "mixed"])
def test_parallel_files_are_read_line_by_line(tmp_path, endings, packed):
    write_parallel(tmp_path, endings=endings, packed=packed)
    # A line ends at a newline and nowhere else.
    assert read_parallel(tmp_path, "train", "train_name") == [Pair(*pair) for pair in zip(EN, DE, strict=True)]


def test_marks_in_front_line_ends_of_windows_and_a_missing_last_newline(tmp_path):
    (tmp_path / "t.en").write_bytes(b"\xef\xbb\xbfOne\r\nTwo")
    (tmp_path / "t.de").write_bytes(b"Eins\r\nZwei\r\n")
    assert read_parallel(tmp_path, "t", "train_name") == [Pair("One", "Eins"), Pair("Two", "Zwei")]


def test_names_lead_to_other_folders(tmp_path):
    for folder in ("train", "tests"):
        (tmp_path / folder).mkdir()
    write_parallel(tmp_path / "tests", "newstest2014", ("eng", "deu"))
    assert len(read_parallel(tmp_path / "train", "../tests/newstest2014", "test_name")) == 4


@pytest.mark.parametrize(
    ("break_it", "parts"),
    [
        (lambda f: (f / "train.de").write_text("nur eine\n"), ["train.en has 4 lines", "train.de has 1", "parallel"]),
        (lambda f: (f / "train.de").write_bytes(b"\xe4\xf6\n" * 4), ["train.de cannot be read as UTF-8 text"]),
        (lambda f: (f / "train.de").unlink(), ["holds no train.de|deu (also .gz)", "--data.train_name"]),
    ],
    ids=["ragged", "latin-1", "missing"],
)
def test_parallel_files_that_are_none(tmp_path, break_it, parts):
    write_parallel(tmp_path)
    break_it(tmp_path)
    with pytest.raises(DataError) as caught:
        read_parallel(tmp_path, "train", "train_name")
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_a_folder_with_a_table_says_how_to_read_it(tmp_path):
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(TABLE.encode()))
    with pytest.raises(DataError, match=r"holds no train.en\|eng .*; a table of pairs is read as .*/train.tsv.gz$"):
        read_parallel(tmp_path, "train", "train_name")


TABLE = "Go.\tGeh.\tCC-BY 2.0\nRun!\tLauf!\n\n Hi. \tHallo.\n"


def test_tables_of_pairs(tmp_path):
    expected = [Pair("Go.", "Geh."), Pair("Run!", "Lauf!"), Pair("Hi.", "Hallo.")]
    (tmp_path / "deu.txt").write_text(TABLE)
    (tmp_path / "deu.tsv.gz").write_bytes(gzip.compress(TABLE.encode()))
    with zipfile.ZipFile(tmp_path / "deu-eng.zip", "w") as archive:
        archive.writestr("_about.txt", "about")
        archive.writestr("deu.txt", TABLE)
    for name in ("deu.txt", "deu.tsv.gz", "deu-eng.zip"):
        assert read_table(tmp_path / name) == expected, name


@pytest.mark.parametrize(
    ("name", "data", "part"),
    [
        ("deu.txt", b"Go.\tGeh.\nno tab here\n", "deu.txt:2 holds no tab between English and German: 'no tab here'"),
        ("deu.gz", gzip.compress(TABLE.encode())[:-9], "deu.gz cannot be unpacked, the gzip file is cut short"),
        ("deu.gz", b"no gzip", "deu.gz cannot be unpacked, the gzip file is cut short or damaged: Not a gzipped file"),
        ("deu.zip", b"no zip", "deu.zip cannot be unpacked: File is not a zip file"),
    ],
    ids=["no-tab", "truncated-gz", "no-gz", "no-zip"],
)
def test_tables_that_are_none(tmp_path, name, data, part):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / name)
    assert part in str(caught.value)


def test_a_damaged_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "deu.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("deu.txt", TABLE * 50)
    data = bytearray((tmp_path / "deu.zip").read_bytes())
    data[60:90] = b"\xff" * 30
    (tmp_path / "deu.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"deu\.zip cannot be unpacked"):
        read_table(tmp_path / "deu.zip")


def test_a_zip_of_several_tables_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.txt", TABLE)
        archive.writestr("b.txt", TABLE)
    with pytest.raises(DataError, match="must hold one table of pairs, found 2"):
        read_table(tmp_path / "two.zip")


def test_one_english_sentence_stays_in_one_split():
    pairs = [Pair(f"Sentence {i // 3}.", f"Satz {i}.") for i in range(3000)]
    splits = {}
    for pair in pairs:
        splits.setdefault(split_of(pair, 10), []).append(pair)
    assert splits.keys() == {"train", "validation", "test"}
    english = [{pair.en for pair in part} for part in splits.values()]
    assert len(set.union(*english)) == sum(map(len, english)) == 1000
    assert all(60 < len({p.en for p in splits[s]}) < 140 for s in ("validation", "test"))


def test_sentences_keep_their_lines(tmp_path):
    (tmp_path / "in.txt").write_text("one\n\ntwo\n")
    assert read_sentences(tmp_path / "in.txt") == ["one", "", "two"]


def test_fingerprints_see_sides_and_order():
    pairs = [Pair("a", "b"), Pair("c", "d")]
    others = [pairs[::-1], [Pair("a", "bc"), Pair("", "d")], [Pair("ab", ""), Pair("c", "d")]]
    assert len({fingerprint(p) for p in (pairs, *others)}) == 4


def test_the_hub_is_read_at_a_pinned_revision(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return [{"translation": {"en": " Yes. ", "de": "Ja."}}]

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    data = TranslationData("hub", max_train=5, max_eval=3, direction="de-en")
    for split in ("train", "validation", "test"):
        data._read_split(split)
    assert data.pairs["test"] == [Pair("Yes.", "Ja.")] and data.references("test") == ["Yes."]
    # Training pairs alone are cut short: the signature says how many evaluation pairs there are.
    assert [options["split"] for _, options in asked] == ["train[:5]", "validation", "test"]
    assert all(names == HUB[:2] and options["revision"] == HUB[2] for names, options in asked)


@pytest.mark.parametrize(
    ("source", "name", "lines", "limit", "expected"),
    [
        ("hub", "", 3003, None, "newstest2014 (3,003 lines, the full set), en-de"),
        ("local", "../x/newstest2014", 2737, None, "newstest2014 (2,737 lines, the filtered set that sacreBLEU calls"),
        ("local", "newstest2014", 3003, 50, "newstest2014 (the first 50 of 3,003 lines, the full set), en-de"),
        ("local", "test_2016_flickr", 1000, None, "test_2016_flickr (1,000 lines), en-de"),
        ("demo", "", 200, None, "demo test (200 lines), en-de"),
    ],
)
def test_the_signature_says_which_lines_were_scored(tmp_path, source, name, lines, limit, expected):
    data = TranslationData(source, str(tmp_path) if source == "local" else "", test_name=name, max_eval=limit)
    data.totals["test"], data.pairs["test"] = lines, [Pair("a", "b")] * (limit or lines)
    assert data.test_set("test").startswith(expected)


# -- the demo grammar -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return mt_demo.generate("train", 2000)


def test_same_arguments_same_pairs_and_more_only_append(demo):
    assert mt_demo.generate("train", 30) == demo[:30]
    assert fingerprint(demo) == "b278c3e840dd8d05"


def test_no_sentence_is_in_two_splits_or_twice(demo):
    splits = [demo, *(mt_demo.generate(s, 300) for s in ("validation", "test")), mt_demo.generate("train", 300, seed=1)]
    english = [[pair.en for pair in part] for part in splits]
    assert all(len(set(part)) == len(part) for part in english)
    for part in english[1:3]:
        assert not set(part) & set(english[0])
    assert english[3] != english[0][:300]


def test_all_splits_share_a_small_vocabulary(demo):
    words = {word for pair in demo for side in pair for word in re.findall(r"\w+", side)}
    assert len(words) < 450
    for pair in mt_demo.generate("test", 300):
        assert {word for side in pair for word in re.findall(r"\w+", side)} <= words


def test_german_closes_its_clauses_and_agrees_in_number(demo):
    closing = {v.participle for v in mt_demo._VERBS} | {v.infinitive for v in mt_demo._VERBS}
    plural_people = {n.de_plural for n in mt_demo._PEOPLE} - {n.de for n in mt_demo._PEOPLE}
    singular_people = {n.de for n in mt_demo._PEOPLE} - {n.de_plural for n in mt_demo._PEOPLE}
    counted = 0
    for english, german in demo:
        main = german.rstrip(".").split(", weil ")[0]
        assert main.split()[-1] in closing, german
        assert ("because" in english) == ("weil" in german)
        if "that" in english or "because" in english:
            continue
        # The only person of such a sentence is its subject.
        words = set(re.findall(r"\w+", german))
        if words & plural_people:
            assert words & {"haben", "werden"} and not words & {"hat", "wird"}, german
        elif words & singular_people:
            assert words & {"hat", "wird"} and not words & {"haben", "werden"}, german
        counted += bool(words & (plural_people | singular_people))
    assert counted > 200


def test_relative_clauses_part_the_verb_from_its_subject(demo):
    german = [pair.de for pair in demo if " that " in pair.en and "because" not in pair.en]
    apart = [len(re.search(r", (.*?), (hat|haben|wird|werden)", text)[1].split()) for text in german if
             re.search(r"^(Der|Die|Das|Ein|Eine)\b[^,]*, (.*?), (hat|haben|wird|werden)", text)]  # fmt: skip
    assert len(apart) > 200 and max(apart) >= 5


def test_needs_no_torch():
    code = "import sys, astbench.tasks.mt.demo, astbench.tasks.mt.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(demo):
    return train_bpe((text for pair in demo for text in pair), 900)


@pytest.mark.parametrize(
    "text", ["Der Hund, der läuft.", "a , b  c", "漢字 \U0001f600 ß", "say <s> </s> <pad> now", "tab\there", "x"]
)
def test_decoding_gives_the_text_back_and_nothing_is_special_in_it(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert not {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[:-1])
    assert tokenizer.decode(ids, skip_special_tokens=True) == f" {text}"


def test_the_same_texts_give_the_same_vocabulary(demo):
    texts = [text for pair in demo[:300] for text in pair] + ["ß漢é\U0001f600" * 3]
    first, second, third = (train_bpe(texts, 700).backend_tokenizer.to_str() for _ in range(3))
    assert first == second == third
    assert len(train_bpe(texts, 700)) == 700


def test_pairs_too_long_are_left_out_and_sources_cut_with_a_note(tmp_path):
    lines = [f"word{i} " * (i + 1) for i in range(12)]
    for name in ("train", "val"):
        write_parallel(tmp_path, name, sides=(lines, ["kurz"] * 12))
    data = TranslationData("local", str(tmp_path), max_length=13, vocab_size=300)
    data.prepare(BackboneConfig(), 0, None)
    data.setup("fit")
    lengths = [len(data.tokenizer(line.strip())["input_ids"]) for line in lines]
    fitting = sum(length <= 13 for length in lengths)
    assert 0 < fitting < 12 and len(data.sets["train"]) == fitting
    assert f"{12 - fitting} of 12 training pairs are longer than 13 tokens: left out" in data.notes[0]
    assert len(data.sets["validation"]) == 12 and data.sets["validation"].lengths.max() == 13
    assert f"{12 - fitting} of 12 validation sentences are cut to 13 tokens" in data.notes[1]
    cut = data.sets["validation"][11]["source"]
    assert cut[-1] == data.tokenizer.eos_token_id and len(cut) == 13


def test_empty_sides_are_left_out_of_training_and_kept_where_they_are_scored(tmp_path):
    for name in ("train", "val"):
        write_parallel(tmp_path, name)
    data = TranslationData("local", str(tmp_path), vocab_size=300)
    data.prepare(BackboneConfig(), 0, None)
    data.setup("fit")
    assert [pair.en for pair in data.pairs["train"]] == [line for line in EN if line]
    assert data.notes == ["1 of 4 training pairs lack a side: left out"]
    assert data.references("validation") == DE


def rows(*lengths):
    return TokenRows(iter([[10 * (i + 1) + j for j in range(n)] for i, n in enumerate(lengths)]))


def test_batches_are_padded_rows():
    dataset = PairDataset(rows(3, 0, 5, 2), rows(2, 4, 1, 3), np.array([0, 2, 3]))
    assert dataset.lengths.tolist() == [3, 5, 3]
    batch = Collate(pad=7)([dataset[2], dataset[1]])
    assert batch["input_ids"].tolist() == [[40, 41, 7, 7, 7], [30, 31, 32, 33, 34]]
    assert batch["attention_mask"].tolist() == [[True, True, False, False, False], [True] * 5]
    assert batch["labels"].tolist() == [[40, 41, 42], [30, IGNORED, IGNORED]]
    assert batch["index"].tolist() == [3, 2]
    assert "labels" not in Collate(7)([PairDataset(rows(3), None)[0]])


@pytest.mark.parametrize("count", [1, 2, 23, 24])
def test_evaluation_goes_by_length_from_the_middle(count):
    lengths = np.array(random.Random(count).choices(range(1, 60), k=count))
    order = by_length(lengths)
    assert sorted(order) == list(range(count))
    turn = count - count // 2
    assert (np.diff(lengths[order[:turn]]) >= 0).all() and (np.diff(lengths[order[turn:]]) >= 0).all()
    assert lengths[order[0]] == np.sort(lengths)[count // 2]


def test_processes_share_the_evaluation(demo, tokenizer):
    data = TranslationData(eval_batch_size=3)
    data._tokenizer, data.pairs["validation"] = tokenizer, demo[:20]
    data.sets["validation"] = data._evaluation_set("validation")
    seen, counts = [], []
    for rank in range(3):
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank)
        batches = list(data.val_dataloader())
        counts.append(len(batches))
        seen += [index for batch in batches for index in batch["index"].tolist()]
    assert set(seen) == set(range(20)) and len(set(counts)) == 1


# -- the mean of weights --------------------------------------------------------------------------------------


def test_the_mean_is_the_mean_of_the_last_times_and_survives_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.BatchNorm1d(5)  # with a buffer that counts
    average, seen = WeightAverage(3, 4, 20), {}
    for step in range(1, 21):
        torch.nn.init.normal_(model.weight)
        model.num_batches_tracked += 1
        for _ in range(2):  # two batches of an accumulated step
            average.after_step(step, model)
        seen[step] = model.weight.detach().clone()
        assert average.complete == (step == 20)
        if step == 17:
            torch.save({KEY: average.state(), "state_dict": model.state_dict()}, tmp_path / "c")
            average = WeightAverage(3, 4, 20)
            checkpoint = torch.load(tmp_path / "c", weights_only=True)
            torch.testing.assert_close(final_weights(checkpoint)["weight"], model.weight.detach())
            average.restore(checkpoint[KEY])
    expected = (seen[12] + seen[16] + seen[20]) / 3
    mean = final_weights({KEY: average.state(), "state_dict": {}})
    torch.testing.assert_close(mean["weight"], expected)
    assert int(mean["num_batches_tracked"]) == 20
    assert not torch.allclose(mean["weight"], model.weight)


# -- options and scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"where": "encoder"}, "--task.where must be some of encoder_self,decoder_self,cross, got encoder"),
        ({"where": "cross,cross"}, "--task.where must be some of"),
        ({"where": ""}, "--task.where must be some of"),
        ({"beams": 0}, "--task.beams must be at least 1, got 0"),
        ({"average": 0}, "--task.average must be at least 1"),
        ({"average_every": 0}, "--task.average_every must be at least 1"),
        ({"label_smoothing": 1.0}, "--task.label_smoothing must be at least 0 and below 1"),
    ],
)
def test_bad_task_options(options, part):
    with pytest.raises(ValueError) as caught:
        TranslationConfig(**options)
    assert part in str(caught.value)


def test_places_may_be_written_with_blanks():
    assert TranslationConfig(where="cross, encoder_self").places == ("cross", "encoder_self")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_length": 1}, "--data.max_length must be at least 2, got 1"),
        ({"holdout": 2}, "--data.holdout must be at least 3"),
        ({"vocab_size": 200}, "--data.vocab_size must be at least 300"),
        ({"source": "hub", "path": "x"}, "read with --data.source=local only"),
    ],
)
def test_bad_data_options(options, part):
    with pytest.raises(ConfigError) as caught:
        TranslationData(**options)
    assert part in str(caught.value)


def test_sentences_are_scored_as_sacrebleu_does():
    hypotheses, references = ["The cat sat.", "", "A dog"], ["The cat sat.", "Nothing", "A dog runs fast."]
    items = score_sentences(hypotheses, references)
    assert list(items) == ["1", "2", "3"]
    assert items["1"]["bleu"] == pytest.approx(100) and items["2"]["bleu"] == 0
    assert items["3"] == {
        "bleu": sentence_bleu("A dog", ["A dog runs fast."]).score,
        "chrf": sentence_chrf("A dog", ["A dog runs fast."]).score,
        "prediction": "A dog",
    }
    assert 0 < corpus_bleu(hypotheses, [references]).score < 100


def test_the_loss_is_smoothed_cross_entropy_over_real_targets():
    torch.manual_seed(3)
    logits = torch.randn(2, 4, 7, dtype=torch.float64)
    labels = torch.tensor([[1, 6, 2, IGNORED], [5, IGNORED, IGNORED, IGNORED]])
    module = Translation({"name": "dense"}, task={"label_smoothing": 0.2})
    module.total_loss = lambda loss, each: (loss, each)
    module.forward = lambda batch: logits
    loss, each = module.training_step({"labels": labels}, 0)
    terms = []
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0)):
        log_p = logits[row, column].log_softmax(-1)
        terms.append(-(0.8 * log_p[labels[row, column]] + 0.2 * log_p.mean()))
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(each, torch.stack([torch.stack(terms[:3]).mean(), terms[3]]))


# -- attention in an encoder-decoder --------------------------------------------------------------------------

BATCH, SOURCE, TARGET = 3, 29, 23
SPARSE = {"density": 0.3, "block_size": 4, "min_blocks": 2, "sink_block": False}
VARIANTS = {
    "dense": ("dense", {}),
    "ast": ("ast", {**SPARSE, "query_group": 1}),
    "ast-groups": ("ast", {**SPARSE, "query_group": 3}),
}


@pytest.fixture(params=VARIANTS)
def translator(request):
    """A Marian with the attention in all three places, its predictor far from where it starts."""
    name, options = VARIANTS[request.param]
    model = tiny_model("marian")
    handle = swap_attention(model, name, options)
    torch.manual_seed(6)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter)
    return SimpleNamespace(model=model, handle=handle, id=request.param)


def sentences(source=SOURCE):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, source), generator=generator)
    target = torch.randint(3, VOCABULARY, (BATCH, TARGET), generator=generator)
    real = torch.ones(BATCH, source, dtype=torch.long)
    real[1, -7:] = real[2, -16:] = 0
    return {"input_ids": ids, "attention_mask": real, "decoder_input_ids": target}


@torch.no_grad()
def logits_of(model, batch, **options):
    return model(**batch, use_cache=False, **options).logits


def test_sparse_cross_attention_is_sparse(translator):
    with translator.handle.collecting_stats() as slots:
        logits_of(translator.model, sentences())
        density = {slot.pattern: float(slot.stats.density.mean()) for slot in slots}
    assert density.keys() == {"bidirectional_self", "causal_self", "causal_cross"}
    assert all(d == 1 if translator.id == "dense" else 0.2 < d < 0.75 for d in density.values()), density


def test_no_target_token_is_seen_before_its_turn(translator):
    batch = sentences()
    before = logits_of(translator.model, batch)
    for position in (1, 10, 22):
        changed = batch["decoder_input_ids"].clone()
        changed[:, position:] = (changed[:, position:] + 5) % VOCABULARY
        after = logits_of(translator.model, {**batch, "decoder_input_ids": changed})
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, position:], before[:, position:], atol=1e-3)


def test_every_target_token_sees_the_source(translator):
    batch = sentences()
    before = logits_of(translator.model, batch)
    after = logits_of(translator.model, {**batch, "input_ids": (batch["input_ids"] + 5) % VOCABULARY})
    assert (before - after).abs().amax(-1).min() > 1e-3


def test_padding_of_the_source_is_nobodys_business(translator):
    batch = sentences()
    before = logits_of(translator.model, batch)
    filler = torch.randint(3, VOCABULARY, (BATCH, 9))
    other = {
        **batch,
        "input_ids": torch.cat([torch.where(batch["attention_mask"].bool(), batch["input_ids"], 9), filler], 1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 9)),
    }
    torch.testing.assert_close(logits_of(translator.model, other), before, rtol=1e-4, atol=1e-5)


def test_padding_of_the_target_is_nobodys_business(translator):
    batch = sentences()
    real = torch.ones(BATCH, TARGET, dtype=torch.long)
    real[0, 11:] = 0
    before = logits_of(translator.model, batch)
    after = logits_of(translator.model, batch, decoder_attention_mask=real)
    torch.testing.assert_close(after[real.bool()], before[real.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_steps_with_the_cache_give_the_logits_of_the_whole_pass(translator):
    if translator.id == "ast-groups":
        pytest.skip("groups of several queries cannot decode; translation then takes whole passes")
    model, batch = translator.model, sentences()
    whole = logits_of(model, batch)
    encoded = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    cache = None
    for position in range(TARGET):
        out = model(
            encoder_outputs=encoded,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"][:, position : position + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[:, 0], whole[:, position], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_translations_are_the_likeliest_tokens_of_whole_passes(translator):
    """Greedy search of the task, with a cache or without as the variant can, against a plain loop."""
    model, batch = translator.model, sentences()
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    name, options = VARIANTS[translator.id]
    module = Translation({"name": name, **options}, task={"beams": 1})
    assert module._decodes() == (translator.id != "ast-groups")
    found = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=9,
        do_sample=False,
        use_cache=module._decodes(),
    )
    target = torch.full((BATCH, 1), model.config.decoder_start_token_id)
    for _ in range(9):
        logits = logits_of(model, {**batch, "decoder_input_ids": target})[:, -1]
        logits[:, 0] = -torch.inf  # Marian never writes its padding
        target = torch.cat([target, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, target)


def test_whether_the_cache_can_be_used_depends_on_the_place():
    bidirectional_only = {"name": "bigbird"}
    assert Translation(bidirectional_only, task={"where": "encoder_self"})._decodes()
    assert not Translation({"name": "reformer"}, task={"where": "encoder_self,decoder_self"})._decodes()

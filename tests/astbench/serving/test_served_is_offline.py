"""What is served is what `astbench predict` gives, alone and among others."""

import itertools

import pytest
import torch
from transformers import GenerationConfig

from astbench.tasks.qa.data import TriviaQAData
from astbench.tasks.qa.examples import QAExample
from astbench.tasks.qa.task import best_spans
from astbench.tasks.qa.windows import Collate, Windower
from astbench_registry.registry import config_class, make_config, registered
from tests.astbench.serving.conftest import answerer, sentence, serving, translator, writer

CARRIED = {"lists": "carried", "query_tile": 6}
DECODABLE = [
    name
    for name in sorted(registered())
    if config_class(name).capabilities.decode and "causal_self" in config_class(name).capabilities.patterns
]
SETTINGS = {
    **{name: (name, config_class(name).conformance_options) for name in DECODABLE},
    "ast carried": ("ast", {**config_class("ast").conformance_options, **CARRIED}),
    "ast default": ("ast", {}),
    "moba carried": ("moba", {**config_class("moba").conformance_options, **CARRIED}),
}


def prompts(count):
    """Of 1 to 30 words."""
    return [sentence(1000 + seed, 1 + seed * 7 % 30) for seed in range(count)]


def offline(served, prompt, most):
    """As `LanguageModel.predict_step`."""
    ids = torch.tensor([served.tokenizer(prompt)["input_ids"]])
    end = served.tokenizer.eos_token_id
    settings = GenerationConfig(max_new_tokens=most, eos_token_id=end, pad_token_id=end, do_sample=False)
    with torch.inference_mode():
        out = served.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out[0, ids.shape[1] :].tolist()


def differing(name, options, count, family="llama"):
    heads = {} if make_config(name, options).can.gqa else {"num_key_value_heads": 6}
    served = writer(name, options, family, **({} if family == "gpt2" else heads))
    texts = prompts(count)
    lengths = [3 + number * 5 % 17 for number in range(count)]
    wanted = [offline(served, *pair) for pair in zip(texts, lengths, strict=True)]
    assert len({tuple(tokens) for tokens in wanted}) > count // 2, "the model says the same to everything"
    bodies = [
        {"prompt": text, "max_tokens": most, "return_token_ids": True}
        for text, most in zip(texts, lengths, strict=True)
    ]
    wrong = []
    with serving(served, queue=64) as client:
        alone = [client.post("/v1/completions", body) for body in bodies[:4]]
        loaded = client.together("/v1/completions", bodies, threads=24)
        largest = max(
            float(line.partition('le="')[2].partition('"')[0])
            for line in client.get("/metrics").body.decode().splitlines()
            if line.startswith("astbench_batch_size_bucket") and "Inf" not in line and not line.endswith(" 0.0")
        )
        assert largest >= 4, "nothing ran together"
    for number, reply in itertools.chain(enumerate(alone), enumerate(loaded)):
        assert reply.status == 200, reply.body
        choice = reply.json["choices"][0]
        text = served.tokenizer.decode(wanted[number], skip_special_tokens=True)
        if (choice["token_ids"], choice["text"]) != (wanted[number], text):
            wrong.append((number, choice["token_ids"], wanted[number]))
    return wrong


@pytest.mark.parametrize("label", ["dense", "ast default", "ast carried", "synthesizer"])
def test_every_token_alone_and_under_load(label):
    assert differing(*SETTINGS[label], count=8) == []


def test_learned_positions():
    assert differing("ast", config_class("ast").conformance_options, count=8, family="gpt2") == []


@pytest.mark.slow
@pytest.mark.parametrize("label", SETTINGS)
def test_a_thousand_prompts(label):
    assert differing(*SETTINGS[label], count=1000) == []


def test_answers():
    served = answerer("local", {"window": 8})
    questions = [(sentence(seed, 5), sentence(100 + seed, 10 + seed * 37 % 200)) for seed in range(12)]
    cut = Windower(served.tokenizer, 48, 8, 16)
    wanted = []
    for question, document in questions:
        windows = cut.windows(QAExample("q", question, ("",), document, answer_starts=()))
        best = (-torch.inf, "")
        for start in range(0, len(windows), TriviaQAData().eval_batch_size):
            rows = [{"index": 0, "window": w} for w in windows[start : start + TriviaQAData().eval_batch_size]]
            batch = Collate(served.tokenizer.pad_token_id)(rows)
            with torch.inference_mode():
                values, firsts, lasts = best_spans(*served.module(batch), batch["answerable"], 30)
            for row, value in enumerate(values.tolist()):
                begin, end = batch["offsets"][row, firsts[row], 0], batch["offsets"][row, lasts[row], 1]
                best = max(best, (value, document[begin:end]), key=lambda x: x[0])
        wanted.append(best)
    assert len({text for _, text in wanted}) > 6
    bodies = [{"question": question, "document": document} for question, document in questions]
    with serving(served) as client:
        for replies in ([client.post("/answer", body) for body in bodies[:3]], client.together("/answer", bodies)):
            for reply, (value, text) in zip(replies, wanted, strict=False):
                assert reply.status == 200, reply.body
                assert reply.json["answer"] == text
                assert reply.json["above_null"] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(("name", "options"), [("dense", {}), ("ast", {"block_size": 2, "min_blocks": 2})])
def test_translations(name, options):
    served = translator(name, options)
    texts = [sentence(seed, 1 + seed * 3 % 9) for seed in range(12)]
    wanted = []
    for text in texts:
        ids = torch.tensor([served.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            found = served.module.search(ids, torch.ones_like(ids), 24)
        wanted.append(served.tokenizer.batch_decode(found, skip_special_tokens=True)[0].strip())
    assert len(set(wanted)) > 3
    bodies = [{"text": text} for text in texts]
    with serving(served) as client:
        for replies in (
            [client.post("/translate", body) for body in bodies[:3]],
            client.together("/translate", bodies),
        ):
            assert [reply.json["translation"] for reply in replies] == wanted[: len(replies)]

"""`astbench serve` and `astbench loadtest`, and what docs/serve.md says of them."""

import json
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from astbench import swap_attention
from astbench.backbones.adapters import save_adapter
from astbench.cli.commands.serve import _USAGE, _parse
from astbench.serving.options import DEFAULTS, ServeOptions
from tests.astbench.conftest import DEMO
from tests.astbench.serving.conftest import answerer, listening, saved, sentence, serving, translator, writer

ROOT = Path(__file__).resolve().parents[3]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def started(astbench, monkeypatch):
    """`astbench serve`, up to where it would listen: what it says, application, service, options."""

    def start(*words):
        seen = []
        monkeypatch.setattr("astbench.serving.server.run", lambda *what: seen.extend(what))
        done = astbench("serve", *words)
        assert done.code == 0, done.err
        return done.out, *seen

    return start


def test_a_run_is_served_as_predict_runs_it(astbench, started, tmp_path):
    options = ["--data.demo_train=40", "--data.demo_eval=2", "--data.context=32", "--data.batch_size=2"]
    run = tmp_path / "run"
    fit = ["--attention=ast", "--attention.block_size=4", "--attention.lists=carried", "--task=wikitext103", *options]
    done = astbench("fit", *fit, "--data.vocab_size=300", "--trainer.max_steps=2", f"--run_dir={run}")
    assert done.code == 0, done.err
    prompt, out = "The river of the old town", tmp_path / "predicted"
    words = [f"--ckpt_path={run}", f"--data.prompt={prompt}", "--task.max_new_tokens=12", f"--run_dir={out}"]
    done = astbench("predict", *words)
    assert done.code == 0, done.err
    wanted = json.loads((out / "record.json").read_text())["continuation"]
    said, *what = started(run)
    assert "lists=carried" in said and "key        none" in said
    with listening(*what[:2], ServeOptions(port=0)) as client:
        reply = client.post("/v1/completions", {"prompt": prompt, "max_tokens": 12, "return_token_ids": True})
    choice = reply.json["choices"][0]
    assert (choice["token_ids"], choice["text"]) == (wanted["tokens"], wanted["text"])


def test_answers_of_a_run(astbench, started, tmp_path):
    run, document, out = tmp_path / "run", tmp_path / "document.txt", tmp_path / "predicted"
    done = astbench("fit", "--attention=local", "--task=triviaqa", *DEMO, f"--run_dir={run}")
    assert done.code == 0, done.err
    document.write_text(sentence(1, 300))
    words = [f"--ckpt_path={run}", "--data.question=who wrote it", f"--data.document={document}", f"--run_dir={out}"]
    assert astbench("predict", *words).code == 0
    wanted = json.loads((out / "record.json").read_text())["answer"]
    _, *what = started(run)
    with listening(*what[:2], ServeOptions(port=0)) as client:
        reply = client.post("/answer", {"question": "who wrote it", "document": document.read_text()})
    assert (reply.json["answer"], reply.json["windows"]) == (wanted["text"], wanted["windows"])
    assert reply.json["above_null"] == pytest.approx(wanted["above_null"], abs=1e-4)


def test_a_pretrained_folder_and_an_adapter(started, tmp_path):
    folder, adapter = saved(tmp_path / "model"), tmp_path / "adapter"
    said, *_ = started(folder)
    assert "name=dense" in said
    said, _, service, _ = started(folder, "--attention=ast", "--attention.block_size=4", "--max_length=100")
    assert "block_size=4" in said and service.limit == 100
    served = writer()
    served.handle.undo()
    handle = swap_attention(served.model, "ast", {"block_size": 4})
    for parameter in handle.parameters():
        torch.nn.init.constant_(parameter, 0.25)
    save_adapter(handle, adapter)
    said, _, service, _ = started(adapter, f"--backbone={folder}")
    assert "name=ast" in said
    assert all(bool((x == 0.25).all()) for x in service.served.handle.parameters())


REFUSED = {
    "nothing": ((), 2, "takes one MODEL, got none"),
    "two": (("a", "b"), 2, "takes one MODEL, got a b"),
    "not there": (("nowhere",), 6, "nowhere does not exist"),
    "no folder of a model": (("{}",), 2, "a model that does not say what it does"),
    "bad number": (("{}", "--max_batch=0"), 2, "--max_batch must be at least 1, got 0"),
    "no number": (("{}", "--port=x"), 2, "argument --port: invalid int value"),
    "unknown option": (("{model}", "--prot=1"), 2, "takes no --prot=1"),
    "unknown attention": (("{model}", "--attention=asst"), 4, "did you mean 'ast'?"),
    "cannot decode": (("{model}", "--attention=nystrom"), 2, "nystrom"),
    "backbone of no adapter": (("{model}", "--backbone=x"), 2, "--backbone is of an adapter"),
    "no device": (("{model}", "--device=tpux"), 2, "--device=tpux is none"),
    "no template": (("{model}", "--chat_template=nowhere"), 2, "--chat_template=nowhere cannot be read"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(astbench, model, tmp_path, name):
    words, code, message = REFUSED[name]
    (tmp_path / "config.json").write_text("{}" if name != "no folder of a model" else '{"model_type": "llama"}')
    transformers.logging.enable_progress_bar()  # whatever tests before this one left
    done = astbench("serve", *(word.replace("{}", str(tmp_path)).replace("{model}", str(model)) for word in words))
    assert (done.code, done.err.count("\n")) == (code, 1), done.err
    assert message in done.err


def test_help_names_every_option(astbench):
    assert astbench("serve", "--help").out.strip() == _USAGE.strip()
    for name in (*DEFAULTS, "device", "threads", "chat_template", "backbone"):
        assert f"--{name}" in _USAGE


CURLS = [line for line in (ROOT / "docs" / "serve.md").read_text().splitlines() if line.startswith("curl ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl_lines_of_the_documents():
    makers = {"/translate": translator, "/answer": answerer}
    by_model = {}
    for line in CURLS:
        path = re.search(r"8000(/\S+)", line)[1]
        by_model.setdefault(makers.get(path, writer), []).append(line)
    assert len(CURLS) >= 9 and len(by_model) == 3
    for make, lines in by_model.items():
        served = make()
        served.tokenizer.chat_template = CHAT
        with serving(served) as client:
            for line in lines:
                words = shlex.split(line.replace("127.0.0.1:8000", f"127.0.0.1:{client.port}"))
                done = subprocess.run([*words, "--silent", "--fail-with-body"], capture_output=True, text=True)
                assert done.returncode == 0 and done.stdout, (line, done.stdout)


def test_openais_client():
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    served = writer()
    served.tokenizer.chat_template = CHAT
    with serving(served, key="KEY") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="KEY", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.completions.create(model="tiny", prompt="the river", max_tokens=6)
        parts = client.completions.create(model="tiny", prompt="the river", max_tokens=6, stream=True)
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        turns = [{"role": "user", "content": "the river"}]
        said = client.chat.completions.create(model="tiny", messages=turns, max_tokens=6)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = list(client.chat.completions.create(model="tiny", messages=turns, max_tokens=6, **options))
        text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        assert text == said.choices[0].message.content and events[-1].usage.completion_tokens == 6
        with pytest.raises(openai.BadRequestError, match="unknown field 'x'"):
            client.completions.create(model="tiny", prompt="a", extra_body={"x": 1})
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="another", prompt="a")
        wrong = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="NO", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_dockerfile_starts_the_command_as_a_user():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    said = dict(line.split(" ", 1) for line in lines if line and line[0].isupper())
    assert said["USER"].isdecimal() and int(said["USER"]) > 0
    assert "http://127.0.0.1:8000/health" in said["HEALTHCHECK"]
    words = [*json.loads(said["ENTRYPOINT"]), *json.loads(said["CMD"])]
    assert words[:2] == ["astbench", "serve"]
    given, rest = _parse(words[2:])
    assert (given.model, given.host, given.port, rest) == ("/model", "0.0.0.0", 8000, [])
    copied = " ".join(line for line in lines if line.startswith("COPY "))
    assert all(name in copied for name in ("astbench", "registry", "kernels", "pyproject.toml", "constraints.txt"))


@torch.no_grad()
def test_half_precision_is_of_weights_alone():
    """Rotary frequencies in bfloat16 would turn far tokens by other angles."""
    from tests.astbench.serving.conftest import writer

    served = writer("ast", {"block_size": 8, "lists": "carried"}, max_position_embeddings=4000)
    buffers = {name: buffer.clone() for name, buffer in served.module.named_buffers()}
    assert any("inv_freq" in name for name in buffers)
    ids = torch.randint(5, 90, (1, 3000), generator=torch.Generator().manual_seed(0))
    before = served.model(ids, logits_to_keep=100).logits
    served.place("cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in served.module.parameters()} == {torch.bfloat16}
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in served.module.named_buffers())
    after = served.model(ids, logits_to_keep=100).logits.float()
    off = (after - before).abs().mean() / before.abs().mean()
    assert off < 0.02, off


def test_a_port_that_is_taken_or_a_host_that_is_none_is_one_line(astbench, tmp_path):
    folder = saved(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as other:
        for words, why in (
            ([f"--port={other.getsockname()[1]}"], "Address already in use"),
            (["--port=0", "--host=192.0.2.1"], "Cannot assign requested address"),
        ):
            done = astbench("serve", folder, *words)
            assert done.code == 2 and done.err.count("\n") == 1, done.err
            assert words[-1] in done.err and f"nobody can listen there: {why}" in done.err

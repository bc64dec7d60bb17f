"""`astbench loadtest`: when requests are due, what is counted, and one real server."""

import asyncio
import json
from itertools import pairwise

import pytest

from astbench.loadtest.arrivals import poisson, poisson_count
from astbench.loadtest.client import Sent, _streamed
from astbench.loadtest.kept import load_part, read_rows, rows
from astbench.loadtest.objective import Objective
from astbench.loadtest.summary import summary
from astbench.tasks.mt import demo


def test_arrivals_are_those_of_the_seed_and_as_many_as_asked_for():
    due = poisson(50, 100, seed=3)
    assert due == poisson(50, 100, seed=3) != poisson(50, 100, seed=4)
    assert due == sorted(due) and due[0] > 0 and due[-1] < 100
    assert len(due) == pytest.approx(5000, abs=300)
    gaps = [b - a for a, b in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    # Of a Poisson process as large as the mean; of even times 0.
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15)


def sent(latencies, outcome="200"):
    return [Sent(float(n), n + 0.5, n + latency, outcome) for n, latency in enumerate(latencies)]


def test_times_count_from_when_a_request_was_due():
    found = summary(sent([1.0] * 100), seconds=100, slo=Objective(0.7))
    assert found["latency_seconds"]["p50"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["good_share"] == 0  # 0.5 s from when it was sent
    assert found["client_lag_seconds"]["max"] == 0.5


def test_what_failed_took_for_ever():
    found = summary(sent([0.1] * 94) + sent([0.0] * 6, "429"), seconds=100, slo=Objective(1))
    assert found["outcomes"] == {"200": 94, "429": 6} and found["good_share"] == 0.94
    assert found["latency_seconds"]["p50"]["value"] == pytest.approx(0.1)
    assert found["latency_seconds"]["p95"]["value"] is None  # and no small number of a quick refusal
    assert summary(sent([0.0] * 3, "timed out"), 10, Objective(1))["throughput_per_second"] == 0


def test_the_99th_percentile_needs_a_thousand_requests():
    assert list(summary(sent([0.1] * 999), 999, Objective(1))["latency_seconds"]) == ["p50", "p95"]
    many = summary(sent([0.1] * 980 + [2.0] * 20), 1000, Objective(1))["latency_seconds"]
    assert many["p99"]["value"] == pytest.approx(2.0) and many["p95"]["value"] == pytest.approx(0.1)


def test_a_server(astbench, tmp_path):
    pytest.importorskip("aiohttp", reason="the extra 'loadtest' is not installed")
    pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
    from tests.astbench.serving.conftest import serving, translator

    texts = [pair.en for pair in demo.generate("test", 50)]
    with serving(translator(texts=texts, size=500, longest=40)) as client:
        url, out = f"http://127.0.0.1:{client.port}", tmp_path / "found" / "load.json"
        done = astbench("loadtest", url, "--rate=8", "--seconds=1.5", "--slo=30", f"--out={out}")
        assert done.code == 0, done.err
        assert "requests to" in done.out and "client's lag" in done.out
        record = json.loads(out.read_text())
        found = record["loadtest"]
        assert (record["command"], record["state"], record["config"]["path"]) == ("loadtest", "done", "/translate")
        assert found["requests"] == found["answered"] == len(poisson(8, 1.5, 0)) and found["good_share"] == 1
        assert found["server"]["attention"]["name"] == "dense" and found["server"]["resident_bytes"] > 1e8
        assert astbench("loadtest", url, f"--out={out}").err.count("load.json exists already; name another file") == 1
        assert json.loads(out.read_text()) == record
        assert astbench("loadtest", url, "--path=/answer").err.count("--path must be /translate") == 1
        assert astbench("loadtest", url, "--path=/health").err.count("--path must be /translate") == 1
    refused = astbench("loadtest", url)
    assert refused.code == 2 and "gives no answer" in refused.err and refused.err.count("\n") == 1


def test_tokens_of_a_server_come_one_by_one(astbench, tmp_path):
    pytest.importorskip("aiohttp", reason="the extra 'loadtest' is not installed")
    pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
    from tests.astbench.serving.conftest import serving, writer

    with serving(writer(max_position_embeddings=4000)) as client:
        out = tmp_path / "load.json"
        url = f"http://127.0.0.1:{client.port}"
        done = astbench("loadtest", url, "--rate=8", "--seconds=1", "--max_tokens=5", "--slo=30", f"--out={out}")
    assert done.code == 0, done.err
    found = json.loads(out.read_text())["loadtest"]
    assert found["answered"] == found["requests"] > 0 and found["slo_seconds"] == {"latency": 30}
    assert "first token p50" in done.out and "a token p95" in done.out
    first, whole = (found[f"{name}_seconds"]["p50"]["value"] for name in ("ttft", "latency"))
    assert 0 < first < whole and found["itl_seconds"]["p50"]["value"] > 0
    assert found["tokens_per_second"] == pytest.approx(5 * found["throughput_per_second"])


def test_a_stream_that_goes_wrong_is_no_answer():
    class Content:
        def __init__(self, *lines):
            self.lines = lines

        async def __aiter__(self):
            for line in self.lines:
                yield line

    def outcome(*lines):
        return asyncio.run(_streamed(Content(*lines), [], lambda: 1.0))

    token = b'data: {"choices": [{"text": "a", "token_ids": [1, 2]}]}\n'
    assert outcome(token, b"\n", b"data: [DONE]\n") == "200"
    assert outcome(token) == outcome(token, token[:9]) == "cut off"
    assert outcome(token, b'data: {"error": {"message": "late"}}\n') == "failed after 2 tokens"


def test_requests_that_are_kept_say_the_same_again():
    came = [Sent(n, n + 0.01, n + 3.0, "200", (n + 1.0, n + 2.0)) for n in range(5)] + sent([0.0], "429")
    read = read_rows(json.loads(json.dumps(rows(came))))
    assert summary(read, 9, Objective(tpot=1)) == summary(came, 9, Objective(tpot=1))
    found = load_part({"load": rows(came), "alone": rows(came[:2])}, Objective(ttft=1.5), 0)
    assert found["load"]["good_share"] == 5 / 6 and found["alone"] == {"latency": 3.0, "ttft": 1.0, "tpot": 1.0}


def test_so_many_arrivals_and_the_same_ones_at_every_rate():
    slow, fast = poisson_count(2, 9, seed=1), poisson_count(4, 9, seed=1)
    assert len(slow) == 9 and slow == sorted(slow) and slow != poisson_count(2, 9, seed=2)
    assert fast == pytest.approx([at / 2 for at in slow])
    assert poisson_count(2, 4000, seed=1)[-1] == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("localhost:80",), "takes the server's URL"),
        (("http://a", "--rate=0"), "--rate must be above 0, got 0"),
        (("http://a", "--rate=1000000", "--seconds=1000"), "more than a million requests"),
        ((), "the following arguments are required: URL"),
    ],
)
def test_refusals(astbench, words, message):
    done = astbench("loadtest", *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1

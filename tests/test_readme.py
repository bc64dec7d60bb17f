"""README and docs: short enough to read, links that lead somewhere, commands that run, numbers that records hold."""

import functools
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from astbench.cli.commands.names import LIGHTNING, OWN
from astbench_registry.table import BUILTIN

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def named(path):
    return str(path.relative_to(ROOT))


def prose(text):
    """Without fenced code."""
    return FENCE.sub("", text)


# ----- size and shape


def test_readme_is_two_screens():
    assert len(README.read_bytes()) <= 10_240


def test_readme_has_one_small_table():
    tables = re.findall(r"(?:^\|.*\n)+", prose(README.read_text()), re.M)
    assert len(tables) == 1
    head, _, *rows = tables[0].splitlines()
    assert head.count("|") - 1 <= 4
    assert len(rows) <= 6


def test_readme_names_every_attention_with_its_paper():
    section = README.read_text().partition("## Attentions\n")[2].partition("\n## ")[0]
    lines = dict(re.findall(r"^- `(\w+)`(.*)", section, re.M))
    assert lines.keys() == BUILTIN.keys()
    for name, row in BUILTIN.items():
        paper = row.config.paper
        own = re.search(r"arXiv [\d.]+", paper) if not paper.startswith("control") else None
        assert own is None or own[0] in lines[name], f"{name}: {paper}"


# ----- links


def anchors(page):
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def dead_links(page):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page):
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A *head*, here\n```\n# no head\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md) [b](there.md#a-head-here) [c](no.md) [d](there.md#no-head) [e](#nor)")
    assert dead_links(page) == ["no.md", "there.md#no-head", "#nor"]


@pytest.mark.parametrize("page", [README, ROOT / "docs/gpu.md", ROOT / "docs/cli.md"], ids=named)
def test_readme_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"{named(page)} names make {target}"


def test_what_the_code_says_of_docs_is_there():
    """`docs/cpu.md, "All pairs"` in the kernels: the page, and that heading on it."""
    sources = [f for room in ("astbench", "registry", "kernels") for f in (ROOT / room).rglob("*.py")]
    for source in sources:
        text = re.sub(r"\n\s*", " ", source.read_text())
        for page, head in re.findall(r'(docs/[\w/-]+\.md)(?:, "([^"]+)")?', text):
            assert (ROOT / page).is_file(), f"{named(source)} names {page}"
            assert not head or head.lower().replace(" ", "-") in anchors(ROOT / page), f"{page} has no {head!r}"


# ----- commands: README's run as they stand, the others as far as their options are understood


def commands(page):
    """Every `astbench ...` line: in fenced code, and in one pair of backticks."""
    text = page.read_text()
    code = [
        line.split(" #")[0].strip() for kind, body in FENCE.findall(text) if kind == "sh" for line in body.split("\n")
    ]
    spans = [" ".join(span.split()) for span in re.findall(r"`(astbench [^`]+)`", prose(text))]
    return [line for line in dict.fromkeys(code + spans) if line.startswith("astbench ")]


SHORT = commands(README)
PLACEHOLDERS = ("COMMAND", "NAME...", "[options]")
# Pages of results are generated; tests/astbench/tables/test_repeat.py holds the commands on them.
LINES = [
    line
    for line in dict.fromkeys(
        line for page in PAGES if not {"log", "results"} & {*page.parts} for line in commands(page)
    )
    if line not in SHORT and not any(word in line.split() for word in PLACEHOLDERS)
]

INSTEAD = {"run": ["--plan"], "reproduce": ["--print"]}
TINY = "--trainer.max_steps=2 --data.demo_train=40 --data.demo_eval=4 --run_dir=runs/NAME".split()
DOCUMENT = "Ada Lovelace wrote the first program. It was for a machine that nobody had built."

DRIVER = """
import contextlib, io, json, sys
from astbench.cli import main
done = []
for words in json.loads(sys.stdin.read()):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    done.append([code or 0, out.getvalue(), err.getvalue()])
print("\\n" + json.dumps(done))
"""


def run_all(calls, folder):
    """(exit code, output, errors) of each call, one behind the other in one process."""
    words = [sys.executable, "-c", DRIVER]
    done = subprocess.run(words, cwd=folder, input=json.dumps(calls), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with what the commands name: a document, a plugin, recipes, and after README's `fit` a run."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "article.txt").write_text(DOCUMENT)
    for name in ("recipes", "sweeps", "results", "docs"):
        (folder / name).symlink_to(ROOT / name)
    example = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    task = re.search(r"<!-- task:begin -->\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    (folder / "majority.py").write_text(task)
    (folder / "mine.py").write_text(example.replace('"relu"', '"mine"').replace("ReluAttention", "Mine"))
    return folder


def as_run(line):
    """The words of a command of README; training is cut short, what would run for an hour only says what it would."""
    words = shlex.split(line)[1:]
    # the first does not end, the second needs it, the third needs a model: tests/astbench tries them
    if words[0] in ("serve", "loadtest", "deploy-test"):
        return [words[0], "--help"]
    return words + {"fit": TINY, "bench": ["--print_config"], **INSTEAD}.get(words[0], [])


def understood(line):
    """The words that show whether every option of a command of the docs is understood, without its work."""
    if "--data.text=" in line:  # of a run that translates, and the run here answers questions
        line = line.replace("--ckpt_path=runs/NAME", "--attention=ast --task=wmt14")
    line = line.replace("--task=NAME", "--task=triviaqa").replace("--attention=NAME", "--attention=ast")
    command, *words = ("ast" if word == "NAME" else word for word in shlex.split(line)[1:])
    if command == "analyze" and any(word.startswith(("--drift", "--linguistics", "--values")) for word in words):
        return [command, "--help"]  # they need kept weights, or a package, or a model; tests/astbench tries them
    if not words and command in ("analyze", *INSTEAD):
        return [command, "--help"]
    if command in INSTEAD:
        return [command, *words, *INSTEAD[command]]
    # README's show one; the others: tests/astbench
    if command in ("table", "report", "push", "serve", "loadtest", "deploy-test", "depth"):
        return [command, "--help"]
    if "--help" in words or "--resume=runs/NAME" in words or command in ("--help", "list", "describe", "doctor"):
        return [command, *words]
    return [command, *words, "--help" if command == "check" else "--print_config"]


@pytest.fixture(scope="module")
def ran(here):
    """(exit code, output, errors) of every command: README's first, and of those a run before what reads it."""
    lines = [*sorted(SHORT, key=lambda line: "runs/NAME" in line), *LINES]
    words = [as_run(line) if line in SHORT else understood(line) for line in lines]
    return dict(zip(lines, run_all(words, here), strict=True))


@pytest.mark.parametrize("line", SHORT)
def test_readme_command_runs(ran, line):
    code, out, err = ran[line]
    assert code == 0, err
    assert out.strip()


@pytest.mark.parametrize("line", LINES)
def test_command_of_the_docs_is_understood(ran, line):
    code, out, err = ran[line]
    assert code == 0, err
    assert out.strip()


def test_readme_commands_say_what_readme_says(ran, here):
    def said(start):
        return next(text[1] for line, text in ran.items() if line.startswith(f"astbench {start}"))

    assert all(f"  {name} " in said("list") for name in BUILTIN)
    assert " 0 failed" in said("check")
    assert "against dense" in said("describe ast --explain")
    assert "answer" in said("predict")
    shown = next(body for kind, body in FENCE.findall(README.read_text()) if body.startswith("astbench fit\n"))
    labels = re.findall(r"^  (\w+)  ", shown, re.M)
    assert len(labels) > 10
    assert [label for label in labels if f"\n  {label} " not in said("fit")] == []
    assert (here / "runs/NAME/pattern.png").is_file()


def test_docs_show_every_command():
    told = {line.split()[1] for line in [*SHORT, *LINES]}
    assert {*LIGHTNING, *OWN} <= told


# ----- the Python swap


def test_training_loop_of_the_docs_runs(tmp_path, monkeypatch):
    """Every line as it stands, on a tiny model and two batches."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=61, **sizes))
    ids = torch.arange(2 * 200).view(2, 200) % 61
    names = {"model": model, "batches": [{"input_ids": ids, "labels": ids}] * 2}
    text = (ROOT / "docs" / "cli.md").read_text().partition("<!-- loop:begin -->")[2].partition("<!-- loop:end -->")[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exec(FENCE.findall(text)[0][1], names)
    after = model.state_dict()
    assert names["own"] and not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert all(torch.equal(after[name], value) for name, value in names["own"].items())
    assert len(names["density"]) == 2 and all(0 < d <= 1 for row in names["density"].values() for d in row)


def test_readme_swap_runs():
    """Every line as it stands, but for the download, in whose place a tiny model of the family is made."""
    code = next(body for kind, body in FENCE.findall(README.read_text()) if kind == "python")
    load = next(line for line in code.splitlines() if "from_pretrained" in line)
    tiny = (
        "from transformers import AutoConfig\n"
        "model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model('roberta', hidden_size=24, "
        "num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=61, max_position_embeddings=642)"
        ").eval()"
    )
    before, undo = code.replace(load, tiny).split("handle.undo()")
    tokens = torch.arange(600)[None] % 50 + 5
    names = {}
    torch.manual_seed(0)
    exec(before.split("handle =")[0], names)
    with torch.no_grad():
        dense = names["model"](tokens).start_logits
        exec("handle =" + before.split("handle =")[1], names)
        sparse = names["model"](tokens).start_logits
        assert isinstance(sum(names["handle"].losses().values()), int | torch.Tensor)
        exec("handle.undo()" + undo, names)
        again = names["model"](tokens).start_logits
    assert not torch.equal(dense, sparse)
    assert torch.equal(dense, again)


# ----- numbers in the text


@functools.cache
def record(path):
    return json.loads((ROOT / "results" / path / "record.json").read_text())


def loss_over_dense(run):
    """By how many percent a tuned run's perplexity lies above that of dense, as in the table."""
    nll = [json.loads((ROOT / "results/smollm2" / r / "items.json").read_text()) for r in (run, "dense-tuned")]
    gaps = [nll[0][window]["nll"] - nll[1][window]["nll"] for window in nll[1]]
    assert stats.ttest_1samp(gaps, 0.0).pvalue < 0.05  # what is told as a loss is one
    return 100 * math.expm1(sum(gaps) / len(gaps))


def of_questions(attention, value):
    """Mean over the seeds of a value of the sweep's records."""
    return sum(value(record(f"main/questions-{attention}-seed{seed}")) for seed in range(3)) / 3


def score_of(found):
    return found["metrics"]["f1"]


def seconds(attention):
    return of_questions(attention, lambda found: found["train"]["wall_seconds"])


def f1(run):
    return record(run)["metrics"]["f1"]


SAID = {
    "time of the demo": lambda: f"{seconds('ast'):.0f} s against {seconds('dense'):.0f} s",
    "blocks of 64": lambda: f"Blocks of 64 lose {loss_over_dense('ast-d0.25-blocks64-tuned'):.0f}%",
    "learned part": lambda: (
        f"loses {loss_over_dense('pooled_topk-d0.25-tuned'):.1f}% where AST loses "
        f"{loss_over_dense('ast-d0.25-tuned'):.1f}%"
    ),
    "TriviaQA": lambda: (
        f"`ast` (F1 {f1('triviaqa/minilm-ast-articles'):.1f}) from `dense` ({f1('triviaqa/minilm-dense-articles'):.1f})"
    ),
    "learning on the demo": lambda: "its learning is worth {:.1f} points".format(
        of_questions("ast", lambda r: r["metrics"]["f1"]) - of_questions("pooled_topk", lambda r: r["metrics"]["f1"])
    ),
    "defaults": lambda: f"{loss_over_dense('ast-d0.25-tuned'):.1f}% with its defaults",
    "others": lambda: (
        f"`quest` loses {loss_over_dense('quest-tuned'):.1f}%, `moba` {loss_over_dense('moba-tuned'):.1f}%"
    ),
}


@pytest.mark.parametrize("what", SAID)
def test_numbers_in_readmes_text_are_the_records(what):
    text = " ".join(README.read_text().split())
    assert SAID[what]() in text

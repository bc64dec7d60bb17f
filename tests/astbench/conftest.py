"""What the second floor's tests share: tiny Hugging Face models, the command line in-process, plugin files."""

from __future__ import annotations

import signal
import warnings
from dataclasses import dataclass
from textwrap import dedent

import pytest
import torch
from matplotlib.figure import Figure
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from astbench.cli import main
from astbench.tasks import registry as tasks
from astbench_registry import registry
from tests.astbench.processes import Runner

VOCABULARY = 61

_DECODER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6}
_SEQ2SEQ = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
SETTINGS = {
    "llama": {**_DECODER, "num_key_value_heads": 2},
    "qwen3": {**_DECODER, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "bert": {**_DECODER, "max_position_embeddings": 64},
    "roberta": {**_DECODER, "max_position_embeddings": 66, "pad_token_id": 1},
    "distilbert": {"dim": 24, "hidden_dim": 40, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64},
    "bart": _SEQ2SEQ,
    "marian": {**_SEQ2SEQ, "pad_token_id": 0},
    "modernbert": {**_DECODER, "layer_types": ["full_attention"] * 3, **_TOKENS},
}
CAUSAL = ("llama", "qwen3", "gpt2")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
SEQ2SEQ = ("bart", "marian")


def tiny_model(family, auto=None, attention="sdpa", **changes):
    """A small random model of a family, in evaluation mode, in its own attention."""
    auto = auto or {"causal": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}[
        "causal" if family in CAUSAL else "seq2seq" if family in SEQ2SEQ else "encoder"
    ]  # fmt: skip
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{"vocab_size": VOCABULARY, **SETTINGS.get(family, {}), **changes})
    model = auto.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        # Larger than Hugging Face's initialisation: attention must matter to the logits.
        if parameter.dim() >= 2:
            parameter.data.mul_(4)
    return model


NAMES = ["--attention=ast", "--task=triviaqa"]
DEMO = [
    "--data.demo_train=64",
    "--data.demo_eval=8",
    "--data.max_length=128",
    "--data.stride=32",
    "--data.max_question=32",
    "--data.batch_size=4",
    "--trainer.max_steps=3",
    "--trainer.log_every_n_steps=1",
]
"""A fit of a few seconds."""


_savefig = Figure.savefig


def sketched(figure, file, **options):
    """`Figure.savefig` without the layout engine, at 20 dots per inch."""
    figure.set_layout_engine("none")
    _savefig(figure, file, dpi=20)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Commands in processes of their own, all from one server: see :class:`tests.astbench.processes.Runner`."""
    return Runner(tmp_path_factory.mktemp("processes"))


@pytest.fixture
def fresh_registry(monkeypatch):
    """Plugins of one test are unknown to the next."""
    monkeypatch.setattr(registry._names, "decorated", {})
    monkeypatch.setattr(tasks._names, "decorated", {})


@pytest.fixture
def astbench(capsys, monkeypatch, fresh_registry):
    """Run a command line in this process: `astbench("list")`.

    Its pictures are sketches: laid out once and small. Whole ones, of all kinds, are drawn in `test_runs.py` and by
    the runs in processes of their own; here they would be a third of what a tiny fit takes.
    """
    monkeypatch.setattr("sys.argv", ["astbench"])
    monkeypatch.setattr(Figure, "savefig", sketched)
    before = signal.getsignal(signal.SIGTERM)

    def run(*words):
        capsys.readouterr()
        with warnings.catch_warnings():
            # Lightning calls a method of jsonargparse that has a new name.
            warnings.filterwarnings("ignore", message=r"(?s).*(instantiate_classes|JSONARGPARSE_DEPRECATION)")
            code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    yield run
    signal.signal(signal.SIGTERM, before)


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from astbench_registry import Attention, AttentionConfig, AttentionOutput, Capabilities, register_attention


@dataclass(frozen=True)
class MineConfig(AttentionConfig):
    """Attention of mine.

    Args:
        power: Of the logits.
    """

    power: float = 1.0
    capabilities: ClassVar = Capabilities(patterns=("bidirectional_self",), gqa=False)


@register_attention("NAME", MineConfig)
class Mine(Attention):
    def forward(self, q, k, v, mask, *, scale=None, context=None):
        q, k, v = mask.without_padding(q, k, v)
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        scale = (scale or q.shape[-1] ** -0.5) * self.config.power
        out = F.scaled_dot_product_attention(q, k, v, allowed, scale=scale)
        return AttentionOutput(out, stats=self.all_pairs(q, k, mask, context))
'''


@pytest.fixture
def plugin_file(tmp_path):
    """Write a loose plugin file that registers one attention (or holds other code)."""

    def write(name="mine", file="mine.py", code=None):
        path = tmp_path / file
        path.write_text(dedent(code) if code is not None else PLUGIN.replace("NAME", name))
        return path

    return write

"""Build a backbone from a preset, or load a pretrained one; extend its position table when asked."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from importlib.util import find_spec
from os.path import exists, isdir
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import astbench.backbones.cct  # noqa: F401  # makes it known to the auto classes
from astbench.backbones.presets import PRESETS, BackboneConfig, Head, resolve_preset
from astbench.errors import ConfigError, MissingPackageError, NameOrPluginError
from astbench.files.reading import read_by_library

log = logging.getLogger(__name__)

_AUTO = {
    "question_answering": AutoModelForQuestionAnswering,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "sequence_classification": AutoModel,
    "image_classification": AutoModelForImageClassification,
}
_LIKE_CCT = re.compile(r"cct-\d+/\d+x\d+")
"""Names of the paper's that are no preset here, and not those of anybody's repository."""
_TABLES = ("position_embeddings", "embed_positions", "wpe")


def load_backbone(
    config: BackboneConfig,
    head: Head,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A Hugging Face model with its head, in float32 and in its own (sdpa) attention.

    Args:
        config: Preset, folder or hub name, and length.
        head: Which head stands on it.
        tokenizer: Gives a preset its vocabulary and special tokens.
        settings: More of a preset's configuration, which depends on the data.

    Raises:
        ConfigError: unknown preset, or a folder without weights.
        DataError: weights that cannot be read.
        MissingPackageError: GGUF weights without the `gguf` package.
    """
    preset = resolve_preset(config.name, head)
    if preset:
        return _from_preset(preset, head, tokenizer, config.max_positions, settings or {})
    model = _from_pretrained(config, head)
    if config.max_positions and config.max_positions > max_positions(model):
        extend_positions(model, config.max_positions)
    return model


def _from_preset(
    name: str,
    head: Head,
    tokenizer: PreTrainedTokenizerBase | None,
    max_positions: int | None,
    more: Mapping[str, Any],
) -> PreTrainedModel:
    settings = {**PRESETS[name], **more}
    if max_positions:
        settings["max_position_embeddings"] = max_positions
    model_type = settings.pop("model_type")
    mimetic, induction, copying = (settings.pop(start, False) for start in ("mimetic", "induction", "copying"))
    if tokenizer is not None:
        # Multiples of 8 keep the embedding's matmul on the fast path.
        settings["vocab_size"] = -(-len(tokenizer) // 8) * 8
        for token in ("pad", "bos", "eos", "cls", "sep"):
            settings[f"{token}_token_id"] = getattr(tokenizer, f"{token}_token_id")
        if head == "seq2seq":
            settings["decoder_start_token_id"] = tokenizer.bos_token_id
    config = AutoConfig.for_model(model_type, **settings)
    model: PreTrainedModel = _AUTO[head].from_config(config, attn_implementation="sdpa")
    if mimetic:
        _mimetic_init(model)
    if induction:
        _induction_init(model)
    if copying:
        _copying_init(model)
    return model.float()


SLOW_TURN = 0.01
"""Radians a token: slower rotary dimensions hardly turn within a document of the demo."""

EQUAL_SCORE = 11.0
"""Attention logit of a token with its equal at the start: above a few hundred others' noise."""

LOCAL_BIAS = 1.0
"""Constant in the fast dimensions of the heads that look around."""


def _mimetic_init(model: PreTrainedModel) -> None:
    """Start with heads that do something: the first half find equal tokens at any distance, the rest look around.

    After Trockman and Kolter 2023 (Mimetic Initialization of Self-Attention Layers, arXiv 2305.09828), who set
    W_q W_k^T near a multiple of the identity. Here the query and key projections of the first half of the heads
    are drawn equal, and only where rotary positions turn slowly: fast dimensions would blur a match at a
    distance. The other heads get a constant in the fast dimensions, which rotary positions turn into a preference
    for near tokens. Without this, small encoders stay for thousands of steps at "some answer of the right kind".
    """
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    dim, types = hidden // heads, model.config.type_vocab_size
    turn = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    slow = (turn < SLOW_TURN).repeat(2)  # dimensions i and i + dim/2 turn together
    finds_equal = torch.arange(heads) < heads // 2
    content = (finds_equal[:, None] & slow).flatten()
    position = (~finds_equal[:, None] & ~slow).flatten()
    # A token of unit variance scores EQUAL_SCORE with its equal.
    std = (EQUAL_SCORE * dim**0.5 / (int(slow.sum()) * hidden)) ** 0.5
    for module in model.modules():
        parts = dict(module.named_children())
        if isinstance(module, nn.Embedding):
            # Wide, so that training does not blur rare words before they are used; token types stay a hint.
            nn.init.normal_(module.weight, std=0.06 if module.num_embeddings == types else 0.3)
        elif {"q_proj", "k_proj", "v_proj", "o_proj"} <= parts.keys():
            equal = torch.randn(hidden, hidden) * std
            for name in ("q_proj", "k_proj"):
                parts[name].get_parameter("weight").data[content] = equal[content]
                parts[name].get_parameter("bias").data[position] = LOCAL_BIAS
            for name in ("v_proj", "o_proj"):
                nn.init.normal_(parts[name].get_parameter("weight"), std=hidden**-0.5)


FAST_TURN = 0.1
"""Radians a token: faster rotary dimensions tell a token from its neighbours."""

PREVIOUS_SCORE = 12.0
"""Attention logit of the token before, from each pair of fast dimensions."""

MATCH_SCORE = 16.0
"""Attention logit of the token after an equal one."""

COPY_GAIN = 5.0
"""How much more a found token weighs in the prediction than the one that asked."""


def _induction_init(model: PreTrainedModel) -> None:
    """Start a causal decoder with induction heads (Olsson et al. 2022, arXiv 2209.11895).

    In the first half of the layers every head looks at the token before and writes it, turned by a random rotation,
    beside the token itself. In the other layers a query's token is compared with that, so the head finds what came
    after an equal token, and writes it where it is predicted. For probes of recall: they ask whether an attention
    reaches and picks the right key, and not how many thousand steps it takes until such heads form.
    """
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    dim = hidden // heads
    turn = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    fast, slow = (turn > FAST_TURN).repeat(2), (turn < SLOW_TURN).repeat(2)
    nn.init.normal_(model.get_input_embeddings().get_parameter("weight"), std=hidden**-0.5)
    attentions = [m for m in model.modules() if {"q_proj", "o_proj"} <= dict(m.named_children()).keys()]
    rotation = nn.init.orthogonal_(torch.empty(hidden, hidden))
    for layer, module in enumerate(attentions):
        q, k, v, o = (module.get_parameter(f"{name}_proj.weight") for name in "qkvo")
        nn.init.orthogonal_(v)
        if layer < len(attentions) // 2:
            key = fast * (PREVIOUS_SCORE * dim**0.5 / 2) ** 0.5
            # The key's constant as rotary positions turn it one token back.
            one, two = key.chunk(2)
            back = torch.cat([one * turn.cos() + two * turn.sin(), two * turn.cos() - one * turn.sin()])
            module.get_parameter("k_proj.bias").data = key.repeat(heads)
            module.get_parameter("q_proj.bias").data = back.repeat(heads)
            o.data = rotation @ v.data.T * hidden**-0.5
        else:
            std = (MATCH_SCORE * dim**0.5 / (int(slow.sum()) * hidden)) ** 0.5
            q.data = torch.randn(hidden, hidden) * std * slow.repeat(heads)[:, None]
            k.data = q.data @ rotation.T
            o.data = COPY_GAIN * hidden**-0.5 * v.data.T


def _copying_init(model: PreTrainedModel) -> None:
    """Start with heads that copy what they look at: W_o is W_v transposed, and W_v's rows are orthonormal.

    Trockman and Kolter 2023 (arXiv 2305.09828) start this product near a multiple of the identity too. With tied
    embeddings a token that a head looks at becomes likelier, so that looking back pays from the first step on.
    Without this, the smallest decoder still guesses among 16 names after 400 steps of the language-modelling demo;
    with it, it has read them after 300.
    """
    dim = model.config.hidden_size // model.config.num_attention_heads
    for module in model.modules():
        parts = dict(module.named_children())
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)  # wide enough for a copied token to stand out
        elif {"q_proj", "k_proj", "v_proj", "o_proj"} <= parts.keys():
            value, out = (parts[name].get_parameter("weight").data for name in ("v_proj", "o_proj"))
            heads = value.view(-1, dim, model.config.hidden_size)  # (key/value heads, head_dim, hidden)
            for head in heads:
                nn.init.orthogonal_(head)
            shared = model.config.num_attention_heads // len(heads)
            copies = heads.repeat_interleave(shared, 0) / shared  # query heads of one group read the same values
            out.copy_(copies.flatten(0, 1).T)


def locate(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` of models and tokenizers finds a backbone: path or name, and arguments.

    Raises:
        ConfigError: neither a preset nor a folder nor a name with an owner, with the nearest preset.
    """
    folder = Path(config.name).expanduser()
    if not isdir(folder):
        if exists(folder) or config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
            raise ConfigError(f"--backbone.name={config.name} is not a folder with a pretrained model")
        if "/" not in config.name or _LIKE_CCT.fullmatch(config.name):
            names = [*PRESETS, "tiny", "small"]
            near = difflib.get_close_matches(config.name, names, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise NameOrPluginError(
                f"unknown backbone '{config.name}'{hint or ';'} presets: {', '.join(sorted(names))}"
            )
        return config.name, {"revision": config.revision} if config.revision else {}
    gguf = config.gguf_file
    if gguf is None and not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise ConfigError(
                f"--backbone.name={config.name} holds neither a config.json nor exactly one .gguf file "
                f"({len(files)} found); name one with --backbone.gguf_file"
            )
        gguf = files[0].name
    return str(folder), {"gguf_file": gguf} if gguf else {}


def _from_pretrained(config: BackboneConfig, head: Head) -> PreTrainedModel:
    where, arguments = locate(config)
    if "gguf_file" in arguments:
        _require_gguf()
    elif config.trust_weights_only:
        arguments["use_safetensors"] = True
    with read_by_library(f"--backbone.name={config.name} cannot be loaded"):
        model: PreTrainedModel = _AUTO[head].from_pretrained(
            where, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False, **arguments
        )
    return model


def _require_gguf() -> None:
    # transformers reads GGUF with the first and fills the model with the second.
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise MissingPackageError(f"GGUF weights need {' and '.join(missing)}: pip install 'astbench[gguf]'")


def max_positions(model: PreTrainedModel) -> int:
    """Longest input in tokens that the model's configuration allows."""
    table = _position_tables(model)
    if table:
        _, module = table[0]
        return int(module.num_embeddings - _reserved_rows(module))
    return int(getattr(model.config, "max_position_embeddings", 2**31))


def require_positions(model: PreTrainedModel, length: int, flag: str) -> None:
    """Refuse inputs of `length` tokens, as `flag` set them, where the model has fewer positions.

    Raises:
        ConfigError: naming both numbers and the flags to change.
    """
    limit = max_positions(model)
    if length > limit:
        raise ConfigError(
            f"{flag} tokens is longer than the backbone's position table of {limit}; lower it, or set "
            f"--backbone.max_positions={length} to extend a learned table by copying"
        )


def extend_positions(model: PreTrainedModel, length: int) -> None:
    """Lengthen learned position tables to `length` tokens by repeating them (Beltagy et al. 2020, section 5).

    Raises:
        ConfigError: the model has no learned position table.
    """
    tables = _position_tables(model)
    if not tables:
        raise ConfigError(
            f"{type(model).__name__} has no learned position table to extend, and takes at most "
            f"{max_positions(model)} tokens; lower --data.max_length"
        )
    # RoBERTa's configuration counts the reserved rows, BART's does not.
    model.config.max_position_embeddings += length - max_positions(model)
    for parent, old in tables:
        reserved = _reserved_rows(old)
        trained = old.weight.data[reserved:]
        copies = -(-length // len(trained))
        rows = torch.cat([old.weight.data[:reserved], trained.repeat(copies, 1)[:length]])
        # In place: BART's and OPT's tables are classes of their own that add the reserved rows.
        old.weight = nn.Parameter(rows)
        old.num_embeddings = len(rows)
        for buffer in ("position_ids", "token_type_ids"):
            if isinstance(getattr(parent, buffer, None), torch.Tensor):
                fresh = torch.arange(len(rows)) if buffer == "position_ids" else torch.zeros(len(rows)).long()
                parent.register_buffer(buffer, fresh[None], persistent=False)
        log.info("position table extended from %d to %d tokens by repeating it", len(trained), length)


def _position_tables(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Embedding]]:
    return [
        (parent, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in _TABLES
        and type(child).__name__ != "Identity"
        and isinstance(child, nn.Embedding)
        and child.weight.requires_grad
    ]


def _reserved_rows(table: nn.Embedding) -> int:
    """RoBERTa and BART keep rows in front for padding: positions start after them."""
    offset = getattr(table, "offset", None)
    if offset is not None:
        return int(offset)
    return 0 if table.padding_idx is None else table.padding_idx + 1

"""Backbones that are built from scratch, by name. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Head = Literal["question_answering", "causal_lm", "seq2seq", "sequence_classification", "image_classification"]
"""What stands on the backbone: span extraction, next-token prediction, a decoder that translates, what the task itself
puts there, or the classes of pictures."""


@dataclass(frozen=True)
class BackboneConfig:
    """Which Hugging Face model carries the attention.

    Args:
        name: A preset (`tiny`, `small`; `astbench list` shows all), a folder with pretrained weights, or a
            model name on the Hugging Face hub.
        revision: Commit, tag or branch on the hub.
        gguf_file: GGUF file inside the folder; found by itself when the folder holds just one and no
            safetensors.
        max_positions: Longest input in tokens. Above the length of a pretrained position table, the table is
            extended by copying it (as Longformer did); default: what the model has.
        trust_weights_only: Refuse weights that are not safetensors or GGUF.
        gradient_checkpointing: Keep only each layer's input while training and compute the rest again in the
            backward pass: less memory, about a third more time, the same gradients.
        compile: torch.compile every layer around its attention (which stays as it is) for `fit`. Needs a C++ compiler
            on a CPU, Triton on a GPU; the first step takes a minute, and results differ in the last digits.
        calibrate: Batches of the training split that the model runs through densely before anything else, so that an
            attention which can starts from its queries and keys (`ast` with `index_dim`). Not with `--resume` or
            `--ckpt_path`, nor where `--init_from` brings the attention's own weights. A transform that finds
            thresholds looks at as many, in any case.
    """

    name: str = "tiny"
    revision: str | None = None
    gguf_file: str | None = None
    max_positions: int | None = None
    trust_weights_only: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    calibrate: int = 0

    def __post_init__(self) -> None:
        if self.max_positions is not None and self.max_positions < 1:
            raise ValueError(f"--backbone.max_positions must be at least 1 token, got {self.max_positions}")
        if self.calibrate < 0:
            raise ValueError(f"--backbone.calibrate must be 0 or more batches, got {self.calibrate}")


_ENCODER_SIZES = {
    # hidden, layers, heads, feed-forward
    "tiny": (64, 3, 2, 128),
    "small": (256, 4, 4, 512),
    # What the Long Range Arena is usually run with since Xiong et al. 2021 (Nystromformer), arXiv 2102.03902.
    "lra": (64, 2, 2, 128),
}
_DECODER_SIZES = {
    # hidden, layers, heads, kv heads, feed-forward
    "tiny": (64, 2, 4, 2, 176),
    # As many key as query heads: every causal attention can serve it.
    "mini": (128, 4, 4, 4, 352),
    "small": (256, 4, 4, 2, 704),
}
_SEQ2SEQ_SIZES = {
    # hidden, layers of the encoder and of the decoder, heads, feed-forward, dropout
    "tiny": (64, 2, 4, 256, 0.0),
    "small": (256, 3, 4, 1024, 0.1),
}
_INDUCTION_SIZES = {
    # as above; as many kv heads as heads
    "tiny": (128, 2, 2, 2, 352),
    "small": (256, 2, 2, 2, 704),
}
_CCT_SIZES = {
    # layers / kernel size x convolutions, as the paper calls them: hidden, heads, feed-forward
    "2/3x2": (128, 2, 128),
    "7/3x1": (256, 4, 512),
}


def _encoder(size: str) -> dict[str, Any]:
    hidden, layers, heads, feed_forward = _ENCODER_SIZES[size]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
    }


def _modernbert(size: str) -> dict[str, Any]:
    shape = _encoder(size)
    return {
        **shape,
        "model_type": "modernbert",
        # Every layer is one that the variant replaces: no built-in sliding windows.
        "layer_types": ["full_attention"] * shape["num_hidden_layers"],
        "max_position_embeddings": 8192,
    }


def _rope_bert(size: str) -> dict[str, Any]:
    return {
        **_encoder(size),
        # BERT with rotary positions and token types (question or document).
        "model_type": "jina_embeddings_v3",
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "mimetic": True,
    }


def _bert(size: str) -> dict[str, Any]:
    shape = _encoder(size)
    return {
        **shape,
        "model_type": "bert",
        "intermediate_size": 2 * shape["intermediate_size"],
        "max_position_embeddings": 1024,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _llama(size: str) -> dict[str, Any]:
    return _decoder(_DECODER_SIZES[size])


def _induction(size: str) -> dict[str, Any]:
    return {
        **_decoder(_INDUCTION_SIZES[size]),
        # A Llama that starts with heads which find what followed an equal token before; they need both.
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "induction": True,
    }


def _decoder(sizes: tuple[int, int, int, int, int]) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, feed_forward = sizes
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": feed_forward,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }


def _marian(size: str) -> dict[str, Any]:
    hidden, layers, heads, feed_forward, dropout = _SEQ2SEQ_SIZES[size]
    return {
        # The Transformer of Vaswani et al. 2017: sinusoidal positions, normalised after each layer, one embedding.
        "model_type": "marian",
        "d_model": hidden,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": feed_forward,
        "decoder_ffn_dim": feed_forward,
        "activation_function": "relu",
        "dropout": dropout,
        "scale_embedding": True,
        "max_position_embeddings": 1024,
        # Marian's own defaults are numbers in the vocabulary of its first checkpoint.
        "forced_eos_token_id": None,
    }


def _llama_copying(size: str) -> dict[str, Any]:
    return {**_llama(size), "copying": True}


def _cct(size: str) -> dict[str, Any]:
    layers, _, convolutions = size.partition("/")
    kernel_size, _, number = convolutions.partition("x")
    hidden, heads, feed_forward = _CCT_SIZES[size]
    return {
        "model_type": "cct",
        "num_conv_layers": int(number),
        "kernel_size": int(kernel_size),
        "hidden_size": hidden,
        "num_hidden_layers": int(layers),
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
    }


def cct_tokens(image_size: int, num_conv_layers: int, kernel_size: int) -> int:
    """Tokens that a CCT's tokenizer makes of a square picture, by the sizes of its convolutions and poolings."""
    stride, padding = max(1, kernel_size // 2 - 1), max(1, kernel_size // 2)
    side = image_size
    for _ in range(num_conv_layers):
        side = (side + 2 * padding - kernel_size) // stride + 1
        side = (side - 1) // 2 + 1  # pooling, 3 wide, by steps of 2
    return side * side


PRESETS: dict[str, dict[str, Any]] = {
    f"{family}-{size}": make(size)
    for family, make, sizes in (
        ("rope-bert", _rope_bert, _ENCODER_SIZES),
        ("modernbert", _modernbert, _ENCODER_SIZES),
        ("bert", _bert, _ENCODER_SIZES),
        ("llama", _llama, _DECODER_SIZES),
        ("marian", _marian, _SEQ2SEQ_SIZES),
        ("induction", _induction, _INDUCTION_SIZES),
        ("llama-copying", _llama_copying, _DECODER_SIZES),
        ("cct", _cct, _CCT_SIZES),
    )
    for size in sizes
}

DEFAULT_FAMILY: dict[Head, str] = {
    "question_answering": "rope-bert",
    "causal_lm": "llama",
    "seq2seq": "marian",
    # Its start favours no kind of head, unlike rope-bert's.
    "sequence_classification": "modernbert",
    "image_classification": "cct",
}
"""What a bare `tiny` or `small` means for a head."""

_SHORT = {"cct-tiny": "cct-2/3x2", "cct-small": "cct-7/3x1"}
"""The two where a family's sizes have names of their own."""


def resolve_preset(name: str, head: Head) -> str | None:
    """The preset that a name stands for with a head, or None when it is a folder or a hub name."""
    if name in PRESETS:
        return name
    full = f"{DEFAULT_FAMILY[head]}-{name}"
    full = _SHORT.get(full, full)
    return full if full in PRESETS else None

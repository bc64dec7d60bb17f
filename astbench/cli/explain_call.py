"""What `astbench describe NAME --explain` says: which kernel a call would run, why, and what it costs against dense."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import ceil
from typing import TYPE_CHECKING, Any, cast

from astbench.cli.messages import nearest
from astbench.errors import ConfigError
from astbench_registry import AttentionConfig
from astbench_registry.capabilities import PATTERNS, Pattern
from astbench_registry.configs.block_selection import BlockSelectionConfig
from astbench_registry.registry import registered

if TYPE_CHECKING:
    from astbench_kernels.dispatch import Explanation

_CHOICES = {
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "device": ("cpu", "cuda"),
    "pattern": PATTERNS,
    "mode": ("prefill", "decode", "training"),
}


@dataclass(frozen=True)
class Layer:
    """A call of a layer, as `KEY=VALUE` words describe it.

    Attributes:
        N: Tokens.
        M: Keys; 0 for as many as tokens.
        density: Share of the visible blocks to keep; 0 for the attention's own.
        heads: Query heads.
        kv_heads: Key/value heads; 0 for as many as query heads.
        head_dim: Size of a head.
        batch: Sequences.
        dtype: Of the inputs.
        device: cpu or cuda.
        pattern: How the layer attends; empty for causal_self when decoding, else bidirectional_self.
        mode: prefill (all tokens at once), decode (the last one alone) or training (all of them, with gradients).
    """

    N: int
    M: int = 0
    density: float = 0.0
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    pattern: str = ""
    mode: str = "prefill"


KEYS = tuple(f.name for f in fields(Layer))


def explain_call(name: str, config: AttentionConfig, words: list[str]) -> str:
    """The text of `astbench describe NAME --explain KEY=VALUE...`.

    Raises:
        ConfigError: a word that is no KEY=VALUE, an unknown key, a value that cannot be, a call that this attention
            cannot serve, or an attention that picks no key blocks.
    """
    if not isinstance(config, BlockSelectionConfig):
        able = [
            row.name for row in registered().values() if row.config and issubclass(row.config, BlockSelectionConfig)
        ]
        raise ConfigError(f"--explain is for attentions that pick key blocks ({', '.join(able)}), not for '{name}'")
    if config.backend != "auto":
        raise ConfigError("--explain says what --attention.backend=auto takes; leave --attention.backend out")
    layer = _checked(name, config, _layer(words))
    from astbench_kernels.dispatch import Shapes, explain
    from astbench_registry.block_selection import BIDIRECTIONAL_GROUP

    sequential = layer.pattern in ("causal_self", "causal_cross")
    queries = 1 if layer.mode == "decode" else layer.N
    causal = layer.pattern == "causal_self"
    if causal and config.lists == "carried":
        raise ConfigError(
            "--explain cannot say what carried lists hold, since it depends on the text: a run's last lines say the "
            "share of tiles computed; leave --attention.lists out for lists of each token"
        )
    kept, visible = kept_blocks(config, layer, queries, causal)
    shapes = Shapes(
        device=layer.device,
        dtype=layer.dtype,
        batch=layer.batch,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        list_heads=layer.heads,
        head_dim=layer.head_dim,
        query_length=queries,
        key_length=layer.M,
        block_size=config.block_size,
        query_group=config.query_group or (1 if sequential else BIDIRECTIONAL_GROUP),
        density=kept / visible,
        causal=causal,
        capability=_capability() if layer.device == "cuda" else 0,
        gradients=layer.mode == "training",
    )
    return _text(name, layer, explain(shapes))


def _capability() -> int:
    """Of the CUDA device that is here, 90 for 9.0; 0 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def _layer(words: list[str]) -> Layer:
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--explain takes KEY=VALUE, got {word}; keys: {', '.join(KEYS)}")
        if key not in KEYS:
            raise ConfigError(f"--explain takes no {key}{nearest(key, list(KEYS))}; keys: {', '.join(KEYS)}")
        values[key] = _value(key, text)
    if "N" not in values:
        raise ConfigError("--explain needs the number of tokens: N=32768")
    return Layer(**values)


def _value(key: str, text: str) -> int | float | str:
    if key in _CHOICES:
        if text not in _CHOICES[key]:
            raise ConfigError(
                f"{key} must be one of {', '.join(_CHOICES[key])}, got {text}{nearest(text, list(_CHOICES[key]))}"
            )
        return text
    kind = float if key == "density" else int
    try:
        value = kind(text.replace(",", ""))
    except ValueError:
        value = 0
    if key == "density" and not 0 < value <= 1:
        raise ConfigError(f"density must be above 0 and at most 1, got {text}")
    if value <= 0:
        raise ConfigError(f"{key} must be a whole number of at least 1, got {text}")
    return value


def _checked(name: str, config: BlockSelectionConfig, layer: Layer) -> Layer:
    """With the defaults that depend on others filled in, and nothing that cannot be."""
    decode = layer.mode == "decode"
    layer = replace(
        layer,
        M=layer.M or layer.N,
        kv_heads=layer.kv_heads or layer.heads,
        pattern=layer.pattern or ("causal_self" if decode else "bidirectional_self"),
    )
    if layer.heads % layer.kv_heads:
        raise ConfigError(f"kv_heads must divide heads={layer.heads}, got {layer.kv_heads}")
    if decode and not layer.pattern.startswith("causal"):
        raise ConfigError(f"mode=decode needs pattern=causal_self or causal_cross, got {layer.pattern}")
    if decode and not config.can.decode:
        raise ConfigError(
            f"attention '{name}' cannot decode with --attention.query_group={config.query_group}; set it to 1"
        )
    if layer.pattern == "causal_self" and layer.M < layer.N:
        raise ConfigError(f"M must be at least N={layer.N} with pattern=causal_self, got {layer.M}")
    config.can.check(
        name,
        cast(Pattern, layer.pattern),
        num_heads=layer.heads,
        num_kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        dtype=layer.dtype,
    )
    return layer


def kept_blocks(config: BlockSelectionConfig, layer: Layer, queries: int, causal: bool) -> tuple[int, int]:
    """Blocks kept and blocks visible, summed over rows that see one more block each; one row without a causal mask.

    The budget of :class:`astbench_registry.block_selection.BlockSelector`.
    """
    blocks = ceil(layer.M / config.block_size)
    first = ceil((layer.M - queries + 1) / config.block_size) if causal else blocks
    kept = visible = 0
    for seen in range(first, blocks + 1):
        wanted = config.top_k if config.top_k is not None and not layer.density else None
        if wanted is None:
            wanted = ceil(seen * (layer.density or config.density) - 1e-6)
        kept += min(seen, max(wanted, config.min_blocks))
        visible += seen
    return kept, visible


def _text(name: str, layer: Layer, found: Explanation) -> str:
    row = found.row
    facts = {
        "backend=auto": row.runs,
        "because": "; ".join(found.facts),
        "table row": f"{row.when} -> {row.runs}",
        "reason": row.why,
        "threshold": row.measured,
        "work": (
            f"all (query, key) pairs, of which {found.share:.3g} of the visible ones count"
            if found.row.schedule == "masked"
            else f"{found.share:.3g} of dense's (query, key) pairs: the blocks kept, over the visible ones"
        ),
        **_against_dense(name, found),
    }
    shown = ", ".join(f"{key}={getattr(layer, key)}" for key in KEYS if key != "density")
    return f"{name}, {shown}\n\n" + "\n".join(f"  {key:<15} {value}" for key, value in facts.items())


def _against_dense(name: str, found: Explanation) -> dict[str, str]:
    measured = found.measured
    if measured is None:
        return {"against dense": f"not measured ({found.missing})"}
    parts = {"forward": measured.forward, "forward and backward": measured.training}
    layers = {"forward": measured.layer_forward, "forward and backward": measured.layer_training}
    where = (
        f"{measured.tokens:,} tokens at density {measured.density:.3g}, the nearest measured call "
        f"({measured.record}: one CPU thread)"
    )
    kernel = "; ".join(f"{what} {_share(ratio, found)}" for what, ratio in parts.items())
    if name != "ast":
        return {
            "against dense": f"not measured: of '{name}' only the kernel was, without its choice of blocks",
            "kernel alone": kernel,
            "R from": where,
        }
    verdicts = {what: _verdict(what, ratio, found) for what, ratio in layers.items()}
    return {
        "against dense": verdicts["forward"],
        "": verdicts["forward and backward"],
        "kernel alone": f"{kernel}; choosing, and learning to choose, take the rest",
        "R from": where,
    }


def _share(ratio: float, found: Explanation) -> str:
    return f"{ratio * found.share:.2g} of dense's time"


def _verdict(what: str, ratio: float, found: Explanation) -> str:
    """Of the whole layer, choosing included."""
    verdict = "faster" if ratio * found.share < 1 else "slower"
    return (
        f"{what}: the layer is {verdict}, R {ratio:.2f} x {found.share:.3g} = {_share(ratio, found)}; dense is faster "
        f"above a density of {min(1.0, 1 / ratio):.2f}"
    )

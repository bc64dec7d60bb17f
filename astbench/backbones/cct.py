"""Compact Convolutional Transformer (Hassani et al. 2021, arXiv 2104.05704), as a Hugging Face model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from astbench.backbones.presets import cct_tokens


class CCTConfig(PreTrainedConfig):
    """Sizes of a CCT; the published code's defaults, and CCT-2/3x2's sizes.

    Args:
        image_size: Side of the square pictures, in pixels.
        num_channels: Colours of a pixel.
        num_conv_layers: Convolutions of the tokenizer, each followed by a pooling that halves the sides.
        kernel_size: Side of the convolutions' kernels, odd.
        conv_channels: Channels between two convolutions.
        hidden_size: Size of a token.
        num_hidden_layers: Layers of the encoder.
        num_attention_heads: Heads of a layer.
        intermediate_size: Of a layer's feed-forward part.
        attention_dropout: Dropout of attention weights; a swapped attention has none.
        drop_path_rate: Probability of leaving out the last layer's branches (stochastic depth); the first layer's are
            never left out, and it rises in even steps between them.
        layer_norm_eps: Of the layer norms.
    """

    model_type = "cct"

    image_size: int = 32
    num_channels: int = 3
    num_conv_layers: int = 2
    kernel_size: int = 3
    conv_channels: int = 64
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 128
    attention_dropout: float | int = 0.1
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("max_position_embeddings", None)  # it follows from the others
        super().__post_init__(**kwargs)
        self.max_position_embeddings = cct_tokens(self.image_size, self.num_conv_layers, self.kernel_size)


class ConvTokenizer(nn.Module):
    """Convolution, ReLU and max-pooling, once or several times; then one token for each place, row by row.

    x_0 = MaxPool(ReLU(Conv2d(x))): the paper's convolutional tokenizer. Convolutions have no bias.
    """

    def __init__(self, config: CCTConfig) -> None:
        super().__init__()
        stride, padding = max(1, config.kernel_size // 2 - 1), max(1, config.kernel_size // 2)
        inner = [config.conv_channels] * (config.num_conv_layers - 1)
        widths = [config.num_channels, *inner, config.hidden_size]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, config.kernel_size, stride, padding, bias=False)
            for before, after in pairwise(widths)
        )
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(batch, channels, side, side)` to `(batch, tokens, hidden)`."""
        for convolution in self.convolutions:
            pixel_values = self.pool(torch.relu(convolution(pixel_values)))
        return pixel_values.flatten(2).transpose(1, 2)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Softmax attention of all tokens to all, `(batch, heads, tokens, head_dim)` to `(batch, tokens, heads, ...)`."""
    out = scaled_dot_product_attention(
        query, key, value, dropout_p=options["dropout"], scale=cast(float, options["scaling"])
    )
    return out.transpose(1, 2).contiguous(), None


class CCTAttention(nn.Module):
    """Self-attention among all tokens, through transformers' interface, where a swap finds it."""

    is_causal = False

    def __init__(self, config: CCTConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = float(config.attention_dropout)
        size = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(batch, tokens, hidden)`, in and out."""
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        out, _ = attend(self, q, k, v, None, dropout=dropout, scaling=self.scaling)
        return self.o_proj(out.flatten(2))


class CCTLayer(GradientCheckpointingLayer):
    """One layer of the encoder.

    The published code's arithmetic, which is not quite the pre-norm layer of the paper's figure: its second norm lies
    on the residual stream itself, so that what the feed-forward part is added to is normalised too.
    """

    def __init__(self, config: CCTConfig, drop_path: float) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.norm_attention = nn.LayerNorm(size, eps=eps)
        self.attention = CCTAttention(config)
        self.norm_stream = nn.LayerNorm(size, eps=eps)
        self.up = nn.Linear(size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, size)
        self.drop_path = drop_path

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(batch, tokens, hidden)`, in and out."""
        hidden_states = hidden_states + self._kept(self.attention(self.norm_attention(hidden_states)))
        hidden_states = self.norm_stream(hidden_states)
        return hidden_states + self._kept(self.down(gelu(self.up(hidden_states))))

    def _kept(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016, arXiv 1603.09382), of each picture apart; the rest is scaled up."""
        if not self.training or not self.drop_path:
            return branch
        keep = 1 - self.drop_path
        kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
        return branch * kept.to(branch.dtype) / keep


class CCTForImageClassification(PreTrainedModel):
    """Convolutional tokenizer, learned positions, encoder, sequence pooling, classes.

    The paper's SeqPool: z = softmax(g(x_L)^T) x_L, with a linear g that makes one number of a token.
    """

    config_class = CCTConfig
    config: CCTConfig
    base_model_prefix = "cct"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: CCTConfig) -> None:
        super().__init__(config)
        self.tokenizer = ConvTokenizer(config)
        # Not an nn.Embedding: a table of places in a picture cannot be made longer by repeating it.
        self.positions = nn.Parameter(torch.empty(1, config.max_position_embeddings, config.hidden_size))
        last = max(1, config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(
            CCTLayer(config, config.drop_path_rate * number / last) for number in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_pool = nn.Linear(config.hidden_size, 1)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the published code: truncated normals, He's normals for convolutions."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif module is self:
            nn.init.trunc_normal_(self.positions, std=0.2)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool = True, **_: Any
    ) -> ImageClassifierOutput:
        """Classes of pictures.

        Args:
            pixel_values: `(batch, channels, image_size, image_size)`.
            labels: Right classes, `(batch,)`, for a loss.
            return_dict: Taken for the sake of callers of other models; the output is always the same.
        """
        hidden = self.tokenizer(pixel_values) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        weights = self.attention_pool(hidden).softmax(1)  # (batch, tokens, 1)
        logits = self.classifier((weights.transpose(1, 2) @ hidden).squeeze(1))
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(CCTConfig.model_type, CCTConfig)
AutoModelForImageClassification.register(CCTConfig, CCTForImageClassification)

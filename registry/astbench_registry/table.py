"""The table: every built-in attention, its options and where its code is.

Importing this file imports no torch, so that `astbench list` and `--help` answer at once. To add a variant:
its options under `configs/`, its row here, its file under `variants/`, its parity test, its recipe.
"""

from __future__ import annotations

from astbench_registry.class_table import Row
from astbench_registry.configs.adaptive_sparse import ASTConfig
from astbench_registry.configs.bigbird import BigBirdConfig
from astbench_registry.configs.block_selection import OracleTopKConfig, PooledTopKConfig, RandomTopKConfig
from astbench_registry.configs.dense import DenseConfig
from astbench_registry.configs.dsa import DSAConfig
from astbench_registry.configs.linear import LinearConfig
from astbench_registry.configs.linformer import LinformerConfig
from astbench_registry.configs.local import LocalConfig
from astbench_registry.configs.longformer import LongformerConfig
from astbench_registry.configs.minference import MInferenceConfig
from astbench_registry.configs.moba import MoBAConfig
from astbench_registry.configs.nsa import NSAConfig
from astbench_registry.configs.nystrom import NystromConfig
from astbench_registry.configs.performer import PerformerConfig
from astbench_registry.configs.quest import QuestConfig
from astbench_registry.configs.reformer import ReformerConfig
from astbench_registry.configs.seer import SeerConfig
from astbench_registry.configs.sinkhorn import SinkhornConfig
from astbench_registry.configs.sparse import SparseConfig
from astbench_registry.configs.sqa import SQAConfig
from astbench_registry.configs.ssa import SSAConfig
from astbench_registry.configs.synthesizer import SynthesizerConfig

_VARIANTS = "astbench_registry.variants"

BUILTIN: dict[str, Row] = {
    "ast": Row(f"{_VARIANTS}.ast.attention:AdaptiveSparseAttention", ASTConfig),
    "bigbird": Row(f"{_VARIANTS}.bigbird:BigBirdAttention", BigBirdConfig),
    "dense": Row(f"{_VARIANTS}.dense:DenseAttention", DenseConfig),
    "dsa": Row(f"{_VARIANTS}.dsa:DeepSeekSparseAttention", DSAConfig),
    "linear": Row(f"{_VARIANTS}.linear:LinearAttention", LinearConfig),
    "linformer": Row(f"{_VARIANTS}.linformer:LinformerAttention", LinformerConfig),
    "local": Row(f"{_VARIANTS}.local:LocalAttention", LocalConfig),
    "longformer": Row(f"{_VARIANTS}.longformer:LongformerAttention", LongformerConfig),
    "minference": Row(f"{_VARIANTS}.minference:MInferenceAttention", MInferenceConfig),
    "moba": Row(f"{_VARIANTS}.moba:MoBAttention", MoBAConfig),
    "nsa": Row(f"{_VARIANTS}.nsa:NativeSparseAttention", NSAConfig),
    "nystrom": Row(f"{_VARIANTS}.nystrom:NystromAttention", NystromConfig),
    "oracle_topk": Row(f"{_VARIANTS}.oracle_topk:OracleTopKAttention", OracleTopKConfig),
    "performer": Row(f"{_VARIANTS}.performer:PerformerAttention", PerformerConfig),
    "pooled_topk": Row(f"{_VARIANTS}.pooled_topk:PooledTopKAttention", PooledTopKConfig),
    "quest": Row(f"{_VARIANTS}.quest:QuestAttention", QuestConfig),
    "random_topk": Row(f"{_VARIANTS}.random_topk:RandomTopKAttention", RandomTopKConfig),
    "reformer": Row(f"{_VARIANTS}.reformer:ReformerAttention", ReformerConfig),
    "seer": Row(f"{_VARIANTS}.seer:SeerAttention", SeerConfig),
    "sinkhorn": Row(f"{_VARIANTS}.sinkhorn:SinkhornAttention", SinkhornConfig),
    "sparse": Row(f"{_VARIANTS}.sparse:SparseAttention", SparseConfig),
    "sqa": Row(f"{_VARIANTS}.sqa:SQAttention", SQAConfig),
    "ssa": Row(f"{_VARIANTS}.ssa:SelectiveAttention", SSAConfig),
    "synthesizer": Row(f"{_VARIANTS}.synthesizer:SynthesizerAttention", SynthesizerConfig),
}

"""Flash attention with alpha-entmax weights, and lazy attention, in O(N) memory."""

from shared_kernels.installed import warn_of_another_project

from ._sharded_call import sequence_places
from ._version import __version__
from .annealing import AnnealedStep, EntmaxAnneal, entmax_anneal
from .api import (
    AttentionStats,
    adasplash,
    adasplash2,
    adasplash_no_block_mask,
    adasplash_v1,
    adasplash_v2,
    attention_stats,
    entmax_decode,
    explain,
    lazy_attention_triton,
    triton_entmax,
    triton_entmax15,
    triton_entmax_v1,
    triton_entmax_v2,
    triton_sparsemax,
)
from .huggingface import (
    TransformersCheck,
    check_transformers,
    load_entmax_alpha,
    register_transformers,
    save_entmax_alpha,
)
from .modules import (
    AlphaParameter,
    EntmaxAttention,
    KeyValueCache,
    LazyAttention,
    MultiheadAttention,
)
from .paged import DecodeStats, PagedCache, decode_stats
from .sdpa import scaled_dot_product_attention

__all__ = [
    "AlphaParameter",
    "AnnealedStep",
    "AttentionStats",
    "DecodeStats",
    "EntmaxAnneal",
    "EntmaxAttention",
    "KeyValueCache",
    "LazyAttention",
    "MultiheadAttention",
    "PagedCache",
    "TransformersCheck",
    "__version__",
    "adasplash",
    "adasplash2",
    "adasplash_no_block_mask",
    "adasplash_v1",
    "adasplash_v2",
    "attention_stats",
    "check_transformers",
    "decode_stats",
    "entmax_anneal",
    "entmax_decode",
    "explain",
    "lazy_attention_triton",
    "load_entmax_alpha",
    "register_transformers",
    "save_entmax_alpha",
    "scaled_dot_product_attention",
    "sequence_places",
    "triton_entmax",
    "triton_entmax15",
    "triton_entmax_v1",
    "triton_entmax_v2",
    "triton_sparsemax",
]

warn_of_another_project(__name__)

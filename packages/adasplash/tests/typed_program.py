"""A program of a user, for a strict type checker: `python -m mypy --strict typed_program.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from adasplash import (
    AlphaParameter,
    AttentionStats,
    EntmaxAttention,
    KeyValueCache,
    LazyAttention,
    MultiheadAttention,
    TransformersCheck,
    adasplash,
    adasplash2,
    adasplash_v1,
    attention_stats,
    check_transformers,
    entmax_decode,
    explain,
    lazy_attention_triton,
    load_entmax_alpha,
    register_transformers,
    save_entmax_alpha,
    scaled_dot_product_attention,
    triton_entmax,
    triton_entmax15,
    triton_entmax_v2,
    triton_sparsemax,
)

q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
out: Tensor = adasplash(q, k, v, alpha=torch.tensor(1.5), is_causal=True, niter=None)
out = adasplash_v1(q, k, v, 1.5, True) + adasplash2(q, k, v)
out = scaled_dot_product_attention(q, k, v, is_causal=True, alpha=1.5)
out = entmax_decode(q[:, :, :1], k, v, torch.tensor([9]), alibi_slopes=torch.rand(2))
out = lazy_attention_triton(q, k, v, torch.zeros(2, 4), torch.zeros(2), window_size=3)
rows: Tensor = triton_entmax(q, 1.5, dim=1) + triton_sparsemax(q) + triton_entmax15(q, n_iter=2)
rows = triton_entmax_v2(q, 1.5, 2, True, False)
stats: AttentionStats = attention_stats(q, k)
density: Tensor = stats.tile_density
text: str = explain(adasplash, q, k, v)
alpha: Tensor = AlphaParameter(2, dtype=torch.float64)()

x = torch.randn(1, 9, 16)
block = EntmaxAttention(16, 2, causal=True)
plain: Tensor = block(x)
result, cache = block(x, use_cache=True)
known: KeyValueCache = cache
length: int = known.length
more: Tensor = block(x, past_key_value=known)
current: float | Tensor = block.current_alpha()
lazy = LazyAttention(16, 2, 3)
idle: Tensor = lazy(x)
seen, kept = lazy(x, use_cache=True)
attention: MultiheadAttention = MultiheadAttention.from_torch(nn.MultiheadAttention(16, 2))
attended, weights = attention(x, x, x, need_weights=False)
total: Tensor = attended.sum() + out.sum() + rows.sum() + density.sum() + alpha.sum()


def converted(model: nn.Module, folder: Path) -> TransformersCheck:
    register_transformers("entmax", alpha=1.5)
    path: Path = save_entmax_alpha(model, folder)
    load_entmax_alpha(model, path.parent)
    return check_transformers(model)

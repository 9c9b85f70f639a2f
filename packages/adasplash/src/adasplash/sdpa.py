"""Attention with the signature of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks, _recomputed
from .api import adasplash, attention_call, rows_of_heads


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    alpha: float | Tensor = 1.5,
    backend: str = "auto",
) -> Tensor:
    r"""``F.scaled_dot_product_attention`` with alpha-entmax weights: the same call and alpha.

    o = dropout(entmax_alpha(scale query key^T + attn_mask)) value, in O(N) memory.

    Args:
        query: (..., H, N_q, D); also (B, N_q, D) and (N_q, D).
        key: (..., H, N_k, D); with ``enable_gqa`` the number of its heads divides H.
        value: (..., H, N_k, D_v), as many heads as ``key``.
        attn_mask: broadcasts to (..., H, N_q, N_k). Boolean: True takes part. Floating point: added
            to the scores; receives its gradient.
        dropout_p: chance in [0, 1] that a weight is dropped, the others grow by 1 / (1 - p). As in
            PyTorch it is applied whenever it is not 0, so pass 0 in evaluation.
        is_causal: hide the future. **Aligned at the beginning** (query i sees keys 0 to i), as in
            PyTorch. With N_q != N_k :func:`adasplash` aligns the ends instead, which is what
            decoding with a cache needs; ``torch.nn.attention.bias.causal_lower_right`` as
            ``attn_mask`` asks for that here.
        scale: factor of query key^T; 1/sqrt(D) by default.
        enable_gqa: let several query heads share a key head.
        alpha: in [1, 2]; 1 is softmax attention. A number, a scalar tensor or one per head (H,); a
            tensor receives its gradient.

    Performance:
        backend: as for :func:`adasplash`. Dropped weights
            have no kernel: then rows are taken in tiles of plain PyTorch, recomputed in the
            backward pass with the same random numbers, which needs ``backend="auto"``.

    Returns:
        (..., H, N_q, D_v) in the dtype of query. A query that sees no key gives 0.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape or range, by name.
        NotImplementedError: the backend asked for cannot run, and why.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 100, 64)
        >>> scaled_dot_product_attention(q, k, v, is_causal=True, alpha=1.5).shape
        torch.Size([2, 8, 100, 64])

    Source: Goncalves, Treviso and Martins, AdaSplash, 2025 (arXiv 2502.12082).
    """
    probability("dropout_p", dropout_p)
    if is_causal and attn_mask is not None:
        checks.fail("attn_mask", "be None with is_causal=True", "both", "adasplash(...) takes both")
    at_end = False
    if type(attn_mask).__name__ == "CausalBias":
        from torch.nn.attention.bias import CausalBias, CausalVariant  # loads torch's compiler

        at_end = cast("CausalBias", attn_mask).variant == CausalVariant.LOWER_RIGHT
        is_causal, attn_mask = True, None
    q, k, v, lead = _four_dimensions(query, key, value, enable_gqa)
    options: dict[str, Any] = {"scale": scale, "backend": backend}
    if attn_mask is not None:
        checks.tensor("attn_mask", attn_mask)
        name = "mask" if attn_mask.dtype == torch.bool else "bias"
        if name == "bias":
            checks.floating("attn_mask", attn_mask)
        options[name] = _four_dimensional_mask(attn_mask, q, k, lead)
    if is_causal and at_end:
        out = weighted(q, k, v, alpha, True, dropout_p, **options)
    elif is_causal:
        out = causal_from_the_start(q, k, v, alpha, dropout_p, **options)
    else:
        out = weighted(q, k, v, alpha, False, dropout_p, **options)
    return out.reshape(*lead, *out.shape[1 if query.dim() > 2 else 2 :])


def probability(name: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, Real):
        checks.fail(name, "be a number", type(p).__name__, error=TypeError)
    if not 0.0 <= float(p) <= 1.0:
        checks.fail(name, "be in [0, 1]", p)


def _four_dimensions(
    query: Any, key: Any, value: Any, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(B, H, N, D) views, and the leading dimensions that the output gets back."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.floating(name, x)
        if x.dim() < 2 or x.dim() != query.dim():
            checks.fail(
                name, "have the dimensions (..., H, N, D), as many as query", tuple(x.shape)
            )
    if query.dim() == 2:
        return query[None, None], key[None, None], value[None, None], ()
    H, H_kv, H_v = query.shape[-3], key.shape[-3], value.shape[-3]
    if query.dim() == 3:  # the heads of one batch element
        lead: tuple[int, ...] = ()
    else:
        try:
            lead = tuple(torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value))))
        except RuntimeError:
            got = f"{tuple(key.shape[:-3])} and {tuple(value.shape[:-3])}"
            wanted = tuple(query.shape[:-3])
            checks.fail("key", f"broadcast with query's batch {wanted}, and value too", got)
    # One by one: inside torch.jit.trace sizes are tensors, and a set tells them apart.
    if not enable_gqa and any(size not in (1, H) for size in (H_kv, H_v)):
        checks.fail(
            "key",
            f"have query's number of heads ({H}), and value too",
            f"{H_kv} and {H_v}",
            "enable_gqa=True lets several query heads share a key head",
        )
    if not enable_gqa and H_kv != H_v:  # one of them is 1
        key, value = (x.expand(*x.shape[:-3], H, *x.shape[-2:]) for x in (key, value))
    q, k, v = (
        x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:])
        for x in (query, key, value)
    )
    return q, k, v, lead


def _four_dimensional_mask(mask: Tensor, q: Tensor, k: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(B or 1, H or 1, N_q or 1, N_k or 1) of a mask that broadcasts to (*lead, H, N_q, N_k)."""
    rank = max(len(lead) + 3, 4)
    if mask.dim() > rank:
        wanted = (*lead, q.shape[1], q.shape[2], k.shape[2])
        checks.fail("attn_mask", f"broadcast to {wanted}", tuple(mask.shape))
    mask = mask.reshape((1,) * (rank - mask.dim()) + tuple(mask.shape))
    own = mask.shape[:-3]
    if any(size != 1 for size in own) and len(own) > 1:
        mask = mask.expand(*lead, *mask.shape[-3:])
    mask = mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])
    B, H, N_q, _ = q.shape
    return _checks.pairs("attn_mask", mask, B, H, N_q, k.shape[2])


def causal_from_the_start(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    dropout_p: float = 0.0,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    n_free: int = 0,
    **options: Any,
) -> Tensor:
    """Query i sees the first ``n_free`` keys and, of the others, those from 0 to i."""
    N = min(q.shape[2], k.shape[2] - n_free)
    seen = n_free + N

    def part(x: Tensor | None, rows: slice, keys: slice) -> Tensor | None:
        if x is None:
            return None
        x = x[..., rows, :] if x.dim() > 1 and x.shape[-2] != 1 else x
        return x[..., keys] if x.shape[-1] != 1 else x

    rows, keys = slice(0, N), slice(0, seen)
    square = weighted(
        q[:, :, rows],
        k[:, :, keys],
        v[:, :, keys],
        alpha,
        True,
        dropout_p,
        mask=part(mask, rows, keys),
        bias=part(bias, rows, keys),
        **options,
    )
    if N == q.shape[2]:
        return square
    rows, keys = slice(N, None), slice(None)
    rest = weighted(
        q[:, :, rows],
        k,
        v,
        alpha,
        False,
        dropout_p,
        mask=part(mask, rows, keys),
        bias=part(bias, rows, keys),
        **options,
    )
    return torch.cat([square, rest], 2)


def weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    is_causal: bool,
    dropout_p: float,
    **options: Any,
) -> Tensor:
    """:func:`adasplash`, or the same with dropped weights in tiles of rows."""
    is_empty = 0 in (*q.shape[:3], k.shape[2], v.shape[3])
    if dropout_p == 0 or is_empty:
        return adasplash(q, k, v, alpha, is_causal, **options)
    backend = options.pop("backend", "auto")
    _checks.backend(backend)
    if backend != "auto":
        checks.fail(
            "dropout_p",
            f"be 0 for backend={backend!r}",
            dropout_p,
            "dropped weights run in tiles of plain PyTorch, backend='auto'",
            NotImplementedError,
        )
    call = attention_call(q, k, v, alpha, is_causal=is_causal, **options)
    return _recomputed.attention(call, rows_of_heads(alpha), dropout_p)

"""The public functions: formula, checks, op."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from shared_kernels import checks, distributed, ops
from shared_kernels.calls import recast, replaced

from . import _checks, _length_scale, _ops, _recomputed, _reference
from ._call import ENOUGH_STEPS, SQUARE, Attention, Lazy, Statistics
from ._recomputed import ScoreMod
from ._sharded_call import sharded_call, with_whole_lengths
from .paged import PagedCache, paged_call


def triton_entmax(
    x: Tensor,
    alpha: float | Tensor = 1.5,
    n_iter: int = 10,
    fast_math: bool = True,
    fast_math_v2: bool | None = None,
    *,
    dim: int = -1,
    backend: str = "auto",
    use_histogram: bool | None = None,
) -> Tensor:
    r"""alpha-entmax along ``dim``: like softmax, with exact zeros.

    y_i = [(alpha-1) x_i - tau]_+ ** (1/(alpha-1)), with tau such that the y_i sum to 1.

    Args:
        x: scores, any shape, any floating dtype. -inf excludes an entry; a row of nothing but
            -inf gives zeros.
        alpha: in [1, 2]; 1 is softmax, 2 is sparsemax. A number, or a tensor that broadcasts over
            the rows (size 1 in ``dim``), which then receives its gradient.
        dim: the dimension that sums to 1.

    Performance:
        n_iter: cap on the solver's steps if below 10; from 10 on it runs until it has converged.
        fast_math: allow cheaper powers on a GPU; the result stays within the same tolerance.
        use_histogram, fast_math_v2: with either, the call is that of :func:`triton_entmax_v2`,
            which has a fifth argument: x, alpha, n_iter, use_histogram, fast_math.
        backend: "auto", "reference", "native", "torch" or "triton". A named backend never falls
            back.

    Returns:
        weights with the shape and dtype of ``x``. The bits of a row do not depend on other rows,
        but may on its length, as the order of a sum does: a row that is padded with -inf, too.

    Raises:
        ValueError: alpha outside [1, 2], or of a shape that does not broadcast.
        NotImplementedError: the backend asked for cannot run, and why.

    Example:
        >>> triton_entmax(torch.tensor([2.0, 1.0, -1.0]), alpha=2.0)
        tensor([1., 0., 0.])

    Source: Peters, Niculae and Martins, Sparse Sequence-to-Sequence Models, 2019, eq. 10.
    """
    if fast_math_v2 is not None:
        use_histogram, fast_math = fast_math, fast_math_v2
    if use_histogram is not None:
        n_iter = _converged(n_iter, use_histogram)
    call = _rows_call(x, alpha, n_iter, fast_math, dim=dim, backend=backend)
    if backend == "reference":
        return _reference.entmax(x, alpha, dim)
    return _ops.entmax(*call, backend).movedim(-1, dim)


def _rows_call(
    x: Tensor,
    alpha: float | Tensor = 1.5,
    n_iter: int = 10,
    fast_math: bool = True,
    *,
    dim: int = -1,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """Check the arguments of :func:`triton_entmax` and turn them into those of its op."""
    _checks.rows(x, alpha, dim)
    _checks.steps("n_iter", n_iter)
    _checks.backend(backend)
    dim = int(dim)
    if isinstance(alpha, Tensor):
        tensor = alpha
    else:
        tensor = torch.full((), alpha, dtype=torch.float64, device="cpu")
    if tensor.dim() > 0:
        shape = (1,) * (x.dim() - tensor.dim()) + tuple(tensor.shape)
        tensor = tensor.reshape(shape).movedim(dim, -1)
    return x.movedim(dim, -1), tensor, int(n_iter) if n_iter < 10 else ENOUGH_STEPS, fast_math


def triton_sparsemax(
    x: Tensor,
    *,
    n_iter: int = 10,
    use_histogram: bool = True,
    fast_math: bool = True,
    dim: int = -1,
    backend: str = "auto",
) -> Tensor:
    """Sparsemax, the projection onto the simplex: :func:`triton_entmax` with alpha = 2.

    ``n_iter``, ``use_histogram`` and ``fast_math`` of the published adasplash are taken and not
    used: it runs until it has converged.

    Example:
        >>> triton_sparsemax(torch.tensor([0.5, 0.0, -3.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    steps = _converged(n_iter, use_histogram)
    return triton_entmax(x, 2.0, steps, fast_math, dim=dim, backend=backend)


def triton_entmax15(
    x: Tensor,
    *,
    n_iter: int = 10,
    use_histogram: bool = True,
    fast_math: bool = True,
    dim: int = -1,
    backend: str = "auto",
) -> Tensor:
    """1.5-entmax: :func:`triton_entmax` with alpha = 1.5.

    ``n_iter``, ``use_histogram`` and ``fast_math`` as for :func:`triton_sparsemax`.

    Example:
        >>> triton_entmax15(torch.tensor([0.0, 0.0]))
        tensor([0.5000, 0.5000])
    """
    steps = _converged(n_iter, use_histogram)
    return triton_entmax(x, 1.5, steps, fast_math, dim=dim, backend=backend)


def _converged(n_iter: int, use_histogram: bool) -> int:
    """The steps of a call that comes with a histogram: checked, and as many as it takes."""
    _checks.steps("n_iter", n_iter)
    _checks.flag("use_histogram", use_histogram)
    return 10


def triton_entmax_v1(
    x: Tensor, alpha: float | Tensor = 1.5, n_iter: int = 10, fast_math: bool = True
) -> Tensor:
    """:func:`triton_entmax`, by the name that adasplash 0.2 gives to its first version.

    Example:
        >>> triton_entmax_v1(torch.tensor([2.0, 1.0, -1.0]), alpha=2.0)
        tensor([1., 0., 0.])
    """
    return triton_entmax(x, alpha, n_iter, fast_math)


def triton_entmax_v2(
    x: Tensor,
    alpha: float | Tensor = 1.5,
    n_iter: int = 2,
    use_histogram: bool = True,
    fast_math: bool = False,
) -> Tensor:
    """:func:`triton_entmax`, by the name and call of adasplash 0.2's second version.

    ``n_iter`` and ``use_histogram`` are taken and not used: it runs until it has converged.

    Example:
        >>> triton_entmax_v2(torch.tensor([2.0, 1.0, -1.0]), alpha=2.0)
        tensor([1., 0., 0.])
    """
    return triton_entmax(x, alpha, _converged(n_iter, use_histogram), fast_math)


def adasplash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int | None = 10,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    length_scale: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    group: Any = None,
    layout: str = "contiguous",
    backend: str = "auto",
) -> Tensor:
    r"""Attention with alpha-entmax weights, in memory linear in the number of tokens.

    o = entmax_alpha(cap(scale q k^T) + bias - slope |distance|) v, over the keys that a query may
    see; cap(x) = softcap tanh(x / softcap) where a softcap is given.

    Args:
        q: (B, H, N_q, D) queries, D <= 256.
        k: (B, H_kv, N_k, D) keys; H is a multiple of H_kv, query head h reads key head
            h // (H / H_kv).
        v: (B, H_kv, N_k, D_v) values.
        alpha: in [1, 2]; 1 is softmax attention, 2 the sparsest. A number, a scalar tensor or one
            per head (H,); a tensor receives its gradient.
        is_causal: hide the future. **The default is False.** With N_q != N_k the sequences end
            together (the last query sees every key), as decoding with a cache needs it;
            ``F.scaled_dot_product_attention`` aligns their beginnings instead.
        varlen: (B,) integer lengths of right-padded sequences; needs N_q = N_k. Rows of padding
            give 0, and whatever the padding holds does not matter. Length 0 is legal.
        scale: factor of q k^T; 1/sqrt(D) by default.
        mask: boolean, broadcasts to (B, H, N_q, N_k), True where attention is allowed.
        bias: floating point, broadcasts to (B, H, N_q, N_k), added to the scores; receives its
            gradient, in its own shape. -inf hides a key, a finite number does not: a row
            of nothing but torch.finfo(dtype).min weighs all that it sees alike.
        alibi_slopes: (H,), subtracts slope * |position of the query - position of the key|.
        window: sees only keys less than this many positions away (behind, if causal).
        cu_seqlens: (sequences + 1,) offsets of sequences packed along N, with B = 1.
        s_aux: (H,) attention sinks: each head has one more score, which takes part in the
            normalisation (for entmax in the threshold) and has no value; receives its gradient.
        softcap: a number above 0 that products of queries and keys cannot exceed.
        length_scale: (3,) or (H, 3), delta, beta and gamma: products of queries and keys are
            multiplied by delta + beta (log n)^gamma, where n counts the tokens up to the query's
            own (those of its sequence, if not causal); the factor is delta for n = 1. Receives its
            gradient. Longer sequences then need not become flatter.
        score_mod: a callable (score, batch, head, query, key) -> score, as in
            ``torch.nn.attention.flex_attention``, for a tile of scores and indices that broadcast
            to it; before bias, slopes and masks. **Tiles of plain PyTorch only**, on any device,
            recomputed in the backward pass: no kernel runs it, and other backends refuse it.
            Whatever it uses receives its gradient.
        group: ranks that hold a part of the sequence each: a ProcessGroup or one dimension of a
            DeviceMesh. q, k and v are this rank's tokens, varlen and cu_seqlens those of the whole
            sequence, and the result is that of one process. Keys and values stay; queries travel
            to the ranks that may hold a weight for them. Every rank makes the same calls, backward
            passes too. Gradients of alpha, alibi_slopes and s_aux are this rank's part: their sum
            over the ranks is that of one process. No mask, bias or score_mod; niter does not count.
        layout: which tokens a rank holds: "contiguous" ones, as many as it likes, or those that
            :func:`sequence_places` names for "zigzag", which share out causal work evenly.

    Performance:
        niter: cap on the solver's steps if below 10; from 10 on, or None, it runs until it has
            converged.
        backend: "auto", "reference", "torch", "native" or "triton". A named backend never falls
            back.

    Returns:
        (B, H, N_q, D_v) in the dtype of q. A query that sees no key gives 0. In the native library
        and in the kernels the bits of a row depend neither on later tokens nor on other sequences,
        padding or lengths. In tiles of plain PyTorch they may depend on the length of the sequence;
        and from 256 keys on, a tile of queries takes the path that suits its rows, so that one row
        can change the last bits of another.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape or range, by name.
        NotImplementedError: the backend asked for cannot run, and why.

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 100, 64)
        >>> adasplash(q, k, v, alpha=1.5, is_causal=True).shape
        torch.Size([1, 8, 100, 64])

    Source: Goncalves, Treviso and Martins, AdaSplash, 2025 (arXiv 2502.12082); ``length_scale``:
    Vasylenko, Treviso and Martins, Long-Context Generalization with Sparse Attention, 2025.
    """
    return _attended(
        SQUARE,
        q,
        k,
        v,
        alpha,
        is_causal,
        varlen,
        niter,
        scale=scale,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        window=window,
        cu_seqlens=cu_seqlens,
        s_aux=s_aux,
        softcap=softcap,
        length_scale=length_scale,
        score_mod=score_mod,
        group=group,
        layout=layout,
        backend=backend,
    )


def _attended(
    square: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int | None = 10,
    *,
    length_scale: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    group: Any = None,
    layout: str = "contiguous",
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """:func:`adasplash`, whose kernels keep or skip squares of this side (0: they skip none)."""
    options = {**options, "is_causal": is_causal, "varlen": varlen, "niter": niter}
    if group is not None:
        ranks = distributed.required(group)
        call = _call_of_a_rank(q, k, v, alpha, score_mod, ranks, options)
        return _ops.sharded_attention(sharded_call(call, length_scale, ranks, layout), backend)
    call = attention_call(q, k, v, alpha, length_scale=length_scale, square=square, **options)
    if score_mod is not None:
        return _with_score_mod(call, alpha, score_mod, backend)
    return _ops.attention(call, backend)


def _call_of_a_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    score_mod: ScoreMod | None,
    ranks: distributed.Ranks,
    options: dict[str, Any],
) -> Attention:
    """This rank's call with the lengths of whole sequences; what one rank refuses, all refuse."""
    with distributed.agreement(ranks):
        if score_mod is not None:
            checks.fail(
                "score_mod", "be None with `group`", "a callable", error=NotImplementedError
            )
        # lengths of whole sequences are compared with what all ranks hold, later
        whole = {name: options.pop(name, None) for name in ("varlen", "cu_seqlens")}
        return with_whole_lengths(attention_call(q, k, v, alpha, **options), **whole)


def _with_score_mod(
    call: Attention, alpha: float | Tensor, score_mod: ScoreMod, backend: str
) -> Tensor:
    _checks.backend(backend)
    if not callable(score_mod):
        checks.fail("score_mod", "be callable", type(score_mod).__name__, error=TypeError)
    if backend not in ("auto", "torch", "cpu"):
        checks.fail(
            "score_mod",
            f"be None for backend={backend!r}",
            "a callable",
            "it runs in tiles of plain PyTorch: backend='auto' or 'torch'",
            NotImplementedError,
        )
    if call.is_empty:  # no score to change
        return _ops.attention(call, "torch")
    return _recomputed.attention(call, rows_of_heads(alpha), score_mod=score_mod)


def rows_of_heads(alpha: float | Tensor) -> Callable[[Tensor], Tensor]:
    """(B, H, n, N_k) scores -> their weights, with an alpha for each head or for all."""
    if isinstance(alpha, Tensor) and alpha.numel() > 1:
        alpha = alpha.reshape(-1, 1, 1)
    return lambda scores: triton_entmax(scores, alpha)


P = ParamSpec("P")


def _takes_the_arguments_of(
    function: Callable[P, Tensor],
) -> Callable[[Callable[..., Tensor]], Callable[P, Tensor]]:
    """Give a function of any arguments the signature of another one, also for editors."""

    def with_signature(same: Callable[..., Tensor]) -> Callable[P, Tensor]:
        same.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return same

    return with_signature


@_takes_the_arguments_of(adasplash)
def adasplash_no_block_mask(*args: Any, **options: Any) -> Tensor:
    """:func:`adasplash` without the list of tiles worth visiting: less memory, no skipping.

    The same function of the same arguments; only a GPU kernel behaves differently.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 10, 16)
        >>> torch.allclose(adasplash_no_block_mask(q, k, v), adasplash(q, k, v))
        True
    """
    return _attended(0, *args, **options)


def adasplash_v1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int = 10,
) -> Tensor:
    """:func:`adasplash`, by the name that adasplash 0.2 gives to its first version.

    Example:
        >>> adasplash_v1(*torch.randn(3, 1, 2, 10, 16)).shape
        torch.Size([1, 2, 10, 16])
    """
    return adasplash(q, k, v, alpha, is_causal, varlen, niter)


def adasplash_v2(
    q: Tensor, k: Tensor, v: Tensor, niter: int = 1, varlen: Tensor | None = None
) -> Tensor:
    """Causal :func:`adasplash` with alpha = 1.5, by the name of adasplash 0.2; also `adasplash2`.

    ``niter`` is taken and not used: it runs until it has converged.

    Example:
        >>> adasplash_v2(*torch.randn(3, 1, 2, 10, 16)).shape
        torch.Size([1, 2, 10, 16])
    """
    _checks.steps("niter", niter)
    return adasplash(q, k, v, 1.5, True, varlen)


adasplash2 = adasplash_v2


def attention_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    *,
    niter: int | None = 10,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    length_scale: Tensor | None = None,
    **fields: Any,
) -> Attention:
    """The checked call with what a user of :func:`adasplash` gives; ``fields`` go in unchanged."""
    q, k, v = _lowered(q, k, v)
    _checks.alpha(alpha)
    if not isinstance(alpha, Tensor) and torch.compiler.is_compiling():
        # A number is a 0-d tensor on the CPU, so that another one compiles nothing again.
        alpha = torch.full((), alpha, dtype=torch.float64, device="cpu")
    call = Attention(
        q,
        k,
        v,
        alpha=alpha if isinstance(alpha, Tensor) else None,
        alpha_value=0.0 if isinstance(alpha, Tensor) else float(alpha),
        slopes=alibi_slopes,
        scale=_checks.scale(scale, q),
        n_iter=10 if niter is None else niter,
        **fields,
    ).check()
    return _length_scale.scaled(call, length_scale)


def _lowered(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype of autocast, where it is on."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
    return ops.autocast_lower(q, k, v)  # type: ignore[return-value]


def entmax_decode(
    q: Tensor,
    k_cache: Tensor | PagedCache,
    v_cache: Tensor | None = None,
    lengths: Tensor | None = None,
    alpha: float | Tensor = 1.5,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    length_scale: Tensor | None = None,
    niter: int = 10,
    backend: str = "auto",
    sequences: Sequence[int] | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    r"""The newest queries against a cache of keys: the last rows of causal :func:`adasplash`.

    Over a :class:`PagedCache` it reads only the pages that can matter, and proves that every other
    key weighs 0: pages are visited in falling order of an upper bound of their scores, and the
    threshold of the keys read so far is a lower bound of the threshold of all, so that reading
    stops where the next bound is at most that. Rounding is accounted for (bounds are rounded
    outwards, the threshold downwards). The result is that of reading everything, up to the order in
    which sums are taken. Where bounds do not separate, as for independent random keys, or alpha
    near 1, all is read, which costs a few percent more than without bounds.

    Args:
        q: (B, H, n, D), the last n queries of each sequence; often n = 1.
        k_cache: (B, H_kv, N_max, D) keys, already holding those of the n newest tokens; or a
            :class:`PagedCache`, which holds the values, too.
        v_cache: (B, H_kv, N_max, D_v) values, likewise.
        lengths: (B,) integers, how much of the cache counts; what lies beyond does not matter.
        alpha, scale, alibi_slopes, window, s_aux, softcap, length_scale: as for
            :func:`adasplash`.
        sequences: which sequences of a PagedCache the B are; by default all, oldest first.
        block_table: (B, M) integers, the pages of each, in place of `sequences`; with `lengths`.

    Performance:
        niter, backend: as for :func:`adasplash`.

    Returns:
        (B, H, n, D_v). A query that sees no key gives 0. Over a PagedCache it has no gradient.

    Raises:
        ValueError: a page or a sequence that was freed, or a page out of range, before anything is
            read; and as for :func:`adasplash`.

    Example:
        >>> k, v = torch.randn(2, 1, 2, 64, 16)
        >>> entmax_decode(torch.randn(1, 8, 1, 16), k, v, torch.tensor([40])).shape
        torch.Size([1, 8, 1, 16])
    """
    options: dict[str, Any] = {
        "scale": scale,
        "alibi_slopes": alibi_slopes,
        "window": window,
        "s_aux": s_aux,
        "softcap": softcap,
        "niter": niter,
    }
    if isinstance(k_cache, PagedCache):
        if v_cache is not None:
            checks.fail("v_cache", "be None with a PagedCache, which holds values", "a tensor")
        options = {**options, "length_scale": length_scale, "sequences": sequences}
        paged = paged_call(q, k_cache, lengths, alpha, block_table=block_table, **options)
        return _ops.paged_decode(paged, backend)[0]
    if v_cache is None or lengths is None:
        name = "v_cache" if v_cache is None else "lengths"
        checks.fail(name, "be a tensor where `k_cache` is one", None, error=TypeError)
    for name, given in (("sequences", sequences), ("block_table", block_table)):
        if given is not None:
            checks.fail(name, "come with a PagedCache", "a tensor as `k_cache`")
    shape = checks.attention_shapes(q, k_cache, v_cache, least=0)
    _checks.lengths(lengths, shape.B, shape.N_k, shape.N_k, name="lengths")
    both = torch.stack([torch.full_like(lengths, shape.N_q), lengths], 1)
    call = attention_call(q, k_cache, v_cache, alpha, is_causal=True, **options)
    call = _length_scale.scaled(replaced(call, varlen=both), length_scale)
    return _ops.attention(replaced(call, square=0), backend)


class AttentionStats(NamedTuple):
    """What :func:`attention_stats` measured.

    Attributes:
        support: (B, H, N_q) int64, how many keys have a weight above 0.
        tau: (B, H, N_q), the threshold in units of (alpha - 1) * score; NaN where no key is seen.
        tile_density: (B, H), the share of visible tiles that hold a weight above 0: those that
            the backward pass of the kernels visits.
        tile: the side of a tile.
        tile_visited: (B, H), the share of visible tiles that the forward pass visits after it has
            seen every score once: the kernels skip the rest; on CPU it is 1.
    """

    support: Tensor
    tau: Tensor
    tile_density: Tensor
    tile: int
    tile_visited: Tensor

    def __str__(self) -> str:
        if not self.support.numel():
            return "no query"
        mean, most = float(self.support.double().mean()), int(self.support.max())
        density = float(self.tile_density.mean())
        return (
            f"{mean:.1f} keys per query on average, {most} at most; "
            f"{density:.0%} of the {self.tile} x {self.tile} tiles hold a weight"
        )


def attention_stats(
    q: Tensor,
    k: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    length_scale: Tensor | None = None,
    tile: int = 64,
    backend: str = "auto",
) -> AttentionStats:
    """How sparse :func:`adasplash` is on these queries and keys, measured tile by tile.

    Where kernels run, the tiles are counted in their own lists: what they really skipped.

    Args:
        q, k, alpha, is_causal, varlen, scale, mask, bias, alibi_slopes, window, cu_seqlens, s_aux,
            softcap, length_scale: as for :func:`adasplash`. The sink is no key of the support.
        tile: side of the square tiles, at most 64; kernels have tiles of 64 only.

    Performance:
        backend: "auto", "reference", "torch" or "triton". A named backend never falls back.

    Returns:
        :class:`AttentionStats`; O(N) memory.

    Example:
        >>> q, k = torch.randn(2, 1, 2, 200, 32)
        >>> stats = attention_stats(q, k, alpha=2.0, is_causal=True)
        >>> stats.support.shape, stats.tile_density.shape
        (torch.Size([1, 2, 200]), torch.Size([1, 2]))
    """
    checks.positive_int("tile", tile)
    if tile > 64:
        checks.fail("tile", "be at most 64", tile)
    call = attention_call(
        q,
        k,
        k,
        alpha,
        is_causal=is_causal,
        varlen=varlen,
        scale=scale,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        window=window,
        cu_seqlens=cu_seqlens,
        s_aux=s_aux,
        softcap=softcap,
        length_scale=length_scale,
    )
    with torch.no_grad():  # numbers to look at
        found = _ops.attention_stats(recast(call, Statistics, square=int(tile)), backend)
    support, tau, used, visited, seen = found
    seen = seen.clamp(min=1)
    return AttentionStats(support, tau, used / seen, int(tile), visited / seen)


def lazy_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    window_size: int = 512,
    varlen: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Causal attention with an elastic softmax: a learned threshold cuts small weights to zero.

    W_ij = relu(softmax_j(scale q_i k_j + b[h, i-j] 1{i-j <= window_size}) + tau_h / i), j <= i,
    with i counted from 1; o = W v. Pairs that are hidden weigh 0 for every tau, also above 0.

    Args:
        q: (B, H, N, D) queries, rotary embedding already applied.
        k: (B, H_kv, N, D) keys, likewise; H is a multiple of H_kv.
        v: (B, H_kv, N, D_v) values.
        bias: (H, window_size + 1), added to the score of a key i-j behind; 0 beyond the window. A
            bias of -inf hides the pair as the mask does: it weighs 0 whatever tau is, that entry's
            gradient is 0, and a row that sees nothing gives zeros and zero gradients.
        tau: (H,) thresholds; -1 is the usual start (the first row is then exactly 0).
        window_size: the largest distance that has a bias.
        varlen: (B,) integer lengths of right-padded sequences; rows of padding give 0.
        scale: factor of q k^T; 1/sqrt(D) by default.
        mask: boolean, broadcasts to (B, H, N, N), True where attention is allowed.

    Performance:
        backend: "auto", "reference", "torch", "native" or "triton". A named backend never falls
            back.

    Returns:
        (B, H, N, D_v) in the dtype of q. Every tensor but varlen and mask receives its gradient.
        The bits of a row depend neither on later tokens nor on other sequences or padding. In tiles
        of plain PyTorch they may depend on the length of the sequence.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 50, 16)
        >>> bias, tau = torch.zeros(8, 513), torch.full((8,), -1.0)
        >>> lazy_attention_triton(q, k, v, bias, tau, window_size=512).shape
        torch.Size([2, 8, 50, 16])

    Source: Lazy Attention, 2026 (arXiv 2601.00919).
    """
    q, k, v = _lowered(q, k, v)
    call = Lazy(
        q, k, v, bias, tau, window_size, varlen, mask, scale=_checks.scale(scale, q)
    ).check()
    return _ops.lazy(call, backend)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which backend would run ``function(*args, **kwargs)``, which others could, and why not.

    Args:
        function: a function or a module of this package, or any that runs one; then the arguments
            of a call to it.

    Returns:
        a few lines of text for each op in the call, which is made; a backend that it asks for is
        not asked.

    Raises:
        ValueError: the call runs none of this package's ops.

    Example:
        >>> print(explain(triton_entmax, torch.randn(2, 3)).splitlines()[0])
        adasplash::entmax:
    """
    explanation = ops.explain_call("adasplash", function, *args, **kwargs)
    if not explanation:
        name = getattr(function, "__name__", type(function).__name__)
        checks.fail("function", "run an op of adasplash", name)
    return explanation

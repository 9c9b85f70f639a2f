"""Window + landmark attention and the choice of landmarks, as functions.

Token i attends the tokens of its window, i - w_i <= j <= i, and those landmarks that lie before
it: every function here costs O((w + K) N), not O(N^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks as shared_checks
from shared_kernels import ops

from . import _checks, _geometry, _landmarks, _normalized, _ops
from ._call import Attention, CausalLandmarks

__all__ = [
    "compute_hybrid_energy_scores",
    "dsalt_attention",
    "explain",
    "hybrid_energy",
    "select_landmarks",
]


def dsalt_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    window_sizes: Tensor,
    landmark_idx: Tensor,
    *,
    scale: float | None = None,
    landmark_bias: Tensor | None = None,
    landmark_block: int | None = None,
    window_ramp: float = 8.0,
    cu_seqlens: Tensor | None = None,
    normalizer: Callable[[Tensor, int], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention of every token over its window and the landmarks before the window.

    .. math:: o_i = \frac{\sum_j M_{ij}\, e^{s_{ij}} v_j}{\sum_j M_{ij}\, e^{s_{ij}}},
              \quad s_{ij} = scale \cdot q_i \cdot k_j

    With distance d = i - j >= 0 and window w of the row, M is 1 for d <= w (w + 1 keys with the
    token itself) and g for a landmark with d > w; every other key, and every key after i, has 0.
    g = exp(landmark_bias), or 1.

    Floating-point windows have a soft edge, m(d) = clamp((R + w - d) / R, 0, 1), and a landmark
    gets m + (1 - m) g: nothing jumps as w moves, and the gradient in w is exact (zero where no key
    lies strictly inside the ramp). Integer windows are hard and have no gradient.

    Args:
        Q: (B, H, N_q, D), D <= 256; the queries are the last N_q of the N_k tokens.
        K, V: (B, H_kv, N_k, D), H a multiple of H_kv (each group of heads shares keys).
        window_sizes: (B, H, N_q), in tokens, >= 0, integer (hard) or floating (soft).
        landmark_idx: (B, H, K) token indices, or (B, H, blocks, K): one list per block of
            ``landmark_block`` queries, as :func:`select_landmarks` returns it. A landmark in the
            row's window or after the row is not attended twice or early, duplicates count once,
            -1 (or any index out of range) is an empty slot. N_q < N_k needs the lists of the
            blocks that the queries fall in only.
        scale: factor of the scores, D**-0.5 by default.
        landmark_bias: landmark_idx's shape, log of a landmark's factor g; differentiable.
        landmark_block: C, positions per list of a 4-D landmark_idx.
        window_ramp: R > 0, width of the soft edge in tokens.
        cu_seqlens: (S + 1,) int32 bounds of S sequences packed in one batch row; tokens attend
            their own sequence only. landmark_idx counts in packed tokens.
        normalizer: (scores, dim) -> weights in the place of softmax over window and landmarks.
            M enters as log M added to a score. Any callable that maps -inf to 0.

    Performance:
        backend: ``"auto"``, ``"torch"`` (alias ``"cpu"``), ``"triton"`` or ``"reference"`` (dense).
            A backend that is asked for runs or raises.

    Bits:
        On ``"torch"`` and ``"triton"`` a row's bits do not depend on later tokens, on other batch
        elements, on padding behind the sequence or on how many rows are computed; on ``"torch"``
        neither on packing nor on the number of threads. Not so: ``backend="reference"``, any
        ``normalizer``, the place in a pack on ``"triton"`` (and there a value of V that is not
        finite reaches the other rows of its tile), and gradients.

    Returns:
        (B, H, N_q, D) in Q's dtype; under autocast in its dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.
        NotImplementedError: the backend asked for cannot run, with the reason.

    Example:
        >>> Q, K, V = torch.randn(3, 1, 2, 100, 16)
        >>> windows = torch.full((1, 2, 100), 12)
        >>> landmarks = torch.tensor([0, 7, -1]).expand(1, 2, 3)
        >>> dsalt_attention(Q, K, V, windows, landmarks).shape
        torch.Size([1, 2, 100, 16])

    Source: Sukhbaatar et al. 2019, "Adaptive Attention Span in Transformers", eq. 2 (the edge).
    """
    given = (Q, K, V, window_sizes, landmark_idx, landmark_bias, cu_seqlens)
    call = Attention(*given, scale, window_ramp, landmark_block).check()
    if normalizer is not None:
        _checks.normalizer(normalizer)
        if backend != "auto":
            shared_checks.fail("backend", "be 'auto' with a normalizer", repr(backend))
    return attend(call, normalizer, backend)


def attend(
    call: Attention,
    normalizer: Callable[[Tensor, int], Tensor] | None = None,
    backend: str = "auto",
    *,
    rows: tuple[Tensor, Tensor] | None = None,
    reach: float | None = None,
) -> Tensor:
    """The output of a call: functions, modules and caches all come through here.

    Args:
        call: a checked call.
        normalizer: takes the place of softmax, in plain PyTorch.
        backend: of the operator, where softmax runs as one.
        rows: first visible key and landmark list of each query, (B, N_q) each, where the rows of a
            batch differ; the operator has no such rows, so they run in plain PyTorch.
        reach: upper bound of the windows; without one a normaliser has to read their values.
    """
    if normalizer is None and rows is None:
        return _ops.attention(call, backend)
    if reach is None:
        reach = float(call.windows.detach().max()) if call.windows.numel() else 0.0
    rows = call.rows() if rows is None else rows
    return _normalized.attention(call, rows, normalizer or torch.softmax, reach)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which backend each operator of ``function(*args, **kwargs)`` would run on, and why.

    Args:
        function: a public function or module of this package; it is called once.
        args, kwargs: its arguments. A ``backend`` that they ask for is not asked.

    Returns:
        One paragraph per operator: its name, then a line per backend.

    Example:
        >>> q = torch.randn(1, 2, 10, 4)
        >>> windows, idx = torch.full((1, 2, 10), 3), torch.zeros(1, 2, 1, dtype=torch.int32)
        >>> print(explain(dsalt_attention, q, q, q, windows, idx).splitlines()[0])
        dsalt::attention:
    """
    return ops.explain_call("dsalt", function, *args, **kwargs)


def hybrid_energy(
    X: Tensor,
    WV: Tensor,
    alpha: Tensor,
    *,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""How informative each token is to each head: a mix of two z-scored norms.

    .. math:: s_{j,h} = a_h\, z(\|x_j W_{V,h}\|) + (1 - a_h)\, z(\|x_j\|)

    z(n) = (n - mean) / max(std, 0.01 mean, 1e-6) over the sequence (unbiased std), per sample and
    head; with ``causal=True`` over the tokens up to j only, so that a score never changes when text
    is appended (z = 0 at the first token). Norms that differ by less than 1 % of their mean, as
    those of RMS-normed states do, hardly count: their spread may be rounding alone.

    Args:
        X: (B, N, d) hidden states.
        WV: (H, d, D) value projections, one per head.
        alpha: (H,) or scalar tensor in [0, 1], the share of the value norm.
        causal: prefix statistics instead of those of the whole sequence.
        cu_seqlens: (S + 1,) int32 bounds of S sequences packed in one row (``causal`` only).

    Returns:
        (B, H, N) scores in X's dtype (float32 for half types), differentiable in all three.

    Raises:
        TypeError, ValueError: wrong dtype, shape or range.

    Example:
        >>> hybrid_energy(torch.randn(2, 10, 8), torch.randn(4, 8, 2), torch.full((4,), 0.6)).shape
        torch.Size([2, 4, 10])
    """
    _checks.energy(X, WV, alpha)
    dtype = torch.promote_types(X.dtype, torch.float32)
    projected = torch.einsum("bnd,hde->bhne", X, WV.to(X.dtype))
    value_norm = torch.linalg.vector_norm(projected, dim=-1, dtype=dtype)
    input_norm = torch.linalg.vector_norm(X, dim=-1, dtype=dtype)
    scores, _ = _landmarks.mixed_scores(
        value_norm, input_norm, alpha.to(dtype), causal, None, cu_seqlens, None
    )
    return scores


def select_landmarks(
    scores: Tensor,
    k: int,
    window_sizes: Tensor | None = None,
    *,
    landmark_block: int | None = None,
    n_sink: int = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""The k best-scored tokens of each head, as indices in rising order.

    Without ``landmark_block`` one list per head for the whole sequence. ``window_sizes`` keeps the
    last token's window out of it: tokens j >= N - w of the last token are not chosen. Such a list
    depends on every token, so it is not causal: use it in encoders or for scoring.

    With ``landmark_block=C`` one list per block of C queries,
    :math:`L_c = \mathrm{top\text{-}k}\{s_j : j < cC\}`: with causal scores a list never depends
    on what comes after it, and appending text never changes it.

    Args:
        scores: (B, H, N); -inf marks tokens that must not be chosen.
        k: length of a list; k > N is legal.
        window_sizes: (B, H, N), for the one-list form.
        landmark_block: C, number of consecutive queries that share a list.
        n_sink: the first n_sink tokens are chosen before all others.
        cu_seqlens: (S + 1,) int32 bounds of S packed sequences (block form only): lists stay in
            their sequence, and row i of sequence s (start b) uses list b//C + s + (i-b)//C.

    Returns:
        (B, H, k), or (B, H, ceil(N / C), k) with blocks (N // C + S lists when packed), int32.
        Slots that no token fills hold -1. Of equal scores the earlier token wins.

    Raises:
        TypeError, ValueError: wrong dtype, shape or range.

    Example:
        >>> scores = torch.tensor([[[0.0, 3.0, 1.0, 2.0]]])
        >>> select_landmarks(scores, 2, landmark_block=2).tolist()
        [[[[-1, -1], [0, 1]]]]
    """
    _checks.selection(scores, k, n_sink)
    scores = scores.detach()
    n = scores.shape[-1]
    token = torch.arange(n, device=scores.device)
    if n_sink:
        first = 0 if cu_seqlens is None else _geometry.sequence_starts(n, cu_seqlens)
        scores = scores.masked_fill(token - first < n_sink, float("inf"))
    if landmark_block is not None:
        call = CausalLandmarks(scores, k, landmark_block, cu_seqlens).check()
        if window_sizes is not None:
            shared_checks.fail(
                "window_sizes",
                "be None with landmark_block",
                "a tensor",
                "a row leaves out its own",
            )
        return _ops.causal_landmarks(call)
    if cu_seqlens is not None:
        shared_checks.fail("cu_seqlens", "come with landmark_block", "no landmark_block")
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if window_sizes is not None:
        _checks.windows(window_sizes, scores.shape)
        allowed = token < n - window_sizes.detach()[..., -1:]
    return _landmarks.select_global(scores, k, allowed)


def compute_hybrid_energy_scores(
    X: Tensor, WV: Tensor, window_sizes: Tensor, k: int, alpha: Tensor
) -> Tensor:
    """Score the tokens with :func:`hybrid_energy` and return the k best of each head.

    Args:
        X: (B, N, d) hidden states.
        WV: (H, d, D) value projections.
        window_sizes: (B, H, N); tokens j >= N - w of the last token are left out.
        k: number of landmarks; unfilled slots hold -1.
        alpha: (H,) or scalar tensor in [0, 1], the share of the value norm.

    Returns:
        (B, H, k) int32 indices in rising order. The choice looks at the whole sequence: for a
        causal model use ``select_landmarks(hybrid_energy(..., causal=True), k, landmark_block=C)``.

    Example:
        >>> X, WV, w = torch.randn(1, 20, 8), torch.randn(2, 8, 4), torch.full((1, 2, 20), 4)
        >>> compute_hybrid_energy_scores(X, WV, w, k=3, alpha=torch.full((2,), 0.6)).shape
        torch.Size([1, 2, 3])
    """
    return select_landmarks(hybrid_energy(X, WV, alpha), k, window_sizes)

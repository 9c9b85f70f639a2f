"""Score tokens and choose landmarks: the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import checks as shared_checks

from . import _checks, _geometry, _landmarks, _ops
from ._call import CausalLandmarks


def hybrid_energy(
    X: Tensor, WV: Tensor, alpha: Tensor, *, causal: bool = False, cu_seqlens: Tensor | None = None
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
    values = torch.einsum("bnd,hde->bhne", X, WV.to(X.dtype))
    return _landmarks.mixed_scores(X, values, alpha, causal, cu_seqlens=cu_seqlens)[0]


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

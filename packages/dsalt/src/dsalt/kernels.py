"""Window + landmark attention and the choice of landmarks, as functions.

Token i attends the tokens of its window, i - w_i <= j <= i, and those landmarks that lie before
it: every function here costs O((w + K) N), not O(N^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from shared_kernels import checks as shared_checks
from shared_kernels import ops

from . import _checks
from ._attend import attend
from ._call import Attention
from ._choice import compute_hybrid_energy_scores, hybrid_energy, select_landmarks
from .modules import HybridEnergyScorer, Landmarks

__all__ = [
    "HybridEnergyScorer",
    "Landmarks",
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
        backend: ``"auto"``, ``"native"`` (the compiled CPU library; fp16, bf16, fp32), ``"torch"``
            (alias ``"cpu"``), ``"triton"`` or ``"reference"`` (dense). A backend that is asked for
            runs or raises.

    Bits:
        On ``"native"``, ``"torch"`` and ``"triton"`` a row's bits do not depend on later tokens, on
        other batch elements, on padding behind the sequence or on how many rows are computed; on
        ``"native"`` and ``"torch"`` neither on packing nor on the number of threads. Not so:
        ``backend="reference"``, any ``normalizer``, the place in a pack on ``"triton"`` (and there
        a value of V that is not finite reaches the other rows of its tile), and gradients.
        ``"native"`` has bits of its own for each instruction set.

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

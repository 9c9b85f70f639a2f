"""Window + landmark attention and the choice of landmarks, as functions.

Token i attends the tokens of its window, i - w_i <= j <= i, and those landmarks that lie before
it: every function here costs O((w + K) N), not O(N^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared_kernels import checks as shared_checks
from shared_kernels import ops

from . import _checks, _energy, _normalized, _ops

__all__ = [
    "HybridEnergyScorer",
    "Landmarks",
    "compute_hybrid_energy_scores",
    "dsalt_attention",
    "explain",
    "hybrid_energy",
    "select_landmarks",
]


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as scaled_dot_product_attention does it."""
    return tuple(t for t in ops.autocast_lower(*tensors) if t is not None)


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
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"`` (dense). An explicit
            backend runs or raises.

    Bits:
        On ``"cpu"`` and ``"triton"`` a row's bits do not depend on later tokens, on other batch
        elements, on padding behind the sequence or on how many rows are computed; on ``"cpu"``
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
    _checks.attention(
        Q, K, V, window_sizes, landmark_idx, landmark_bias, landmark_block, window_ramp, cu_seqlens
    )
    shared_checks.in_set("backend", backend, ("auto", "cpu", "triton", "reference"))
    if scale is not None:
        _checks.scale(scale)
    if normalizer is not None:
        _checks.normalizer(normalizer)
    scale = Q.shape[-1] ** -0.5 if scale is None else float(scale)
    soft = window_sizes.is_floating_point()
    block = int(landmark_block or 0)
    landmarks = _energy.unique_landmarks(landmark_idx, K.shape[2])
    Q, K, V = lowered(Q, K, V)
    if backend == "reference":
        from . import _reference

        ramp = float(window_ramp) if soft else 0.0
        options = (landmarks, landmark_bias, cu_seqlens, scale, ramp, block)
        return _reference.attention(Q, K, V, window_sizes, *options)[0]
    wide = torch.promote_types(Q.dtype, torch.float32)
    # a hard window is a soft one with ramp 1 at an integer
    ramp = float(window_ramp) if soft else 1.0
    windows = window_sizes.to(wide)
    bias = None if landmark_bias is None else landmark_bias.to(wide)
    if normalizer is not None:
        if backend != "auto":
            shared_checks.fail("backend", "be 'auto' with a normalizer", repr(backend))
        reach = float(windows.detach().max()) if windows.numel() else 0.0
        rows = _energy.row_lists(Q.shape[2], K.shape[2], block, cu_seqlens, Q.device)
        given = (Q, K, V, windows, landmarks, bias, rows, scale, ramp)
        return _normalized.attention(*given, normalizer, reach)
    out, _ = _ops.attention(
        Q, K, V, windows, landmarks, bias, cu_seqlens, scale, ramp, block, backend
    )
    return out


def explain(Q: Tensor, K: Tensor, V: Tensor, window_sizes: Tensor, landmark_idx: Tensor) -> str:
    """Which backend :func:`dsalt_attention` would run on these tensors, and why not the others.

    Example:
        >>> q = torch.randn(1, 2, 10, 4)
        >>> windows, idx = torch.full((1, 2, 10), 3), torch.zeros(1, 2, 1, dtype=torch.int32)
        >>> print(explain(q, q, q, windows, idx).splitlines()[0])
        dsalt::attention:
    """
    block = 1 if landmark_idx.dim() == 4 else 0
    given = (Q, K, V, window_sizes, landmark_idx, None, None, 1.0, 1.0, block)
    return ops.explain("dsalt::attention", *given)


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
    scores, _ = _mix(value_norm, input_norm, alpha.to(dtype), causal, None, cu_seqlens, None)
    return scores


def _mix(
    value_norm: Tensor,
    input_norm: Tensor,
    alpha: Tensor,
    causal: bool,
    state: tuple | None,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, tuple | None]:
    """a z(value_norm) + (1 - a) z(input_norm) from (B, H, N) and (B, N), and the prefix sums."""
    if causal:
        before = (None, None) if state is None else state
        each = None if valid is None else valid[:, None]
        z_value, value_state = _energy.z_prefix(value_norm, before[0], cu_seqlens, each)
        z_input, input_state = _energy.z_prefix(input_norm, before[1], cu_seqlens, valid)
        state = (value_state, input_state)
    else:
        if cu_seqlens is not None:
            shared_checks.fail(
                "cu_seqlens", "be None", "a packed batch", "only causal scores know sequences"
            )
        z_value, z_input, state = _energy.z_global(value_norm), _energy.z_global(input_norm), None
    a = alpha.reshape(-1, 1)
    return a * z_value + (1 - a) * z_input[:, None], state


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
        first = 0 if cu_seqlens is None else _energy.sequence_starts(n, cu_seqlens)
        scores = scores.masked_fill(token - first < n_sink, float("inf"))
    if landmark_block is not None:
        shared_checks.positive_int("landmark_block", landmark_block)
        if window_sizes is not None:
            shared_checks.fail(
                "window_sizes",
                "be None with landmark_block",
                "a tensor",
                "a row leaves out its own",
            )
        if cu_seqlens is not None:
            _checks.packed(cu_seqlens, scores.shape[0], n, n)
        return _ops.causal_landmarks(scores, int(k), int(landmark_block), cu_seqlens)
    if cu_seqlens is not None:
        shared_checks.fail("cu_seqlens", "come with landmark_block", "no landmark_block")
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if window_sizes is not None:
        _checks.windows(window_sizes, scores.shape)
        allowed = token < n - window_sizes.detach()[..., -1:]
    return _energy.select_global(scores, k, allowed)


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


class Landmarks(NamedTuple):
    """What :class:`HybridEnergyScorer` returns."""

    idx: Tensor
    bias: Tensor
    scores: Tensor
    state: tuple | None


class HybridEnergyScorer(nn.Module):
    r"""Choose each head's landmarks by their hybrid energy and gate them by their score.

    The choice has no gradient. It compares scores rounded to 1/1024: tokens that only rounding
    tells apart (repeated ones) tie, and of those the earlier wins. The gate
    :math:`\log\sigma(s_j / T)`, added to a landmark's attention score, gives ``alpha`` (and the
    norms) one.

    Args:
        n_heads: number of query heads.
        k: landmarks per head.
        alpha: initial share of the value norm, in (0, 1); stored as a logit, one per head.
        landmark_block: C, queries per list in the causal mode.
        landmark_mode: ``"block_causal"``, or ``"global"`` (one list per sequence, not causal).
        n_sink: first tokens that are always landmarks.
        temperature: T of the gate.

    Example:
        >>> scorer = HybridEnergyScorer(n_heads=2, k=4, landmark_block=8)
        >>> found = scorer(torch.randn(1, 20, 16), torch.randn(1, 2, 20, 8))
        >>> found.idx.shape, found.bias.shape
        (torch.Size([1, 2, 3, 4]), torch.Size([1, 2, 3, 4]))
    """

    def __init__(
        self,
        n_heads: int,
        k: int,
        alpha: float = 0.6,
        *,
        landmark_block: int = 32,
        landmark_mode: str = "block_causal",
        n_sink: int = 0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 < alpha < 1.0:
            shared_checks.fail("alpha", "be in (0, 1)", alpha)
        shared_checks.in_set("landmark_mode", landmark_mode, ("block_causal", "global"))
        shared_checks.positive_int("landmark_block", landmark_block)
        if temperature <= 0:
            shared_checks.fail("temperature", "be > 0", temperature)
        _checks.count("k", k)
        _checks.count("n_sink", n_sink)
        shared_checks.positive_int("n_heads", n_heads)
        self.k, self.n_sink, self.temperature = int(k), int(n_sink), float(temperature)
        self.landmark_block, self.landmark_mode = int(landmark_block), landmark_mode
        # without landmarks alpha has no effect: data-parallel training must not wait for it
        self._initial_logit = math.log(alpha / (1 - alpha))
        self.alpha_logit = nn.Parameter(torch.empty(int(n_heads)), requires_grad=self.k > 0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every head the ``alpha`` of the construction again."""
        nn.init.constant_(self.alpha_logit, self._initial_logit)

    @property
    def alpha(self) -> Tensor:
        """(H,) share of the value norm, in (0, 1)."""
        return self.alpha_logit.sigmoid()

    @property
    def causal(self) -> bool:
        return self.landmark_mode == "block_causal"

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        window_sizes: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Landmarks:
        """Landmarks of whole sequences.

        Args:
            x: (B, N, d) hidden states.
            values: (B, H_kv, N, D) their values x W_V, before any position enters.
            window_sizes: (B, H, N), used by the global mode only.
            lengths: (B,) number of tokens of each row, those behind are padding, or tokens that
                the global mode must not choose.
            cu_seqlens: (S + 1,) int32 bounds of packed sequences.
        """
        scores, state = self.score(x, values, None, lengths, cu_seqlens)
        compared = self.compared(scores)
        if self.causal:
            idx = select_landmarks(
                compared,
                self.k,
                landmark_block=self.landmark_block,
                n_sink=self.n_sink,
                cu_seqlens=cu_seqlens,
            )
        else:
            if lengths is not None:
                token = torch.arange(x.shape[1], device=x.device)
                end = lengths[:, None, None]
                if window_sizes is not None:
                    last = (end - 1).clamp(min=0).expand(-1, scores.shape[1], 1)
                    end = end - window_sizes.detach().gather(-1, last)
                    window_sizes = None
                compared = compared.masked_fill(token >= end, float("-inf"))
            idx = select_landmarks(compared, self.k, window_sizes, n_sink=self.n_sink)
        return Landmarks(idx, self.gate(scores, idx), scores, state)

    def score(
        self,
        x: Tensor,
        values: Tensor,
        state: tuple | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, tuple | None]:
        """(B, H, N) scores of tokens that continue ``state``, and the state after them.

        ``valid`` (B, N) says which places hold tokens, instead of ``lengths``; causal mode only.
        """
        alpha = self.alpha
        dtype = torch.promote_types(x.dtype, torch.float32)
        H, H_kv = alpha.shape[0], values.shape[1]
        value_norm = torch.linalg.vector_norm(values, dim=-1, dtype=dtype)
        value_norm = value_norm.repeat_interleave(H // H_kv, 1)
        input_norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
        if lengths is not None and self.causal:
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        elif lengths is not None:
            z_value = _energy.z_masked(value_norm, lengths[:, None])
            z_input = _energy.z_masked(input_norm, lengths)
            a = alpha.to(dtype)[:, None]
            return a * z_value + (1 - a) * z_input[:, None], None
        given = (alpha.to(dtype), self.causal, state, cu_seqlens, valid)
        return _mix(value_norm, input_norm, *given)

    @staticmethod
    def compared(scores: Tensor) -> Tensor:
        """The scores as the choice compares them: rounded to 1/1024, without a gradient."""
        return (scores.detach() * 1024).round() / 1024

    def gate(self, scores: Tensor, idx: Tensor) -> Tensor:
        """log sigmoid(s_j / T) at the chosen tokens, in idx's shape (empty slots: some number)."""
        slots = idx.clamp(min=0).to(torch.int64).flatten(2)
        if scores.shape[-1] == 0 or slots.shape[-1] == 0:
            return scores.new_zeros(idx.shape)
        return F.logsigmoid(scores.gather(-1, slots) / self.temperature).reshape(idx.shape)

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, landmark_mode={self.landmark_mode!r}, "
            f"landmark_block={self.landmark_block}, n_sink={self.n_sink}"
        )

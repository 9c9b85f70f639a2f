"""Score tokens and choose landmarks: the functions, and the module that gates its choice."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared_kernels import checks as shared_checks

from . import _checks, _geometry, _landmarks, _ops
from ._call import CausalLandmarks


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
            z_value = _landmarks.z_masked(value_norm, lengths[:, None])
            z_input = _landmarks.z_masked(input_norm, lengths)
            a = alpha.to(dtype)[:, None]
            return a * z_value + (1 - a) * z_input[:, None], None
        given = (alpha.to(dtype), self.causal, state, cu_seqlens, valid)
        return _landmarks.mixed_scores(value_norm, input_norm, *given)

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

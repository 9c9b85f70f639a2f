"""The module that chooses each head's landmarks and gates them by their score."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared_kernels import checks as shared_checks

from .. import _checks, _landmarks
from .._choice import select_landmarks


class Landmarks(NamedTuple):
    """What :class:`HybridEnergyScorer` returns."""

    idx: Tensor
    bias: Tensor
    scores: Tensor
    state: tuple[Any, ...] | None


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
        scores, state = _landmarks.mixed_scores(
            x, values, self.alpha, self.causal, lengths=lengths, cu_seqlens=cu_seqlens
        )
        compared = _landmarks.compared(scores)
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

    def lists(self, scores: Tensor, places: Tensor, first: Tensor, n_lists: int) -> Tensor:
        """Lists (B, H, n_lists, K) of the blocks first, first + 1, ... as columns of the scores.

        Args:
            scores: (B, H, T) scores of the columns, -inf where there is no token.
            places: (B or 1, H or 1, T) places of the columns' tokens in their sequence, < 0: none.
            first: (B or 1,) number of the first block.
            n_lists: how many lists.
        """
        compared = _landmarks.compared(scores, places, self.n_sink)
        found = []
        for i in range(n_lists):
            end = (first + i) * self.landmark_block
            allowed = (places >= 0) & (places < end[:, None, None])
            found.append(_landmarks.select_global(compared, self.k, allowed))
        return torch.stack(found, 2)

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

"""Layers of a transformer on window + landmark attention.

Strictly causal by construction: windows end at their token, a landmark list is frozen before the
block of queries that uses it, and scores use the statistics of the past only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shared_kernels import checks as shared_checks

from . import _cache, _checks, _geometry
from ._call import Attention
from ._choice import HybridEnergyScorer
from .kernels import attend

__all__ = [
    "AttentionCache",
    "DSALTAttention",
    "DSALTBlock",
    "DSALTTransformer",
    "HybridEnergyScorer",
    "SwiGLU",
    "TransformerOutput",
    "WindowSizePredictor",
    "window_regulariser",
]


class WindowSizePredictor(nn.Module):
    r"""A window for every token and head, learned, growing with the position.

    .. math:: w_{i,h} = n_{min} + \sigma(f_h(x_i))\,(\min(n_{max}, \max(i, n_{min})) - n_{min})

    f is one linear map with small non-zero weights: the windows differ from the start, so that the
    soft edge of the attention has a gradient to move them by.

    Args:
        d_model: size of x.
        n_heads: number of heads H.
        n_min, n_max: smallest and largest window.

    Example:
        >>> windows = WindowSizePredictor(16, 2, n_min=4, n_max=8)(torch.randn(1, 20, 16))
        >>> windows.shape
        torch.Size([1, 2, 20])
    """

    def __init__(self, d_model: int, n_heads: int, n_min: float = 32, n_max: float = 256) -> None:
        super().__init__()
        if not 0 <= n_min <= n_max < math.inf:
            shared_checks.fail("n_min and n_max", "satisfy 0 <= n_min <= n_max", (n_min, n_max))
        self.n_min, self.n_max = float(n_min), float(n_max)
        self.proj = nn.Linear(d_model, n_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the map again, as at construction."""
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Windows of x (B, N, d), (B, H, N) float32 (float64 for float64).

        ``positions`` (N,) or (B, N) are the tokens' places in their sequence, 0..N-1 by default.
        """
        _checks.hidden("x", x, self.proj.in_features, self)
        u = self.proj(x).transpose(1, 2)
        u = u.to(torch.promote_types(u.dtype, torch.float32)).sigmoid()
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        if positions.dim() == 2:
            positions = positions[:, None]
        room = positions.to(u.dtype).clamp(min=self.n_min).clamp(max=self.n_max) - self.n_min
        return self.n_min + u * room

    def extra_repr(self) -> str:
        return f"n_min={self.n_min}, n_max={self.n_max}"


def window_regulariser(
    windows: Tensor | Sequence[Tensor], n_min: float, n_max: float, kind: str = "entropy"
) -> Tensor:
    """Mean binary entropy, or mean, of u = (w - n_min) / (n_max - n_min) over tokens and heads.

    Meant for loss + coef * regulariser: with coef > 0, ``"entropy"`` makes each window decide
    for short or long, ``"length"`` makes windows short; coef < 0 does the opposite.

    Args:
        windows: (B, H, N), or a list of such tensors (one per layer).
        n_min, n_max: smallest and largest window.
        kind: ``"entropy"`` or ``"length"``.

    Returns:
        A scalar; entropy in nats, at most log 2; length in [0, 1].

    Example:
        >>> window_regulariser(torch.full((1, 2, 5), 6.0), n_min=4, n_max=8, kind="length")
        tensor(0.5000)
    """
    shared_checks.in_set("kind", kind, ("entropy", "length"))
    windows = [windows] if isinstance(windows, Tensor) else windows
    if not windows or not n_min <= n_max:
        got = (len(windows), n_min, n_max)
        shared_checks.fail("windows, n_min, n_max", "hold a tensor and n_min <= n_max", got)
    if n_max == n_min or not any(w.numel() for w in windows):
        return torch.stack([w.sum() * 0 for w in windows]).sum()
    total = [((w - n_min) / (n_max - n_min)).reshape(-1) for w in windows]
    u = torch.cat(total)
    if kind == "length":
        return u.mean()
    u = u.clamp(1e-6, 1 - 1e-6)
    return (torch.special.entr(u) + torch.special.entr(1 - u)).mean()


class AttentionCache(NamedTuple):
    """What one attention layer remembers: the last T columns that a later token may attend.

    No more than the largest window, two blocks and the landmarks of every head: a landmark that the
    window has passed is kept in one of the first columns, other tokens are forgotten.
    """

    keys: Tensor  # (B, H_kv, T, D), with positions in them
    values: Tensor  # (B, H_kv, T, D)
    energy: Tensor  # (B, H, T) scores, frozen when their token came; -inf where there is none
    state: tuple | None  # sums that the next scores go on from
    landmark_idx: Tensor  # (B, H, K) columns: the list of the block that the last token is in
    lengths: Tensor | None = None  # (B,) tokens of each row so far; None: all have ``length``
    front: Tensor | None = None  # (B, H, F) places of the tokens in the first F columns, -1: none
    total: int | None = None  # tokens so far of the longest row; None: T

    @property
    def columns(self) -> int:
        """Number of columns T."""
        return self.keys.shape[2]

    @property
    def length(self) -> int:
        """Tokens so far, of the longest row."""
        return self.columns if self.total is None else self.total

    def rows(self, index: Tensor) -> AttentionCache:
        """The cache of rows ``index`` (R,) of the batch: beams, repeated or selected prompts."""
        taken = [None if x is None else x[index] for x in (self.keys, self.values, self.energy)]
        state = None if self.state is None else tuple(s.rows(index) for s in self.state)
        lengths = None if self.lengths is None else self.lengths[index]
        return self._replace(
            keys=taken[0], values=taken[1], energy=taken[2], state=state,
            landmark_idx=self.landmark_idx[index], lengths=lengths,
            front=None if self.front is None else self.front[index],
        )  # fmt: skip


class DSALTAttention(nn.Module):
    """Multi-head window + landmark attention with learned windows and rotary positions.

    Args:
        d_model: size of the input and output.
        n_heads: query heads H; head dim d_model / H.
        n_min, n_max: smallest and largest window, see :class:`WindowSizePredictor`.
        k_lmk: landmarks per head.
        dropout: on the output.
        gradient_checkpointing: recompute the layer in the backward pass.
        n_kv_heads: key/value heads, a divisor of n_heads; n_heads by default.
        bias: biases in the projections.
        window_ramp: width R of the soft edge of a window, in tokens.
        landmark_block: C, queries that share a list of landmarks. It is part of the model.
        landmark_mode: ``"block_causal"``, or ``"global"``: one list chosen from the whole
            sequence, **not causal** (encoders).
        n_sink: first tokens that are always landmarks.
        rope_base: base of the rotary positions; None for none.
        rope_factor, rope_length: positions up to rope_factor * rope_length for weights trained on
            rope_length tokens (YaRN); 1 and None leave the positions as they are.
        alpha: share of the value norm in a landmark's score at the start.
        normalizer: ``Callable[[Tensor, int], Tensor]`` (scores, dim) -> weights that takes the
            place of softmax over window and landmarks; slower, same memory class.

    Example:
        >>> attention = DSALTAttention(32, 4, n_min=4, n_max=8, k_lmk=2)
        >>> out, windows = attention(torch.randn(1, 50, 32), return_window=True)
        >>> out.shape, windows.shape
        (torch.Size([1, 50, 32]), torch.Size([1, 4, 50]))
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_min: float = 32,
        n_max: float = 256,
        k_lmk: int = 16,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        *,
        n_kv_heads: int | None = None,
        bias: bool = False,
        window_ramp: float = 8.0,
        landmark_block: int = 32,
        landmark_mode: str = "block_causal",
        n_sink: int = 0,
        rope_base: float | None = 10000.0,
        rope_factor: float = 1.0,
        rope_length: int | None = None,
        alpha: float = 0.6,
        normalizer: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        shared_checks.positive_int("n_heads", n_heads)
        shared_checks.positive_int("n_kv_heads", n_kv_heads)
        shared_checks.positive_int("d_model", d_model)
        if d_model % n_heads:
            shared_checks.fail("d_model", f"be divisible by n_heads ({n_heads})", d_model)
        if n_heads % n_kv_heads:
            shared_checks.fail("n_heads", f"be divisible by n_kv_heads ({n_kv_heads})", n_heads)
        _checks.ramp(window_ramp)
        if d_model // n_heads > 256:
            shared_checks.fail("d_model", f"be at most 256 * n_heads ({n_heads})", d_model)
        if rope_base is not None and not rope_base > 0:
            shared_checks.fail("rope_base", "be > 0, or None", rope_base)
        if not 1.0 <= rope_factor < math.inf:
            shared_checks.fail("rope_factor", "be at least 1", rope_factor)
        if rope_factor > 1.0:
            shared_checks.positive_int("rope_length", rope_length)
        if normalizer is not None:
            _checks.normalizer(normalizer)
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, d_model // n_heads
        self.window_ramp, self.rope_base, self.normalizer = (
            float(window_ramp),
            rope_base,
            normalizer,
        )
        self.rope_factor, self.rope_length = float(rope_factor), rope_length
        self.gradient_checkpointing = gradient_checkpointing
        d_kv = n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_kv, bias=bias)
        self.v_proj = nn.Linear(d_model, d_kv, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.window = WindowSizePredictor(d_model, n_heads, n_min, n_max)
        self.scorer = HybridEnergyScorer(
            n_heads,
            k_lmk,
            alpha,
            landmark_block=landmark_block,
            landmark_mode=landmark_mode,
            n_sink=n_sink,
        )
        self.dropout = nn.Dropout(dropout)

    @overload
    def forward(
        self,
        x: Tensor,
        x_prev: Tensor | None = None,
        return_window: bool = False,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_value: AttentionCache | None = None,
        use_cache: Literal[False] = False,
        landmark_prefix: int | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        x_prev: Tensor | None = None,
        return_window: bool = False,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_value: AttentionCache | None = None,
        use_cache: Literal[True],
        landmark_prefix: int | None = None,
    ) -> tuple[Tensor, Tensor | None, AttentionCache]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        x_prev: Tensor | None = None,
        return_window: bool = False,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_value: AttentionCache | None = None,
        use_cache: bool = False,
        landmark_prefix: int | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, AttentionCache]: ...
    def forward(
        self,
        x: Tensor,
        x_prev: Tensor | None = None,
        return_window: bool = False,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_value: AttentionCache | None = None,
        use_cache: bool = False,
        landmark_prefix: int | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, AttentionCache]:
        """Attend.

        Args:
            x: (B, N, d) input.
            x_prev: (B, N, d) hidden state that windows and landmark scores are computed from;
                x by default.
            return_window: also return the windows, differentiable.
            attention_mask: (B, N), nonzero = token. Other places are as if they were not there:
                distances and positions count tokens only; their output is 0.
            cu_seqlens: (S + 1,) int32 bounds of S sequences packed in x (1, T, d).
            past_key_value: what an earlier call returned under ``use_cache``; x continues it. The
                mask describes x only. After packed sequences the cache has one row for each: x is
                (S, N, d), or packed again. In the global mode landmarks stay those of the first
                call, later tokens never become one.
            use_cache: also return the cache.
            landmark_prefix: global mode: choose landmarks from the first so many tokens only, as
                calls with a cache do.

        Returns:
            (out (B, N, d), windows (B, H, N) or None), and the cache as a third element.
        """
        _checks.hidden("x", x, self.n_heads * self.head_dim, self)
        if x_prev is not None:
            _checks.hidden("x_prev", x_prev, x.shape[-1], self)
            shared_checks.shape("x_prev", x_prev, tuple(x.shape), "x's (B, N, d_model)")
        if attention_mask is not None and cu_seqlens is not None:
            shared_checks.fail("attention_mask", "be None with cu_seqlens", "both")
        if attention_mask is not None:
            attention_mask = _token_mask(attention_mask, x)
        if cu_seqlens is not None:
            _checks.packed(cu_seqlens, x.shape[0], x.shape[1], x.shape[1])
        _checks.prefix(landmark_prefix, self.scorer.causal, past_key_value is not None)
        if use_cache and x.shape[1] == 0:
            shared_checks.fail("x", "hold at least one token for a cache", tuple(x.shape))
        if past_key_value is not None and not isinstance(past_key_value, AttentionCache):
            got = type(past_key_value).__name__
            shared_checks.fail("past_key_value", "be an AttentionCache", got, error=TypeError)
        given = (x, x_prev, attention_mask, cu_seqlens)
        if past_key_value is not None:
            out, windows, cache = self._attend_further(*given, past_key_value)
        elif self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            out, windows, cache = checkpoint(
                self._attend, *given, landmark_prefix, use_cache, use_reentrant=False
            )
        else:
            out, windows, cache = self._attend(*given, landmark_prefix, use_cache)
        result = (self.dropout(out), windows if return_window else None)
        if not use_cache:
            return result
        return (*result, _cache.bounded(self, AttentionCache(*cache)))

    if TYPE_CHECKING:
        __call__ = forward

    def _attend(
        self,
        x: Tensor,
        x_prev: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        prefix: int | None,
        use_cache: bool,
    ) -> tuple[Tensor, Tensor, tuple]:
        """(out, windows, cache) of whole sequences."""
        lengths = order = None
        if mask is not None:
            # tokens to the front in their order: padding behind them is never seen by causality
            order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
            front = order[..., None].expand_as(x)
            lengths, x = mask.sum(-1), x.gather(1, front)
            x_prev = None if x_prev is None else x_prev.gather(1, front)
        positions = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            positions = positions - _geometry.sequence_starts(x.shape[1], cu_seqlens)
        q, k, v, windows, source, values = self._project(x, x_prev, positions)
        chosen_from = lengths
        if prefix is not None:
            most = torch.full((x.shape[0],), min(prefix, x.shape[1]), device=x.device)
            chosen_from = most if lengths is None else lengths.minimum(most)
        marks = self.scorer(source, values, windows, lengths=chosen_from, cu_seqlens=cu_seqlens)
        out = self._mix(q, k, v, windows, marks.idx, marks.bias, cu_seqlens)
        out = self.out_proj(out.transpose(1, 2).reshape(x.shape))
        cache = _cache.remember(k, v, marks, lengths, cu_seqlens) if use_cache else ()
        if mask is not None and order is not None:
            place = order.argsort(-1)
            out = out.gather(1, place[..., None].expand_as(x))
            out = torch.where(mask[..., None], out, 0)
            windows = windows.gather(-1, place[:, None].expand_as(windows))
        return out, windows, cache

    def _attend_further(
        self,
        x: Tensor,
        x_prev: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        past: AttentionCache,
    ) -> tuple[Tensor, Tensor, tuple]:
        """The same for tokens that continue a cache."""
        token = None
        if cu_seqlens is not None:
            x, token = _cache.unpack(x, cu_seqlens)
            x_prev = None if x_prev is None else _cache.unpack(x_prev, cu_seqlens)[0]
            mask = token
        if x.shape[0] != past.keys.shape[0]:
            shared_checks.fail(
                "x", f"have the {past.keys.shape[0]} rows of past_key_value", x.shape[0]
            )
        if mask is None and past.lengths is None:
            return _cache.extend_rows(self, x, x_prev, past)
        out, windows, cache = _cache.extend_ragged(self, x, x_prev, past, mask)
        if token is not None:
            out, windows = _cache.pack(out, token), _cache.pack(windows.mT, token).mT
        return out, windows, cache

    def _project(
        self, x: Tensor, x_prev: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        source = x if x_prev is None else x_prev
        windows = self.window(source, positions)
        q = self._heads(self.q_proj(x), self.n_heads)
        k = self._heads(self.k_proj(x), self.n_kv_heads)
        v = self._heads(self.v_proj(x), self.n_kv_heads)
        values = v if x_prev is None else self._heads(self.v_proj(source), self.n_kv_heads)
        bias = getattr(self.v_proj, "bias", None)
        if bias is not None:  # the energy is that of W_V x alone
            values = values - bias.view(self.n_kv_heads, 1, self.head_dim)
        if self.rope_base is not None:
            rotary = (positions, self.rope_base, self.rope_factor, self.rope_length)
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        return q, k, v, windows, source, values

    def _heads(self, x: Tensor, n: int) -> Tensor:
        return x.view(*x.shape[:2], n, self.head_dim).transpose(1, 2)

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        windows: Tensor,
        idx: Tensor,
        bias: Tensor,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        block = self.scorer.landmark_block if idx.dim() == 4 else None
        call = Attention(q, k, v, windows, idx, bias, cu_seqlens, None, self.window_ramp, block)
        return attend(call.check(), self.normalizer, reach=self.window.n_max)

    @torch.no_grad()
    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, H, N, N) and windows (B, H, N) of x, to look at: takes N x N memory."""
        (B, N, _), D = x.shape, self.head_dim
        positions = torch.arange(N, device=x.device)
        q, k, _, windows, source, values = self._project(x, None, positions)
        marks = self.scorer(source, values, windows)
        # Attention over unit vectors returns the weights, D columns at a time.
        unit = F.pad(torch.eye(N, dtype=x.dtype, device=x.device), (0, -N % D))
        columns = [
            self._mix(
                q, k, u.expand(B, self.n_kv_heads, N, D), windows, marks.idx, marks.bias, None
            )
            for u in unit.split(D, -1)
        ]
        return torch.cat(columns, -1)[..., :N], windows

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, ramp={self.window_ramp}"


def _token_mask(mask: Tensor, x: Tensor) -> Tensor:
    shared_checks.tensor("attention_mask", mask)
    if mask.shape != x.shape[:2]:
        shared_checks.fail(
            "attention_mask", f"have shape (B, N) = {tuple(x.shape[:2])}", tuple(mask.shape)
        )
    return mask != 0


def _rotate(
    x: Tensor, positions: Tensor, base: float, factor: float = 1.0, length: int | None = None
) -> Tensor:
    """Rotary positions on x (B, H, N, D): pairs (d, d + D // 2) turn by position * base^(-2d/D).

    With a factor, YaRN: pairs that turn less than once in ``length`` tokens turn ``factor`` times
    slower, those that turn more than 32 times as before, between them a mix; x grows by
    0.1 ln(factor) + 1.

    Source: Peng et al. 2023, "YaRN", eqs. 17, 18 and 22.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    rate = base ** (-torch.arange(half, device=x.device, dtype=dtype) / max(1, half))
    size = 1.0
    if factor > 1.0 and length is not None:
        turns = length * rate / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        rate = rate * (kept + (1 - kept) / factor)
        size = 0.1 * math.log(factor) + 1.0
    angle = positions.to(dtype)[..., None] * rate  # [N, half] or [B, N, half]
    angle = angle[:, None] if angle.dim() == 3 else angle
    cos, sin = angle.cos() * size, angle.sin() * size
    a, b, rest = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype), x[..., 2 * half :]
    turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), hidden size d_ff, or ceil(8/3 d / 256) * 256."""

    def __init__(self, d_model: int, bias: bool = False, d_ff: int | None = None) -> None:
        super().__init__()
        if d_ff is not None:
            shared_checks.positive_int("d_ff", d_ff)
        hidden = -(-8 * d_model // (3 * 256)) * 256 if d_ff is None else int(d_ff)
        self.d_model = d_model
        self.gate = nn.Linear(d_model, hidden, bias=bias)
        self.up = nn.Linear(d_model, hidden, bias=bias)
        self.down = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model)."""
        _checks.hidden("x", x, self.d_model, self, dims=None)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DSALTBlock(nn.Module):
    """x += drop(attention(RMSNorm x)); x += drop(SwiGLU(RMSNorm x)).

    ``attention`` may be replaced by any module: it is called with the normed x and those keyword
    arguments of :meth:`DSALTAttention.forward` that are in use, and returns its output or a tuple
    that begins with it.

    Args:
        d_model, n_heads, n_min, n_max, k_lmk: as for :class:`DSALTAttention`.
        norm_eps: epsilon of the RMS norms.
        dropout: on both branches.
        bias: biases in all projections.
        d_ff: width of the feed-forward part, see :class:`SwiGLU`.
        options: further keyword arguments of :class:`DSALTAttention`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_min: float = 32,
        n_max: float = 256,
        k_lmk: int = 16,
        *,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = False,
        d_ff: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention: nn.Module = DSALTAttention(
            d_model, n_heads, n_min, n_max, k_lmk, bias=bias, **options
        )
        self.mlp_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.mlp = SwiGLU(d_model, bias, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None, Any]:
        """(output, windows or None, cache or None); options as of the attention's forward."""
        _checks.hidden("x", x, self.d_model, self)
        used = {
            name: value
            for name, value in options.items()
            if value is not None and value is not False
        }
        result = self.attention(self.attention_norm(x), **used)
        out, *more = (result,) if isinstance(result, Tensor) else result
        x = x + self.dropout(out)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, more[0] if more else None, more[1] if len(more) > 1 else None


class TransformerOutput(NamedTuple):
    """What :class:`DSALTTransformer` returns when more than the hidden states is asked for."""

    hidden: Tensor  # (B, N, d)
    windows: list[Tensor] | None  # one (B, H, N) per DSALT layer
    past_key_values: list[AttentionCache] | None  # one per layer


class DSALTTransformer(nn.Module):
    """A stack of :class:`DSALTBlock` and a final RMSNorm: embeddings in, hidden states out.

    Args:
        d_model, n_heads, n_layers, n_min, n_max, k_lmk: sizes, see :class:`DSALTAttention`.
        norm_eps: epsilon of the RMS norms.
        dropout: on every residual branch.
        bias: biases in all projections.
        gradient_checkpointing: recompute each block in the backward pass (training only).
        options: further keyword arguments of :class:`DSALTAttention`.

    Example:
        >>> body = DSALTTransformer(32, 4, 2, n_min=4, n_max=8, k_lmk=2)
        >>> body(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_layers: int,
        n_min: float = 32,
        n_max: float = 256,
        k_lmk: int = 16,
        *,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = False,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        shared_checks.positive_int("n_layers", n_layers)
        self.blocks = nn.ModuleList(
            DSALTBlock(
                d_model,
                n_heads,
                n_min,
                n_max,
                k_lmk,
                norm_eps=norm_eps,
                dropout=dropout,
                bias=bias,
                **options,
            )
            for _ in range(n_layers)
        )
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.d_model, self.gradient_checkpointing = d_model, gradient_checkpointing

    @overload
    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Sequence | None = None,
        use_cache: Literal[False] = False,
        return_windows: Literal[False] = False,
        landmark_prefix: int | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Sequence | None = None,
        use_cache: Literal[True],
        return_windows: bool = False,
        landmark_prefix: int | None = None,
    ) -> TransformerOutput: ...
    @overload
    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Sequence | None = None,
        use_cache: bool = False,
        return_windows: Literal[True],
        landmark_prefix: int | None = None,
    ) -> TransformerOutput: ...
    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Sequence | None = None,
        use_cache: bool = False,
        return_windows: bool = False,
        landmark_prefix: int | None = None,
    ) -> Tensor | TransformerOutput:
        """Hidden states (B, N, d), or a :class:`TransformerOutput` if windows or cache are wanted.

        Args: as for :meth:`DSALTAttention.forward`; ``past_key_values`` has one cache per layer.
        """
        if past_key_values is not None and len(past_key_values) != len(self.blocks):
            shared_checks.fail(
                "past_key_values", f"hold {len(self.blocks)} caches", len(past_key_values)
            )
        _checks.hidden("embeddings", embeddings, self.d_model, self)
        x = embeddings
        windows: list[Tensor] = []
        caches: list[AttentionCache] = []
        recompute = (
            self.gradient_checkpointing
            and self.training
            and torch.is_grad_enabled()
            and not use_cache
        )
        for i, block in enumerate(self.blocks):
            options: dict[str, Any] = {
                "attention_mask": attention_mask,
                "cu_seqlens": cu_seqlens,
                "past_key_value": None if past_key_values is None else past_key_values[i],
                "use_cache": use_cache,
                "return_window": return_windows,
                "landmark_prefix": landmark_prefix,
            }
            if recompute:
                x, window, cache = checkpoint(block, x, use_reentrant=False, **options)
            else:
                x, window, cache = block(x, **options)
            if window is not None:
                windows.append(window)
            caches.append(cache)
        x = self.norm(x)
        if not (use_cache or return_windows):
            return x
        return TransformerOutput(
            x, windows if return_windows else None, caches if use_cache else None
        )

    if TYPE_CHECKING:
        __call__ = forward

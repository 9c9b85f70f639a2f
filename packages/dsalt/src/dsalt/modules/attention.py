"""The attention layer.

Strictly causal by construction: windows end at their token, a landmark list is frozen before the
block of queries that uses it, and scores use the statistics of the past only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shared_kernels import checks as shared_checks
from shared_kernels import packed
from shared_kernels.calls import replaced

from .. import _cache, _checks, _context, _geometry
from .._attend import attend
from .._cache import AttentionCache
from .._call import Attention
from .._context import Chunk
from .._landmarks import mixed_scores
from .._rotary import rotate
from .scorer import HybridEnergyScorer
from .windows import WindowSizePredictor


class Projected(NamedTuple):
    """New tokens as the attention takes them."""

    q: Tensor  # (B, H, n, D), positions in it
    k: Tensor  # (B, H_kv, n, D), positions in it
    v: Tensor  # (B, H_kv, n, D)
    windows: Tensor  # (B, H, n)
    hidden: Tensor  # (B, n, d) what windows and landmark scores are computed from
    values: Tensor  # (B, H_kv, n, D) the values of ``hidden``, before any position enters


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
        self.window_ramp, self.rope_base = float(window_ramp), rope_base
        self.normalizer = normalizer
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
        group: Any = None,
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
        group: Any = None,
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
        group: Any = None,
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
        group: Any = None,
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
            group: ranks that share the sequences, each with consecutive tokens of them: a
                ProcessGroup or one dimension of a DeviceMesh. x is this rank's chunk, cu_seqlens
                those of the whole row. Chunks may differ in length. Gradients of parameters are
                this rank's part: their sum over the ranks is that of one process.

        Returns:
            (out (B, N, d), windows (B, H, N) or None), and the cache as a third element.
        """
        _checks.hidden("x", x, self.n_heads * self.head_dim, self.q_proj)
        if x_prev is not None:
            _checks.hidden("x_prev", x_prev, x.shape[-1], self.q_proj)
            shared_checks.shape("x_prev", x_prev, tuple(x.shape), "x's (B, N, d_model)")
        if attention_mask is not None and cu_seqlens is not None:
            shared_checks.fail("attention_mask", "be None with cu_seqlens", "both")
        if attention_mask is not None:
            attention_mask = _token_mask(attention_mask, x)
        chunk = None
        if group is not None:
            refused = {
                "attention_mask": attention_mask,
                "past_key_value": past_key_value,
                "use_cache": use_cache or None,
                "landmark_prefix": landmark_prefix,
            }
            _checks.with_group(refused, self.scorer.causal)
            chunk = Chunk.of(group, x, cu_seqlens)
        elif cu_seqlens is not None:
            packed.check(cu_seqlens, x.shape[1], B=x.shape[0])
        _checks.prefix(landmark_prefix, self.scorer.causal, past_key_value is not None)
        if use_cache and x.shape[1] == 0:
            shared_checks.fail("x", "hold at least one token for a cache", tuple(x.shape))
        if past_key_value is not None and not isinstance(past_key_value, AttentionCache):
            got = type(past_key_value).__name__
            shared_checks.fail("past_key_value", "be an AttentionCache", got, error=TypeError)
        given = (x, x_prev, attention_mask, cu_seqlens)
        cache: AttentionCache | None
        if past_key_value is not None:
            out, windows, cache = self._continue(*given, past_key_value)
        elif self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            out, windows, cache = checkpoint(
                self._attend, *given, landmark_prefix, use_cache, chunk, use_reentrant=False
            )
        else:
            out, windows, cache = self._attend(*given, landmark_prefix, use_cache, chunk)
        result = (self.dropout(out), windows if return_window else None)
        return (*result, self._bounded(cache)) if use_cache and cache is not None else result

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
        chunk: Chunk | None,
    ) -> tuple[Tensor, Tensor, AttentionCache | None]:
        """(out, windows, cache) of whole sequences, or of one rank's tokens of them."""
        if chunk is not None:
            return *self._attend_chunk(x, x_prev, chunk), None
        lengths = order = None
        if mask is not None:
            # tokens to the front in their order: padding behind them is never seen by causality
            order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
            lengths, x = mask.sum(-1), _cache.in_order(x, order, 1)
            x_prev = None if x_prev is None else _cache.in_order(x_prev, order, 1)
        positions = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            positions = positions - _geometry.sequence_starts(x.shape[1], cu_seqlens)
        new = self._project(x, x_prev, positions)
        chosen_from = lengths
        if prefix is not None:
            most = torch.full((x.shape[0],), min(prefix, x.shape[1]), device=x.device)
            chosen_from = most if lengths is None else lengths.minimum(most)
        marks = self.scorer(
            new.hidden, new.values, new.windows, lengths=chosen_from, cu_seqlens=cu_seqlens
        )
        out = self._merged(self._attended(new, marks.idx, marks.bias, cu_seqlens))
        cache = None
        if use_cache:
            idx = marks.idx[:, :, -1] if marks.idx.dim() == 4 else marks.idx
            cache = AttentionCache(new.k, new.v, marks.scores, marks.state, idx)
            if cu_seqlens is not None:
                cache = _cache.of_packed(cache, cu_seqlens)
            elif lengths is not None:
                cache = _cache.of_padded(cache, lengths)
        windows = new.windows
        if mask is not None and order is not None:
            back = order.argsort(-1)
            out = torch.where(mask[..., None], _cache.in_order(out, back, 1), 0)
            windows = _cache.in_order(windows, back, 2)
        return out, windows, cache

    def _attend_chunk(
        self, x: Tensor, x_prev: Tensor | None, chunk: Chunk
    ) -> tuple[Tensor, Tensor]:
        """(out, windows) of this rank's tokens, which attend to those of earlier ranks, too."""
        scorer = self.scorer
        new = self._project(x, x_prev, chunk.places(x.device))
        scores = _context.scores(new.hidden, new.values, scorer.alpha, chunk)
        reach = self.window.n_max + self.window_ramp
        seen = _context.columns(
            new.k, new.v, scores, chunk, reach, scorer.k, scorer.landmark_block, scorer.n_sink
        )
        gates = scorer.gate(seen.scores, seen.idx)
        q, windows = new.q, new.windows
        if seen.cu_seqlens is not None:  # packed rows have a query for every key
            before = seen.k.shape[2] - x.shape[1]
            q, windows = F.pad(q, (0, 0, before, 0)), F.pad(windows, (before, 0))
        every = replaced(new, q=q, k=seen.k, v=seen.v, windows=windows)
        out = self._merged(self._attended(every, seen.idx, gates, seen.cu_seqlens))
        return out[:, -x.shape[1] :], new.windows

    def _continue(
        self,
        x: Tensor,
        x_prev: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        past: AttentionCache,
    ) -> tuple[Tensor, Tensor, AttentionCache]:
        """The same of tokens that continue ``past``."""
        if cu_seqlens is not None:
            x, mask = _cache.unpack(x, cu_seqlens)
            x_prev = None if x_prev is None else _cache.unpack(x_prev, cu_seqlens)[0]
        if x.shape[0] != past.keys.shape[0]:
            shared_checks.fail(
                "x", f"have the {past.keys.shape[0]} rows of past_key_value", x.shape[0]
            )
        if mask is None and past.lengths is None:
            return self._continue_rows(x, x_prev, past)
        out, windows, cache = self._continue_ragged(x, x_prev, mask, past)
        if cu_seqlens is not None and mask is not None:
            out, windows = _cache.pack(out, mask), _cache.pack(windows.mT, mask).mT
        return out, windows, cache

    def _continue_rows(
        self, x: Tensor, x_prev: Tensor | None, past: AttentionCache
    ) -> tuple[Tensor, Tensor, AttentionCache]:
        """Rows of one length: the operator runs."""
        n, seen, block = x.shape[1], past.length, self.scorer.landmark_block
        new = self._project(x, x_prev, torch.arange(seen, seen + n, device=x.device))
        now, idx = self._appended(new, past), past.landmark_idx
        if self.scorer.causal:
            first = torch.full((1,), seen // block, device=x.device)
            if n > 1 or seen % block == 0:  # lists change at block boundaries only
                lists = (seen + n - 1) // block - seen // block + 1
                idx = self.scorer.lists(now.energy, now.places(), first, lists)
            else:
                idx = idx[:, :, None]
            now = replaced(now, landmark_idx=idx[:, :, -1])
        new = replaced(new, k=now.keys, v=now.values)
        out = self._merged(self._attended(new, idx, self.scorer.gate(now.energy, idx)))
        return out, new.windows, now

    def _continue_ragged(
        self, x: Tensor, x_prev: Tensor | None, mask: Tensor | None, past: AttentionCache
    ) -> tuple[Tensor, Tensor, AttentionCache]:
        """Rows that differ in length, or of which ``mask`` (B, n) leaves some tokens out.

        The operator has one first visible key for all rows, so that these run in plain PyTorch.
        """
        n, block = x.shape[1], self.scorer.landmark_block
        rows = _cache.Continuation.of(past, n, mask)
        x_prev = None if x_prev is None else rows.arranged(x_prev)
        new = self._project(rows.arranged(x), x_prev, rows.positions)
        now = rows.close(self._appended(new, past, None if mask is None else rows.valid))
        if self.scorer.causal:
            first = rows.before // block
            idx = self.scorer.lists(now.energy, now.places(), first, (n + block - 2) // block + 1)
            row_list = (rows.positions // block - first[:, None]).clamp(min=0)
        else:
            idx, row_list = now.landmark_idx[:, :, None], torch.zeros_like(rows.positions)
        column = torch.arange(past.columns, past.columns + n, device=x.device)
        row_start = torch.minimum(now.first_columns()[:, None], column)
        new = replaced(new, k=now.keys, v=now.values)
        gates = self.scorer.gate(now.energy, idx)
        out = self._merged(self._attended(new, idx, gates, rows=(row_start, row_list)))
        out, windows = rows.restored(out), rows.restored(new.windows, 2)
        out = out if mask is None else torch.where(mask[..., None], out, 0)
        return out, windows, replaced(now, landmark_idx=idx[:, :, -1].to(torch.int32))

    def _appended(
        self, new: Projected, past: AttentionCache, valid: Tensor | None = None
    ) -> AttentionCache:
        """The cache with the new tokens in its last columns, and the landmarks of before."""
        if self.scorer.causal:
            energies = (new.hidden, new.values, self.scorer.alpha)
            scores, state = mixed_scores(*energies, True, past.state, valid=valid)
        else:  # global scores are those of the first call: later tokens have none
            shape = (*past.energy.shape[:2], new.hidden.shape[1])
            scores, state = past.energy.new_full(shape, float("-inf")), past.state
        return replaced(
            past,
            keys=torch.cat((past.keys, new.k), 2),
            values=torch.cat((past.values, new.v), 2),
            energy=torch.cat((past.energy, scores), -1),
            state=state,
            total=past.length + new.hidden.shape[1],
        )

    def _bounded(self, cache: AttentionCache) -> AttentionCache:
        """The cache without the columns that no later token attends, where that frees a block."""
        block = self.scorer.landmark_block
        needed = max(math.ceil(self.window.n_max + self.window_ramp), block)
        drop = cache.surplus(needed, block)
        if drop == 0:
            return cache
        idx = cache.landmark_idx
        if self.scorer.causal:  # rows that differ in length are in blocks of their own
            now = (cache.row_lengths() - 1).div(block, rounding_mode="floor")
            idx = self.scorer.lists(cache.energy, cache.places(), now, 1)[:, :, 0]
        return cache.without(drop, idx)

    def _project(self, x: Tensor, x_prev: Tensor | None, positions: Tensor) -> Projected:
        hidden = x if x_prev is None else x_prev
        windows = self.window(hidden, positions)
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        projected.append(projected[-1] if x_prev is None else self.v_proj(hidden))
        q, k, v, values = (
            y.unflatten(2, (y.shape[2] // self.head_dim, self.head_dim)).transpose(1, 2)
            for y in projected
        )
        bias = getattr(self.v_proj, "bias", None)
        bias = bias() if callable(bias) else bias  # of torch's quantised linears it is a method
        if bias is not None:  # the energy is that of W_V x alone
            values = values - bias.view(self.n_kv_heads, 1, self.head_dim)
        if self.rope_base is not None:
            rotary = (positions, self.rope_base, self.rope_factor, self.rope_length)
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return Projected(q, k, v, windows, hidden, values)

    def _attended(
        self,
        new: Projected,
        idx: Tensor,
        gates: Tensor,
        cu_seqlens: Tensor | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The output of each head, (B, H, n, D); ``rows`` as for :func:`attend`."""
        block = self.scorer.landmark_block if idx.dim() == 4 else None
        heads = (new.q, new.k, new.v, new.windows)
        call = Attention(*heads, idx, gates, cu_seqlens, None, self.window_ramp, block)
        # the lists of rows that differ are not those that the operator expects
        call = call.check() if rows is None else call
        return attend(call, self.normalizer, rows=rows, reach=self.window.n_max)

    def _merged(self, heads: Tensor) -> Tensor:
        """The layer's output (B, N, d) from that of its heads."""
        merged: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return merged

    @torch.no_grad()
    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, H, N, N) and windows (B, H, N) of x, to look at: takes N x N memory."""
        (B, N, _), D = x.shape, self.head_dim
        new = self._project(x, None, torch.arange(N, device=x.device))
        marks = self.scorer(new.hidden, new.values, new.windows)
        # Attention over unit vectors returns the weights, D columns at a time.
        unit = F.pad(torch.eye(N, dtype=x.dtype, device=x.device), (0, -N % D))
        columns = []
        for u in unit.split(D, -1):
            units = replaced(new, v=u.expand(B, self.n_kv_heads, N, D))
            columns.append(self._attended(units, marks.idx, marks.bias))
        return torch.cat(columns, -1)[..., :N], new.windows

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, ramp={self.window_ramp}"


def _token_mask(mask: Tensor, x: Tensor) -> Tensor:
    shared_checks.tensor("attention_mask", mask)
    if mask.shape != x.shape[:2]:
        shared_checks.fail(
            "attention_mask", f"have shape (B, N) = {tuple(x.shape[:2])}", tuple(mask.shape)
        )
    return mask != 0

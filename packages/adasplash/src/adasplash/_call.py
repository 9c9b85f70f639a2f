"""What an op is called with: named fields in the order of its schema, checked in one method.

Beside each call stands what its forward pass keeps for the backward pass, one type per backend.
"""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.blockmask import n_tiles
from shared_kernels.calls import recast, replaced
from shared_kernels.rows import wide

from . import _checks

# Kernels keep or skip squares of this many queries and keys.
SQUARE = 64
# The lists of the torch and the native backend have room for this many keys per query on average.
ROOM = 64
# As many steps as a solver that runs until it has converged may take.
ENOUGH_STEPS = 40


def per_head_sums(per_head: Tensor, alpha: Tensor) -> Tensor:
    """The gradient of each head (H,) as that of ``alpha``: a scalar, (H,) or (1, H, 1, 1)."""
    if alpha.numel() == 1:
        per_head = per_head.sum()
    return per_head.reshape(alpha.shape).to(alpha.device, alpha.dtype)


def _saves(*tensors: Tensor | None) -> bool:
    """Whether the forward pass keeps what the backward pass asks for.

    A trace keeps it always: torch compares its graph with that of a run without gradients, and
    the traced module may be trained.
    """
    if torch.jit.is_tracing():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _fresh(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _plain_int(n: int) -> int:
    """A plain int of a number of NumPy; sizes of a trace stay as they are."""
    return n if isinstance(n, int) or not isinstance(n, Integral) else int(n)


def _with_head_dim(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, whose head dim of 0 becomes one of zeros: every score is then 0."""
    if q.shape[-1]:
        return q, k
    return torch.nn.functional.pad(q, (0, 1)), torch.nn.functional.pad(k, (0, 1))


def sequences(
    B: int, N_q: int, N_k: int, varlen: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[int, slice, slice]]:
    """(batch element, queries, keys) of every independent sequence."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [(0, slice(a, b), slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    if varlen is not None:  # (B,), or (B, 2): lengths of the queries and of the keys
        both = varlen.view(B, 1 if varlen.dim() == 1 else 2).expand(B, 2).tolist()
        return [(b, slice(0, n_q), slice(0, n_k)) for b, (n_q, n_k) in enumerate(both)]
    return [(b, slice(0, N_q), slice(0, N_k)) for b in range(B)]


class Attention(NamedTuple):
    """o = entmax_alpha(cap(scale q k^T) + bias - slope |distance|, over the visible keys) v.

    cap(x) = softcap tanh(x / softcap). Each head may have one more key, the sink, which every query
    that sees a key sees too: its score is s_aux, its value 0.
    """

    q: Tensor  # (B, H, N_q, D)
    k: Tensor  # (B, H_kv, N_k, D)
    v: Tensor  # (B, H_kv, N_k, D_v)
    alpha: Tensor | None = None  # (), (1,), (H,) or (1, H, 1, 1); None: the number below
    alpha_value: float = 0.0
    is_causal: bool = False
    varlen: Tensor | None = None  # (B,) lengths, or (B, 2): those of the queries and of the keys
    cu_seqlens: Tensor | None = None  # (sequences + 1,)
    mask: Tensor | None = None  # boolean, broadcasts to (B, H, N_q, N_k)
    bias: Tensor | None = None  # broadcasts to (B, H, N_q, N_k)
    slopes: Tensor | None = None  # (H,)
    window: int | None = None
    s_aux: Tensor | None = None  # (H,), scores of the sinks
    softcap: float | None = None  # above 0
    scale: float = 1.0
    n_iter: int = ENOUGH_STEPS
    square: int = SQUARE  # side of the squares that kernels keep or skip; 0: they skip none
    save: bool = False

    def check(self) -> Attention:
        """The call as backends take it, or the error that says what is wrong with it."""
        q, k = self.q, self.k
        shape = checks.attention_shapes(q, k, self.v, least=0)
        if self.alpha is not None:
            checks.same_device(q=q, alpha=self.alpha)
            _checks.per_head("alpha", self.alpha, shape.H)
        _checks.flag("is_causal", self.is_causal, "lengths go into `varlen`")
        if self.varlen is not None and self.cu_seqlens is not None:
            checks.fail("cu_seqlens", "not come with `varlen`", "both")
        if self.varlen is not None:
            _checks.lengths(self.varlen, shape.B, shape.N_q, shape.N_k)
        if self.cu_seqlens is not None:
            _checks.packed(self.cu_seqlens, shape.B, shape.N_q, shape.N_k)
        pairs = (shape.B, shape.H, shape.N_q, shape.N_k)
        mask, bias = _checks.mask(self.mask, q, pairs), self.bias
        if bias is not None:
            checks.floating("bias", bias)
            checks.same_device(q=q, bias=bias)
            bias = _checks.pairs("bias", bias, *pairs)
        if self.slopes is not None:
            checks.floating("alibi_slopes", self.slopes)
            checks.same_device(q=q, alibi_slopes=self.slopes)
            checks.shape("alibi_slopes", self.slopes, (shape.H,), lambda: f"(H={shape.H},)")
        if self.window is not None:
            checks.positive_int("window", self.window)
        if self.s_aux is not None:
            checks.floating("s_aux", self.s_aux)
            checks.same_device(q=q, s_aux=self.s_aux)
            checks.shape("s_aux", self.s_aux, (shape.H,), lambda: f"(H={shape.H},)")
        _checks.steps("niter", self.n_iter)
        q, k = _with_head_dim(q, k)
        return replaced(
            self,
            q=q,
            k=k,
            is_causal=bool(self.is_causal),
            mask=mask,
            bias=bias,
            window=None if self.window is None else _plain_int(self.window),
            softcap=_checks.softcap(self.softcap),
            n_iter=int(self.n_iter) if self.n_iter < 10 else ENOUGH_STEPS,
            save=_saves(q, k, self.v, self.alpha, bias, self.slopes, self.s_aux),
        )

    def with_queries(self, q: Tensor) -> Attention:
        """The call with other queries, of which a gradient may be wanted."""
        return replaced(self, q=q, save=self.save or _saves(q))

    def fake(self) -> Tensor:
        return self.q.new_empty(*self.q.shape[:3], self.v.shape[-1])

    @property
    def n_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no result, no key or no sequence."""
        no_key = self.k.shape[2] == 0 or self.n_sequences == 0
        return no_key or 0 in (*self.q.shape[:3], self.v.shape[-1])


class Statistics(Attention):
    """How sparse the weights of the attention of q and k are, by squares of side ``square``."""

    __slots__ = ()

    def fake(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Support and threshold of each query; squares with a weight, visited, visible per head."""
        rows, heads = self.q.shape[:3], self.q.shape[:2]
        used, visited, visible = (self.q.new_empty(heads, dtype=torch.int64) for _ in range(3))
        support = self.q.new_empty(rows, dtype=torch.int64)
        return support, self.q.new_empty(rows, dtype=wide(self.q)), used, visited, visible


class Lists(NamedTuple):
    """What the torch backend keeps of attention: the keys and weights of each query, in lists."""

    theta: Tensor  # (B, H, N_q) = (tau + 1) / s of scores less the largest of their row
    weights: Tensor  # (entries,) one row after the other
    keys: Tensor  # (entries,) int32
    counts: Tensor  # (B, H, N_q) int32, entries of each query; -1: its tile keeps theta alone

    @classmethod
    def fake(cls, call: Attention) -> Lists:
        rows = call.q.shape[:3] if call.save else (0,)
        theta = call.q.new_empty(rows, dtype=wide(call.q))
        room = ROOM * theta.numel()
        keys, counts = (call.q.new_empty(shape, dtype=torch.int32) for shape in ((room,), rows))
        return cls(theta, theta.new_empty(room), keys, counts)


class Supports(NamedTuple):
    """What the native library keeps of attention: thresholds, and the weights that fitted in."""

    top: Tensor  # (B, H, N_q) fp32 or fp64, the largest score in units of s
    unit: Tensor  # (B, H, N_q), how far above `top` a score weighs 1 before division
    inverse: Tensor  # (B, H, N_q), what divides the weights
    keys: Tensor  # (B, H, N_q, ROOM) int32, for each head the keys of one query after the other
    p: Tensor  # (B, H, N_q, ROOM), their weights
    counts: Tensor  # (B, H, N_q) int32, the entries of each query; -1: they did not fit in

    @classmethod
    def fake(cls, call: Attention) -> Supports:
        unit = call.q.new_empty(call.q.shape[:3] if call.save else (0,), dtype=wide(call.q))
        p = unit.new_empty((*unit.shape, ROOM) if call.save else (0,))
        keys, counts = (torch.empty_like(x, dtype=torch.int32) for x in (p, unit))
        return cls(torch.empty_like(unit), unit, torch.empty_like(unit), keys, p, counts)


class Tiles(NamedTuple):
    """What the kernels keep of attention: thresholds, and which squares hold a weight."""

    top: Tensor  # (B, H, N_q) fp32, the largest score of each row, in the kernels' units
    theta: Tensor  # (B, H, N_q) fp32 = (tau + 1) / s of scores less the largest of their row
    o2: Tensor  # (B, H, N_q, D_v) fp32: the values, averaged with the weights' derivatives
    squares: Tensor  # (sequences * H, T_q, T_k) int8, not 0 where a weight is above 0

    @classmethod
    def fake(cls, call: Attention) -> Tiles:
        theta = call.q.new_empty(call.q.shape[:3] if call.save else (0,), dtype=torch.float32)
        squares: tuple[int, ...] = (0,)
        if call.save and call.square:
            sides = (n_tiles(x.shape[2], SQUARE) for x in (call.q, call.k))
            squares = (call.n_sequences * call.q.shape[1], *sides)
        o2 = theta.new_empty((*call.q.shape[:3], call.v.shape[-1]) if call.save else (0,))
        return cls(torch.empty_like(theta), theta, o2, call.q.new_empty(squares, dtype=torch.int8))


class SecondDerivative(NamedTuple):
    """The derivative of sum <to_x, dx> over the gradients dx of :class:`Attention`."""

    d_out: Tensor
    to_q: Tensor | None
    to_k: Tensor | None
    to_v: Tensor | None
    to_alpha: Tensor | None
    to_bias: Tensor | None
    to_slopes: Tensor | None
    to_s_aux: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    alpha_value: float
    is_causal: bool
    varlen: Tensor | None
    cu_seqlens: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    window: int | None
    s_aux: Tensor | None
    softcap: float | None
    scale: float
    n_iter: int

    @property
    def first(self) -> Attention:
        """The call whose gradients are derived."""
        return recast(self, Attention)

    def fake(self) -> tuple[Tensor, ...]:
        """Those of d_out, q, k, v, alpha, bias, slopes and s_aux; (0,) for what is not there."""
        scores = (self.alpha, self.bias, self.slopes, self.s_aux)
        given = (self.d_out, self.q, self.k, self.v, *scores)
        return tuple(self.q.new_empty(0) if x is None else _fresh(x) for x in given)


class Lazy(NamedTuple):
    """o = W v, W_ij = relu(softmax_j(scale q_i k_j + bias[h, i-j]) + tau_h / i), j <= i."""

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, H_kv, N, D)
    v: Tensor  # (B, H_kv, N, D_v)
    bias: Tensor  # (H, window_size + 1), 0 beyond
    tau: Tensor  # (H,)
    window_size: int
    varlen: Tensor | None = None  # (B,)
    mask: Tensor | None = None  # boolean, broadcasts to (B, H, N, N)
    scale: float = 1.0
    save: bool = False

    def check(self) -> Lazy:
        """The call as backends take it, or the error that says what is wrong with it."""
        q, k, window_size = self.q, self.k, self.window_size
        shape = checks.attention_shapes(q, k, self.v, least=0)
        if shape.N_q != shape.N_k:
            checks.fail("k", f"have as many tokens as q ({shape.N_q})", shape.N_k)
        if isinstance(window_size, bool) or not isinstance(window_size, Integral):
            checks.fail("window_size", "be an int", type(window_size).__name__, error=TypeError)
        window_size = _plain_int(window_size)
        if window_size < 0:
            checks.fail("window_size", "be at least 0", window_size)
        checks.floating("bias", self.bias)
        checks.floating("tau", self.tau)
        checks.same_device(q=q, bias=self.bias, tau=self.tau)
        checks.shape(
            "bias",
            self.bias,
            (shape.H, window_size + 1),
            lambda: f"(H={shape.H}, window_size+1={window_size + 1})",
        )
        checks.shape("tau", self.tau, (shape.H,), lambda: f"(H={shape.H},)")
        if self.varlen is not None:
            _checks.lengths(self.varlen, shape.B, shape.N_q, shape.N_k)
        mask = _checks.mask(self.mask, q, (shape.B, shape.H, shape.N_q, shape.N_k))
        q, k = _with_head_dim(q, k)
        save = _saves(q, k, self.v, self.bias, self.tau)
        return replaced(self, q=q, k=k, window_size=window_size, mask=mask, save=save)

    def fake(self) -> Tensor:
        return self.q.new_empty(*self.q.shape[:3], self.v.shape[-1])


class RowSums(NamedTuple):
    """What the torch and the native backend keep of lazy attention."""

    lse: Tensor  # (B, H, N), the log2-sum-exp2 of each row of scores less its largest

    @classmethod
    def fake(cls, call: Lazy) -> RowSums:
        return cls(call.q.new_empty(call.q.shape[:3] if call.save else (0,), dtype=wide(call.q)))


class ActiveSums(NamedTuple):
    """What the kernels keep of lazy attention."""

    top: Tensor  # (B, H, N) fp32, the largest score of each row, in the kernels' units
    lse: Tensor  # (B, H, N) fp32, the log2-sum-exp2 of each row of scores less the largest
    sums: Tensor  # (B, H, N, 2, D_v) fp32: the output unrounded, the sum of the active values

    @classmethod
    def fake(cls, call: Lazy) -> ActiveSums:
        rows = call.q.shape[:3]
        shapes = (rows, rows, (*rows, 2, call.v.shape[-1])) if call.save else ((0,), (0,), (0,))
        return cls(*(call.q.new_empty(shape, dtype=torch.float32) for shape in shapes))


class LazySecondDerivative(NamedTuple):
    """The derivative of sum <to_x, dx> over the gradients dx of :class:`Lazy`."""

    d_out: Tensor
    to_q: Tensor | None
    to_k: Tensor | None
    to_v: Tensor | None
    to_bias: Tensor | None
    to_tau: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    tau: Tensor
    window_size: int
    varlen: Tensor | None
    mask: Tensor | None
    scale: float

    def fake(self) -> tuple[Tensor, ...]:
        """The gradients of d_out, q, k, v, bias and tau."""
        return tuple(_fresh(x) for x in (self.d_out, self.q, self.k, self.v, self.bias, self.tau))

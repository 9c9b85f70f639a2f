"""Modules: a bounded alpha, and multi-head attention with alpha-entmax weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shared_kernels import checks

from .api import adasplash, lazy_attention_triton, triton_entmax


class AlphaParameter(nn.Module):
    r"""A learnable alpha that cannot leave (low, high) while it is trained.

    alpha = low + (high - low) * sigmoid(raw), computed in fp32 at least.

    Args:
        n: how many values, usually one per head; None for a scalar.
        init: the value they start from.
        low, high: the bounds, 1 <= low < init < high <= 2.

    Returns (when called): alpha, of shape (n,) or ().

    Example:
        >>> AlphaParameter(4, init=1.5)().shape
        torch.Size([4])
    """

    def __init__(
        self, n: int | None = None, init: float = 1.5, low: float = 1.01, high: float = 2.0
    ) -> None:
        super().__init__()
        if not 1.0 <= low < high <= 2.0:
            checks.fail("low", "satisfy 1 <= low < high <= 2", f"low={low}, high={high}")
        if not low < init < high:
            checks.fail("init", f"be in ({low}, {high})", init)
        self.low, self.high = low, high
        share = (init - low) / (high - low)
        raw = torch.tensor(math.log(share / (1 - share)))
        self.raw = nn.Parameter(raw if n is None else raw.repeat(n))

    def forward(self) -> Tensor:
        raw = self.raw if self.raw.dtype == torch.float64 else self.raw.float()
        # Rounding could step over `high` by one ulp.
        return (self.low + (self.high - self.low) * torch.sigmoid(raw)).clamp(max=self.high)

    def extra_repr(self) -> str:
        return f"n={self.raw.numel()}, low={self.low}, high={self.high}"


class EntmaxAttention(nn.Module):
    r"""Multi-head self-attention whose weights are alpha-entmax, with an alpha learned per head.

    x -> q, k, v -> adasplash(q, k, v, alpha) -> out: memory linear in the number of tokens.

    Args:
        d_model: width of the model.
        n_heads: number of query heads; divides d_model.
        n_kv_heads: number of key heads (grouped queries); n_heads by default.
        causal: hide the future.
        alpha: start value in [1, 2].
        learn_alpha: learn one alpha per head, kept in (1.01, 2); otherwise alpha is fixed.
        bias: whether the projections have a bias.
        window: see :func:`adasplash`.

    Example:
        >>> attention = EntmaxAttention(d_model=32, n_heads=4, causal=True)
        >>> attention(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        causal: bool = False,
        alpha: float = 1.5,
        learn_alpha: bool = True,
        bias: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        for name, value in (("d_model", d_model), ("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
            checks.positive_int(name, value)
        if d_model % n_heads:
            checks.fail("d_model", f"be a multiple of n_heads={n_heads}", d_model)
        if n_heads % n_kv_heads:
            checks.fail("n_heads", f"be a multiple of n_kv_heads={n_kv_heads}", n_heads)
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim = d_model // n_heads
        self.causal, self.window = causal, window
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)
        self.alpha: AlphaParameter | float
        if learn_alpha:
            self.alpha = AlphaParameter(n_heads, init=alpha)
        else:
            self.alpha = alpha

    def current_alpha(self) -> float | Tensor:
        """The alpha in use: a number, or one per head."""
        return self.alpha() if isinstance(self.alpha, AlphaParameter) else self.alpha

    def _split(self, x: Tensor, n_heads: int) -> Tensor:
        return x.unflatten(-1, (n_heads, self.head_dim)).transpose(-3, -2)

    def forward(
        self, x: Tensor, *, varlen: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, d_model) -> the same; ``varlen`` and ``mask`` as for :func:`adasplash`."""
        out = adasplash(
            self._split(self.q_proj(x), self.n_heads),
            self._split(self.k_proj(x), self.n_kv_heads),
            self._split(self.v_proj(x), self.n_kv_heads),
            self.current_alpha(),
            is_causal=self.causal,
            varlen=varlen,
            mask=mask,
            window=self.window,
        )
        return self.o_proj(out.transpose(-3, -2).flatten(-2))

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """The (B, H, N, N) attention weights, to look at: this one does take N x N memory."""
        q = self._split(self.q_proj(x), self.n_heads)
        k = self._split(self.k_proj(x), self.n_kv_heads)
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, 1)
        scores = q @ k.mT * self.head_dim**-0.5
        i = torch.arange(x.shape[-2], device=x.device)
        distance = i[:, None] - i
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.causal:
            hidden |= distance < 0
        if self.window is not None:
            hidden |= distance.abs() >= self.window
        alpha = self.current_alpha()
        if isinstance(alpha, Tensor):
            alpha = alpha.view(-1, 1, 1)
        return triton_entmax(scores.masked_fill(hidden, -torch.inf), alpha)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_heads={self.n_heads}, causal={self.causal}"


class LazyAttention(nn.Module):
    r"""Causal self-attention with rotary positions, biases by distance and an elastic softmax.

    W = relu(softmax(q k^T / sqrt(d) + b[h, i-j]) + tau_h / i): see :func:`lazy_attention_triton`.

    Args:
        dim: width of the model.
        num_heads: number of heads; dim / num_heads is even.
        window_size: the largest distance that has a learned bias.
        rope_base: base of the rotary frequencies.

    Parameters: ``attention_biases`` (num_heads, window_size + 1), 0 at first, and ``tau``
    (num_heads,), -1 at first: then a weight survives if it is above average for its row.

    Example:
        >>> attention = LazyAttention(dim=64, num_heads=4, window_size=16)
        >>> attention(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int = 512, rope_base: float = 10000
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads), ("window_size", window_size)):
            checks.positive_int(name, value)
        if dim % num_heads or (dim // num_heads) % 2:
            checks.fail("dim", f"be an even multiple of num_heads={num_heads}", dim)
        if not rope_base > 0:
            checks.fail("rope_base", "be positive", rope_base)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window_size, self.rope_base = window_size, rope_base
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window_size + 1))
        self.tau = nn.Parameter(torch.full((num_heads,), -1.0))

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding, first half against second half, positions from 0."""
        exact = x if x.dtype == torch.float64 else x.float()
        half = self.head_dim // 2
        powers = torch.arange(half, device=x.device, dtype=exact.dtype) / -half
        position = torch.arange(x.shape[-2], device=x.device, dtype=exact.dtype)
        angle = position[:, None] * self.rope_base**powers
        first, second = exact.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.to(x.dtype)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, varlen: Tensor | None = None
    ) -> Tensor:
        """x (B, N, dim) -> the same. mask: boolean, broadcasts to (B, H, N, N), True = allowed."""
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = lazy_attention_triton(
            self._rotate(q),
            self._rotate(k),
            v,
            self.attention_biases,
            self.tau,
            self.window_size,
            varlen,
            mask=mask,
        )
        return self.o_proj(out.transpose(-3, -2).flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"

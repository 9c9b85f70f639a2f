"""Blocks of attention and feed-forward layers, and a stack of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shared_kernels import checks as shared_checks

from .. import _checks
from .._cache import AttentionCache
from .._context import Chunk
from .attention import DSALTAttention


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
        _checks.hidden("x", x, self.d_model, self.gate, dims=None)
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


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
        _checks.hidden("x", x, self.d_model, self.attention_norm)
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
        past_key_values: Sequence[AttentionCache] | None = None,
        use_cache: Literal[False] = False,
        return_windows: Literal[False] = False,
        landmark_prefix: int | None = None,
        group: Any = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Sequence[AttentionCache] | None = None,
        use_cache: Literal[True],
        return_windows: bool = False,
        landmark_prefix: int | None = None,
        group: Any = None,
    ) -> TransformerOutput: ...
    @overload
    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Sequence[AttentionCache] | None = None,
        use_cache: bool = False,
        return_windows: Literal[True],
        landmark_prefix: int | None = None,
        group: Any = None,
    ) -> TransformerOutput: ...
    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Sequence[AttentionCache] | None = None,
        use_cache: bool = False,
        return_windows: bool = False,
        landmark_prefix: int | None = None,
        group: Any = None,
    ) -> Tensor | TransformerOutput:
        """Hidden states (B, N, d), or a :class:`TransformerOutput` if windows or cache are wanted.

        Args: as for :meth:`DSALTAttention.forward`; ``past_key_values`` has one cache per layer.
        """
        if past_key_values is not None and len(past_key_values) != len(self.blocks):
            shared_checks.fail(
                "past_key_values", f"hold {len(self.blocks)} caches", len(past_key_values)
            )
        _checks.hidden("embeddings", embeddings, self.d_model, self.norm)
        x: Tensor = embeddings
        if group is not None:
            group = Chunk.of(group, x, cu_seqlens)
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
                "group": group,
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

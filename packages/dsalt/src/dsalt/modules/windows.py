"""The module that predicts a window for every token and head, and a regulariser of windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shared_kernels import checks as shared_checks
from shared_kernels.rows import wide

from .. import _checks


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
        _checks.hidden("x", x, self.proj.in_features, self.proj)
        u: Tensor = self.proj(x).transpose(1, 2)
        u = u.to(wide(u)).sigmoid()
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
    entropy: Tensor = torch.special.entr(u) + torch.special.entr(1 - u)
    return entropy.mean()

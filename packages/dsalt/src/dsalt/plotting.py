"""A picture of one head: its windows, its landmarks, its weights. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared_kernels import checks as shared_checks
from shared_kernels.calls import replaced

from ._call import Attention

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_attention_pattern"]

LARGEST = 4096  # tokens: a picture is dense


def plot_attention_pattern(
    Q: Tensor,
    K: Tensor,
    window_sizes: Tensor,
    landmark_idx: Tensor,
    *,
    batch: int = 0,
    head: int = 0,
    scale: float | None = None,
    landmark_bias: Tensor | None = None,
    landmark_block: int | None = None,
    window_ramp: float = 8.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the attention weights of one head with the edge of its windows and its landmarks.

    Rows are queries, columns keys; colour is log10 of the weight, white is an exact zero. The line
    is the far edge of each token's window, dots mark the landmarks that a row attends beyond it.

    Args:
        Q: (B, H, N, D); K: (B, H_kv, N, D), as for ``dsalt_attention``; N <= 4096.
        window_sizes: (B, H, N).
        landmark_idx: (B, H, K) or (B, H, blocks, K).
        batch, head: which head is drawn.
        scale, landmark_bias, landmark_block, window_ramp: as for ``dsalt_attention``.
        ax: matplotlib axes; a new figure without them.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing (``pip install dsalt[plots]``).

    Example:
        >>> Q, K = torch.randn(2, 1, 2, 60, 8)
        >>> windows, idx = torch.full((1, 2, 60), 10.0), torch.tensor([0, 7]).expand(1, 2, 2)
        >>> ax = plot_attention_pattern(Q, K, windows, idx, head=1)  # doctest: +SKIP
    """
    from . import _reference

    given = (Q, K, K, window_sizes, landmark_idx, landmark_bias, None)
    call = Attention(*given, scale, window_ramp, landmark_block).check()
    n = Q.shape[2]
    if n != K.shape[2] or n > LARGEST:
        shared_checks.fail("Q", f"have K's length, at most {LARGEST}", n)
    for name, value, limit in (("batch", batch, Q.shape[0]), ("head", head, Q.shape[1])):
        if not 0 <= value < limit:
            shared_checks.fail(name, f"be in [0, {limit})", value)
    group = Q.shape[1] // K.shape[1]
    one = (slice(batch, batch + 1), slice(head, head + 1))
    bias = None if call.bias is None else call.bias[one].detach()
    w, ramp = call.windows[one].detach(), 0.0 if call.hard else call.ramp
    M = _reference.multipliers(replaced(call, windows=w, landmarks=call.landmarks[one], bias=bias))
    q, k = Q[batch, head].detach().float(), K[batch, head // group].detach().float()
    scores = (q @ k.T) * call.factor
    weights = torch.softmax(scores + M[0, 0].log(), -1).cpu()

    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot_attention_pattern needs matplotlib: dsalt[plots]") from error
    if ax is None:
        _, ax = pyplot.subplots(figsize=(6, 5.4), layout="constrained")
    shown = torch.where(weights > 0, weights.clamp(min=1e-6).log10(), torch.nan)
    picture = ax.imshow(shown.numpy(), cmap="Blues", vmin=-5, vmax=0, interpolation="nearest")
    row = torch.arange(n, dtype=torch.float32)
    edge = (row - w[0, 0].cpu()).clamp(min=0)
    ax.plot(edge.numpy(), row.numpy(), color="crimson", linewidth=1, label="window edge")
    far = (weights > 0) & (torch.arange(n) < (edge - ramp)[:, None])
    at = far.nonzero()
    if len(at):
        size = max(0.5, 120 / n)
        ax.scatter(at[:, 1], at[:, 0], s=size, color="darkorange", label="landmarks")
    ax.set(xlabel="key", ylabel="query", title=f"attention weights, head {head}")
    ax.legend(loc="upper right")
    ax.figure.colorbar(picture, ax=ax, shrink=0.6, label="log10 weight")
    return ax

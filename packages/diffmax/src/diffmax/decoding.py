"""What the support of the weights is good for: draws, truncated decoding, calibrated sets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks
from ._checks import Alpha
from .api import diffmax_bisect, diffmax_loss


def diffmax_sample(
    logits: Tensor, alpha: Alpha = 0.5, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One draw for each row from its diffmax weights: what has no weight is never drawn.

        P(index = i) = p_i,   p = diffmax_bisect(logits, alpha)

    Args:
        logits: (..., C), floating, C >= 1.
        alpha: as in `diffmax_bisect`.
        generator: of the random numbers, on the device of the logits.

    Returns:
        index: (...) int64.
        log_prob: (...), log p of what was drawn, with its gradient in the logits and alpha.

    Raises:
        TypeError: logits are not floating point.
        ValueError: no class to draw from, or a row without weights (NaN, or only -inf).

    Example:
        >>> index, log_prob = diffmax_sample(torch.tensor([[5.0, 0.0, 0.0]]), alpha=0.5)
        >>> index, log_prob
        (tensor([0]), tensor([0.]))
    """
    p = _weights(logits, alpha)
    total = p.detach().double().cumsum(-1)
    if checks.reads_values(total):
        is_wrong = ~(total[..., -1] > 0)
        if bool(is_wrong.any()):
            place = tuple(is_wrong.nonzero()[0].tolist())
            checks.fail("logits", "have a finite entry and no NaN in each row", f"row {place}")
    shape = total[..., :1].shape
    u = torch.rand(shape, dtype=torch.float64, device=p.device, generator=generator)
    # the first entry whose sum lies above the number: its weight is above zero
    index = torch.searchsorted(total, u * total[..., -1:], right=True)
    # where rounding puts the number at the whole sum, the last entry with a weight is drawn
    last = (total < total[..., -1:]).sum(-1, keepdim=True)
    index = torch.minimum(index, last)
    return index.squeeze(-1), p.gather(-1, index).squeeze(-1).log()


def support_topk(logits: Tensor, k: int, alpha: Alpha = 0.5) -> tuple[Tensor, Tensor]:
    """The at most k largest weights of each row that are above zero: beams, truncated decoding.

    Where min-p and top-p cut a softmax at a threshold of their own, these are the weights' own
    zeros.

    Args:
        logits: (..., C), floating, C >= 1.
        k: at least 1.
        alpha: as in `diffmax_bisect`.

    Returns:
        weights: (..., min(k, C)) in falling order, 0 beyond the support.
        index: the same shape, int64, -1 beyond the support.

    Raises:
        TypeError, ValueError: as `diffmax_bisect`; k < 1.

    Example:
        >>> support_topk(torch.tensor([2.0, 1.0, -1.0]), k=3, alpha=0.5)
        (tensor([0.8307, 0.1693, 0.0000]), tensor([ 0,  1, -1]))
    """
    checks.positive_int("k", k)
    p = _weights(logits, alpha)
    weights, index = p.topk(min(int(k), p.shape[-1]), -1)
    return weights, torch.where(weights == 0, -1, index)


class Calibration(NamedTuple):
    """What `diffmax_calibrate` found: weights are diffmax_bisect(logits / temperature, alpha)."""

    temperature: float
    alpha: float
    loss_before: float  # at temperature 1, with the same alpha
    loss_after: float
    coverage: float  # how often the target has a weight above zero
    size: float  # mean number of classes with a weight above zero


def diffmax_calibrate(
    logits: Tensor, target: Tensor, alpha: float = 0.5, *, coverage: float | None = None
) -> Calibration:
    """The temperature, and with `coverage` the alpha, that fit held-out data.

        temperature = argmin_T mean L_alpha(logits / T, target),   L: `diffmax_loss`

    The loss is convex in 1 / T. It cannot choose alpha: its value falls with alpha whatever the
    data are. So alpha is given, or it is the lowest one, within 0.005, whose support holds the
    target as often as `coverage` asks.

    Args:
        logits: (n, C), floating, finite, n >= 1; of data that the model was not trained on.
        target: (n,) class indices.
        alpha: in (0, 1).
        coverage: in (0, 1), or None. Where no alpha up to 0.995 reaches it the last is returned:
            look at the result's own `coverage`.

    Returns:
        A `Calibration` of plain numbers.

    Raises:
        TypeError, ValueError: as `diffmax_loss`; empty or infinite logits, coverage outside (0, 1).

    Example:
        >>> logits, target = torch.eye(4) * 20, torch.tensor([0, 1, 2, 0])
        >>> found = diffmax_calibrate(logits, target, alpha=0.5)
        >>> found.temperature > 1, found.loss_after < found.loss_before
        (True, True)

    Source: Guo et al., ICML 2017, for the temperature; the loss: Blondel et al., JMLR 21 (2020).
    """
    checks.floating("logits", logits)
    if logits.dim() != 2 or not logits.numel() or not bool(logits.isfinite().all()):
        checks.fail("logits", "be finite, of shape (n, C), n and C >= 1", tuple(logits.shape))
    _checks.target(target, logits, -1, -100)
    if target.is_floating_point() or bool((target == -100).any()):
        checks.fail("target", "be a class for each row", target.dtype)
    alpha = _checks.alpha_number(alpha)
    x = logits.detach().double()
    if coverage is None:
        return _calibrated(x, target, alpha)
    if not 0.0 < _checks.number("coverage", coverage) < 1.0:
        checks.fail("coverage", "be in (0, 1)", coverage)
    low, high = 0.005, 0.995
    found = _calibrated(x, target, low)
    if found.coverage >= coverage:
        return found
    found = _calibrated(x, target, high)
    if found.coverage < coverage:
        return found
    while high - low > 0.005:
        middle = (low + high) / 2
        tried = _calibrated(x, target, middle)
        if tried.coverage >= coverage:
            high, found = middle, tried
        else:
            low = middle
    return found


def _calibrated(x: Tensor, target: Tensor, alpha: float) -> Calibration:
    of_target = x.gather(1, target.long().unsqueeze(1)).mean()
    low, high = -12.0, 12.0  # log(1 / T); the slope of the loss rises with it
    for _ in range(50):
        middle = (low + high) / 2
        p = diffmax_bisect(x * math.exp(middle), alpha)
        if bool((p * x).sum(-1).mean() > of_target):
            high = middle
        else:
            low = middle
    temperature = math.exp(-(low + high) / 2)
    p = diffmax_bisect(x / temperature, alpha)
    return Calibration(
        temperature,
        alpha,
        diffmax_loss(x, target, alpha).item(),
        diffmax_loss(x / temperature, target, alpha).item(),
        (p.gather(1, target.long().unsqueeze(1)) > 0).double().mean().item(),
        (p > 0).double().sum(-1).mean().item(),
    )


def _weights(logits: Tensor, alpha: Alpha) -> Tensor:
    checks.floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        checks.fail("logits", "have at least one class (..., C)", f"shape {tuple(logits.shape)}")
    return diffmax_bisect(logits, alpha)

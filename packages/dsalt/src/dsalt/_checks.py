"""Is the input legal? The first lines of every public function."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared_kernels import checks


def hidden(name: str, x: Any, width: int, layer: nn.Module, dims: int | None = 3) -> None:
    """Hidden states (B, N, width), or (..., width) with dims=None, that fit the weight of a layer.

    A layer whose weight is not of a floating type, or no tensor (a quantised one), casts by itself.
    """
    checks.floating(name, x)
    if x.shape[-1:] != (width,) or (dims is not None and x.dim() != dims):
        letters = "..." if dims is None else "B, N"
        checks.fail(name, f"have shape ({letters}, d_model={width})", tuple(x.shape))
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype == x.dtype:
        return
    if not torch.is_autocast_enabled(x.device.type):
        checks.fail(
            name,
            f"have the dtype of the layer's weights, {weight.dtype}",
            str(x.dtype),
            f"cast one of the two ({name}.to({weight.dtype}) or layer.to({x.dtype})), or call the "
            "layer under torch.autocast",
            TypeError,
        )


def windows(x: Any, shape: tuple[int, ...] | None = None) -> None:
    checks.tensor("window_sizes", x)
    checks.dense("window_sizes", x)
    if x.dtype == torch.bool or x.is_complex():
        checks.fail("window_sizes", "be integer or floating", str(x.dtype), error=TypeError)
    if x.dim() != 3 or (shape is not None and x.shape != shape):
        spelled = "(B, H, N)" if shape is None else "(B={}, H={}, N={})".format(*shape)
        checks.fail("window_sizes", f"have shape {spelled}", tuple(x.shape))
    if not checks.reads_values(x) or x.numel() == 0:
        return
    low, high = x.detach().aminmax()
    if not (low >= 0 and math.isfinite(float(high))):
        checks.fail("window_sizes", "be finite and >= 0", f"values from {low} to {high}")


def scale(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        checks.fail("scale", "be a number", type(value).__name__, error=TypeError)
    if not math.isfinite(value):
        checks.fail("scale", "be finite", value)


def normalizer(value: Any) -> None:
    if not callable(value):
        checks.fail(
            "normalizer", "be a callable (scores, dim) -> weights", repr(value), error=TypeError
        )


def ramp(value: Any) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < float(value) < math.inf:
        checks.fail(
            "window_ramp", "be a finite number > 0", repr(value), "integer windows are hard-edged"
        )


def prefix(landmark_prefix: Any, causal: bool, cached: bool) -> None:
    if landmark_prefix is None:
        return
    checks.positive_int("landmark_prefix", landmark_prefix)
    if causal:
        checks.fail("landmark_prefix", "come with landmark_mode='global'", "'block_causal'")
    if cached:
        checks.fail("landmark_prefix", "be None with past_key_value", landmark_prefix)


def energy(X: Tensor, WV: Tensor, alpha: Any) -> None:
    checks.floating("X", X)
    checks.shape("X", X, (None, None, None), "(B, N, d)")
    checks.floating("WV", WV)
    checks.shape("WV", WV, (None, X.shape[-1], None), lambda: f"(H, d={X.shape[-1]}, D)")
    checks.same_device(X=X, WV=WV)
    mixing(alpha, WV.shape[0])


def mixing(alpha: Any, H: int) -> None:
    checks.floating("alpha", alpha)
    if alpha.dim() > 1 or (alpha.dim() == 1 and alpha.shape[0] != H):
        checks.fail("alpha", f"have shape () or (H={H},)", tuple(alpha.shape))
    if checks.reads_values(alpha) and not bool(((alpha >= 0) & (alpha <= 1)).all()):
        checks.fail("alpha", "be in [0, 1]", alpha.tolist())


def selection(scores: Any, k: Any, n_sink: Any) -> None:
    checks.floating("scores", scores)
    checks.shape("scores", scores, (None, None, None), "(B, H, N)")
    count("k", k)
    count("n_sink", n_sink)


def count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        checks.fail(name, "be an int", type(value).__name__, error=TypeError)
    if int(value) < 0:
        checks.fail(name, "be >= 0", value)


def with_group(refused: Mapping[str, object], causal: bool = True) -> None:
    """What sequences that are split over ranks cannot have, by name."""
    for name, value in refused.items():
        if value is not None:
            checks.fail(
                name,
                "not come with `group`",
                "both",
                "sequences that are split over ranks are packed or of one length, without a cache",
                NotImplementedError,
            )
    if not causal:
        checks.fail(
            "landmark_mode",
            "be 'block_causal' with `group`",
            "'global'",
            error=NotImplementedError,
        )

"""Device functions: weights from a threshold that stays exact near softmax and for large scores.

The threshold of a row is kept as theta = (tau + 1) / s, in units of the score, above the row's
largest score, top:

    weight = [1 + s (score - top - theta)]_+ ** p,    p = 1 / s

so that rounding is relative to the distance from the largest score, for every s and however large
the scores are; as s -> 0 it is exp(score - top - theta), and theta is a log-sum-exp.
"""

import triton
import triton.language as tl

from shared_kernels.triton import math, threshold

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below this s the weights equal those of softmax to rounding.
SMALLEST_S = tl.constexpr(2.0**-20)
SMALLEST_S_WIDE = tl.constexpr(2.0**-40)  # for fp64


@triton.jit
def exponent(alpha):
    """s = alpha - 1, not below the smallest that can be told from 0."""
    if alpha.dtype == tl.float64:
        return tl.maximum(alpha - 1.0, SMALLEST_S_WIDE)
    else:
        return tl.maximum(alpha - 1.0, SMALLEST_S)


@triton.jit
def log2_1p(t, FAST: tl.constexpr):
    """log2(1 + t) with the relative precision of t; -inf where 1 + t <= 0."""
    w = 1.0 + t
    exact = w - 1.0
    # log(w) t / (w - 1): the rounding errors of w cancel.
    ratio = tl.where(exact == 0.0, 1.0, t / tl.where(exact == 0.0, 1.0, exact))
    linear = t * LOG2_E
    near = tl.where(exact == 0.0, linear, math.log2(tl.maximum(w, 1e-30), FAST) * ratio)
    return tl.where(w <= 0.0, float("-inf"), near)


@triton.jit
def weight_pair(b_s, b_top, b_theta, s, p, unit, P: tl.constexpr, FAST: tl.constexpr):
    """(u^(p-1), u^p) with u = [1 + s (unit (b_s - top) - theta)]_+: shares of G and of F.

    b_s - top has no rounding error: both are as `factor` made them (see :func:`.problem.units_of`).
    """
    b_x = b_s - b_top
    if P > 0:
        # s is not small: rounding 1 - s theta, once for a row, is like rounding theta.
        b_u = math.relu(b_x * (unit * s) + (1.0 - s * b_theta))
        return threshold.weight_pair(b_u, p, P, FAST)
    else:
        t = b_x * (unit * s) - s * b_theta
        log_u = log2_1p(t, FAST)
        # A NaN score is neither above nor below: it stays.
        y = tl.where(t <= -1.0, 0.0, tl.exp2(p * log_u))
        g = tl.where(t <= -1.0, 0.0, tl.exp2((p - 1.0) * log_u))
        return g, y


@triton.jit
def theta_step(b_F, b_G, s, p, P: tl.constexpr):
    """The Newton step of theta from F = sum u^p and G = sum u^(p-1); 0 for a dead row."""
    if P > 0:
        return threshold.newton_update(b_F, b_G, p, P) / s
    else:
        a = s * LN_2 * tl.log2(tl.maximum(b_F, 1.0))
        small = a * (1.0 - a * (0.5 - a * (1.0 / 6.0 - a * (1.0 / 24.0))))
        step = b_F * tl.where(a < 0.1, small, 1.0 - tl.exp2(-a * LOG2_E))
        return tl.where(b_G == 0.0, 0.0, step / (s * tl.where(b_G == 0.0, 1.0, b_G)))

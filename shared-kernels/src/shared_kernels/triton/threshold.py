"""The threshold of sparse weights, on a chip: weights = [s x - tau]_+^p, p = 1/s, summing to 1.

With u = [s x - tau]_+, F = sum u^p and G = sum u^(p-1), Newton on the p-norm,
tau <- tau + (F - F^(1 - 1/p)) / G, rises monotonically from any lower bound to the root.

P says p when it is one of the integers 1, 2, 3, 4 (s = 1, 1/2, 1/3, 1/4), whose powers are
multiplications and square roots; P = 0 is any real p >= 1 given at run time. A launcher passes
``P=threshold.integer_exponent(s)``.
"""

import triton
import triton.language as tl

from .math import power, relu


def integer_exponent(s: float) -> int:
    """1/s when that is 1, 2, 3 or 4 to within rounding of fp32, else 0."""
    for p in (1, 2, 3, 4):
        if abs(s * p - 1.0) < 1e-7:
            return p
    return 0


@triton.jit
def weight_pair(u, p, P: tl.constexpr, FAST: tl.constexpr = False):
    """(u^(p-1), u^p) for u >= 0 fp32: one entry's shares of G and of F. 0 at u = 0."""
    if P == 1:
        w = tl.where(u <= 0.0, 0.0, 1.0 + 0.0 * u)  # the indicator, NaN at NaN
        return w, u
    elif P == 2:
        return u, u * u
    elif P == 3:
        w = u * u
        return w, w * u
    elif P == 4:
        w = u * u * u
        return w, w * u
    else:
        w = power(u, p - 1.0, FAST)
        return w, w * u


@triton.jit
def weights(x, tau, p, P: tl.constexpr, FAST: tl.constexpr = False):
    """(u^(p-1), u^p) of u = [x - tau]_+; x the scores already times s, tau broadcastable."""
    return weight_pair(relu(x - tau), p, P, FAST)


@triton.jit
def norm_power(F, p, P: tl.constexpr):
    """F^(1 - 1/p) for F >= 0; 0 at F = 0 (also for p = 1)."""
    if P == 1:
        return tl.where(F <= 0.0, 0.0, 1.0 + 0.0 * F)
    elif P == 2:
        return tl.sqrt(F)
    elif P == 4:
        r = tl.sqrt(F)
        return r * tl.sqrt(r)
    elif P == 3:
        return power(F, 2.0 / 3.0)
    else:
        return power(F, 1.0 - 1.0 / p)


@triton.jit
def newton_update(F, G, p, P: tl.constexpr):
    """The step (F - F^(1 - 1/p)) / G to add to tau; 0 where nothing is above tau (G = 0).

    F, G: sums of `weight_pair` over the row, fp32, any shape. p: run-time fp32, read when P = 0.
    """
    step = (F - norm_power(F, p, P)) / tl.where(G == 0.0, 1.0, G)
    return tl.where(G == 0.0, 0.0, step)

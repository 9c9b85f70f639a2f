"""The threshold of sparse weights, on a chip: weights = [s x - tau]_+^p, p = 1/s, summing to 1.

With u = [s x - tau]_+, F = sum u^p and G = sum u^(p-1), Newton on the p-norm,
tau <- tau + (F - F^(1 - 1/p)) / G, rises monotonically from any lower bound to the root.

P says p when it is one of the integers 1, 2, 3, 4 (s = 1, 1/2, 1/3, 1/4), whose powers are
multiplications and square roots; P = 0 is any real p >= 1 given at run time. A launcher passes
``P=threshold.integer_exponent(s)``.
"""

import triton
import triton.language as tl

from .math import TINY, log2, power


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


@triton.jit
def phi_series(u):
    """phi(u) = (e^u - 1 - u) / u^2 = sum_k u^k / (k + 2)! for 0 <= u <= 1/2, exact at u = 0."""
    phi = 1.0 / 39916800.0 + 0.0 * u
    if u.dtype == tl.float64:
        phi = 1.0 / 1307674368000.0 + 0.0 * u
        phi = phi * u + 1.0 / 87178291200.0
        phi = phi * u + 1.0 / 6227020800.0
        phi = phi * u + 1.0 / 479001600.0
        phi = phi * u + 1.0 / 39916800.0
    phi = phi * u + 1.0 / 3628800.0
    phi = phi * u + 1.0 / 362880.0
    phi = phi * u + 1.0 / 40320.0
    phi = phi * u + 1.0 / 5040.0
    phi = phi * u + 1.0 / 720.0
    phi = phi * u + 1.0 / 120.0
    phi = phi * u + 1.0 / 24.0
    phi = phi * u + 1.0 / 6.0
    return phi * u + 0.5


@triton.jit
def curvature(y, g, s, FAST: tl.constexpr = False):
    """h = (g - y + s y ln y) / s^2 = y ln^2(y) phi(-s ln y) of a weight y, with g = y^(1-s).

    -h is the derivative of a weight in s at a fixed threshold of the scores. The difference
    cancels where -s ln y is small; the series does not, down to s = 0.
    """
    # below the first normal number a logarithm may see 0
    normal = y if y.dtype == tl.float64 else tl.maximum(y, TINY)
    ln_y = log2(tl.where(y <= 0.0, 1.0, normal), FAST) * 0.6931471805599453
    u = -s * ln_y
    near = y * ln_y * ln_y * phi_series(tl.minimum(u, 0.5))
    far = (g - y - y * u) / (s * s)
    return tl.where(y <= 0.0, 0.0, tl.where(u < 0.5, near, far))

"""[c + v]_+ ** (1/s) of whole rows in plain PyTorch: what `qexp` evaluates at each step."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["LOG1P_BELOW", "Power", "least", "log2", "phi", "phi_series", "phi_slope", "real_power"]

# Below this s the weights are computed as exp(log1p(.) / s): the rounding error of log is 1/s ulp.
LOG1P_BELOW = 0.03


@dataclass(frozen=True)
class Power:
    """How [c + v]_+ ** (1/s) is evaluated: s for all rows, or a column with one s per row.

    "integer" multiplies, "log" is exp(log(c + v) / s), "log1p" is the same with c stored less 1,
    because for small s the base is 1 - O(s) and its rounding error grows by 1/s.
    """

    s: float | Tensor
    kind: str  # "integer" | "log" | "log1p"
    floor: float  # weights below exp(floor) are exact zeros
    n: int = 0  # p when it is an integer
    is_smooth: bool = False  # p >= 3 in every row: the weights have a second derivative

    @property
    def start(self) -> float:
        """c of tau = max(s x) - 1, the Newton start."""
        return 0.0 if self.kind == "log1p" else 1.0

    @property
    def p(self) -> float | Tensor:
        return self.n if self.kind == "integer" else 1 / self.s

    def rows(self, which: slice | Tensor) -> Power:
        if isinstance(self.s, Tensor):
            return Power(self.s[which], self.kind, self.floor, 0, self.is_smooth)
        return self

    @property
    def is_approached(self) -> bool:
        """A real p, one for all rows, that integers lie close to: see `_approach`."""
        return self.kind == "log" and isinstance(self.s, float) and self.s >= 0.05

    def step(self, F: Tensor, G: Tensor) -> Tensor:
        """(F - F^(1-s)) / G without cancellation at F -> 1 or s -> 0."""
        return torch.expm1(F.log().mul_(self.s).neg_()).mul_(F).neg_().div_(G)

    def evaluate(
        self, v: Tensor, c: Tensor, w: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w = [c + v]_+ ** p, g = [c + v]_+ ** (p - 1), in the two buffers, and their row sums.

        For p = 2 both are [c + v]_+; weights of about exp(floor) stand for 0 until `finish`.
        """
        if self.n == 2:
            torch.add(v, c, out=w).clamp_(min=0)
            norm = torch.linalg.vector_norm(w, 2, -1, keepdim=True)
            return w, w, norm.square_(), w.sum(-1, keepdim=True)
        if self.kind == "integer":
            low = math.exp(self.s * self.floor) if self.is_smooth else 0.0
            torch.add(v, c, out=w).clamp_(min=low)
            _integer_power(w, self.n - 1, out=g)
            w.mul_(g)
        elif self.kind == "log1p":
            torch.add(v, c, out=g).clamp_(min=self._low(torch.expm1, math.expm1))
            torch.log1p(g, out=w).mul_(self.p).exp_()
            torch.div(w, g.add_(1), out=g)
        else:
            torch.add(v, c, out=w).clamp_(min=self._low(torch.exp, math.exp))
            if isinstance(self.s, float) and self.s <= 0.5:  # g is nothing where w is nothing
                real_power(w, self.p - 1, out=g)
                w.mul_(g)
            else:
                torch.threshold_(real_power(w, self.p, out=g), self._nothing, 0.0)
                torch.div(g, w, out=w)
                w, g = g, w
        return w, g, w.sum(-1, keepdim=True), g.sum(-1, keepdim=True)

    def _low(
        self, of_tensor: Callable[[Tensor], Tensor], of_float: Callable[[float], float]
    ) -> Tensor | float:
        """The base whose weight is exp(floor): smaller ones are slow to exponentiate."""
        low = self.s * self.floor
        return of_tensor(low) if isinstance(low, Tensor) else of_float(low)

    @property
    def _nothing(self) -> float:
        return 3.0 * math.exp(self.floor)

    def finish(
        self, w: Tensor, g: Tensor, F: Tensor, G: Tensor, step: Tensor | None, spare: Tensor
    ) -> Tensor:
        """The weights at c - step in w; for s <= 1/3 to third order in step, else to first."""
        if self.n == 2:
            return (w if step is None else w.sub_(step).clamp_(min=0)).square_()
        is_steep = self.s > 0.5 if isinstance(self.s, float) else not self.is_smooth
        if step is not None and is_steep:
            w.addcmul_(g, step * self.p, value=-1)
        elif step is not None:
            # Of f = F^s, which Newton's step takes for a line: f''/f' = (p - 1) (H/G - G/F) with
            # H = sum [c + v]^(p-2). With one s per row a weight can be 0 already.
            bottom = w.clamp(min=least(w.dtype)) if isinstance(self.s, Tensor) else w
            r = torch.div(g, bottom, out=spare)
            H = g.mul_(r).sum(-1, keepdim=True)
            step.addcmul_(step.square(), (H / G).sub_(G / F).mul_((self.p - 1) / 2))
            # w (1 - r + (1-s)/2 r^2 - (1-s)(1-2s)/6 r^3), r = p step / [c + v]: below 0 where the
            # weight is 0, which is where r >= p, if p >= 3. Else to first order, 0 from r = 1.
            r.mul_(step * self.p).clamp_(-1, 3 if self.is_smooth else 1)
            if self.is_smooth:
                q = torch.mul(r, (1 - 2 * self.s) * (self.s - 1) / 6, out=g)
                w.addcmul_(w, q.add_((1 - self.s) / 2).mul_(r).sub_(1).mul_(r))
            else:
                w.addcmul_(w, r, value=-1)
        return torch.threshold_(w, self._nothing, 0.0)


def _integer_power(t: Tensor, n: int, out: Tensor) -> Tensor:
    """t ** n by multiplications only; t ** 0 is 1 on the support and 0 outside it."""
    if n == 0:
        return torch.gt(t, 0, out=out)
    bits = bin(n)[3:]
    if not bits:
        return out.copy_(t)
    torch.mul(t, t, out=out)
    if bits[0] == "1":
        out.mul_(t)
    for bit in bits[1:]:
        out.mul_(out)
        if bit == "1":
            out.mul_(t)
    return out


@functools.cache
def _numpy_is_faster() -> bool:
    """For AVX-512 on Linux NumPy brings its own log2 and exp2: 0.47 ns a number, PyTorch's 1.3."""
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def log2(t: Tensor, out: Tensor) -> Tensor:
    """log2(t) for t > 0; 0 is slow."""
    if t.device.type != "cpu" or not _numpy_is_faster():
        return torch.log2(t, out=out)
    with np.errstate(all="ignore"):
        np.log2(t.numpy(), out=out.numpy())
    return out


def real_power(t: Tensor, exponent: float | Tensor, out: Tensor) -> Tensor:
    """t ** exponent for t > 0; slow where it underflows."""
    if t.device.type != "cpu" or not _numpy_is_faster():
        # not torch.exp2: its bits depend on a number's place in the tensor
        return torch.log(t, out=out).mul_(exponent).exp_()
    numbers = out.numpy()
    with np.errstate(all="ignore"):
        np.log2(t.numpy(), out=numbers)
        out.mul_(exponent)
        np.exp2(numbers, out=numbers)
    return out


def least(dtype: torch.dtype) -> float:
    """Where logarithms start: that of a denormal number takes ten times as long."""
    return 1e-37 if dtype == torch.float32 else 1e-300


def phi(u: Tensor) -> Tensor:
    """phi(u) = (e^u - 1 - u) / u^2 for u >= 0, 1/2 at u = 0; differentiable."""
    large = u.clamp(min=1.0)
    far = (large.exp() - 1 - large) / large**2
    return torch.where(u < 1, phi_series(u.clamp(max=1.0), 1.0), far)


def phi_slope(u: Tensor) -> Tensor:
    """The derivative of phi: (u e^u - 2 e^u + u + 2) / u^3, 1/6 at u = 0; differentiable."""
    large = u.clamp(min=1.0)
    power = large.exp()
    far = (large * power - 2 * power + large + 2) / large**3
    near = _polynomial(u.clamp(max=1.0), [(k + 1) / math.factorial(k + 3) for k in range(20)])
    return torch.where(u < 1, near, far)


def phi_series(u: Tensor, largest: float) -> Tensor:
    """phi as sum_k u^k / (k + 2)!, exact to rounding for 0 <= u <= largest <= 1."""
    smallest, terms = torch.finfo(u.dtype).eps / 16, 1
    while largest**terms / math.factorial(terms + 2) > smallest:
        terms += 1
    return _polynomial(u, [1 / math.factorial(k + 2) for k in range(terms)])


def _polynomial(u: Tensor, coefficients: list[float]) -> Tensor:
    total = torch.full_like(u, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        if torch.is_grad_enabled():
            total = total * u + coefficient
        else:
            total.mul_(u).add_(coefficient)
    return total

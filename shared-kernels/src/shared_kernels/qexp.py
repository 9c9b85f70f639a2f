"""The threshold solver of the sparse normalisers, in plain PyTorch.

    weights_i = [s * x_i - tau]_+ ** (1 / s),    tau such that the weights of a row sum to 1

with 0 <= s <= 1: s -> 0 is softmax, s = 1/2 is 1.5-entmax, s = 1 is sparsemax. With p = 1/s,
F(tau) = sum [s x - tau]_+^p and G = sum [s x - tau]_+^(p-1), Newton's method on the p-norm

    tau <- tau + (F - F^(1 - s)) / G,    from tau = max(s x) - 1

rises monotonically to the root (F^s is convex and decreasing in tau), so it needs no bracket and
never drops a supported entry. For a real p it starts near the root, on either side of it, where
two steps with integer powers lead; a step from above lands below. Ordinary rows take 1 to 5 steps.

Two strategies. "dense" evaluates whole rows. "compact" (s >= 1/2) first solves the p = 2 problem on
the maxima of strided groups: a subset of the row and a smaller exponent both lower F, so that root
is a lower bound of tau, and every entry below it is exactly zero; only the rest is gathered and
solved. Both are exact; "auto" takes the faster one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import groups
from .qpower import LOG1P_BELOW, Power, least, log2, phi_series, real_power
from .rows import Entmax, Weights
from .rows import entmax as _entmax

__all__ = [
    "backward",
    "backward_both",
    "backward_s",
    "entmax",
    "escort_backward",
    "normalize",
    "normalize_with_escort",
    "sparsemax",
]

# Elements of a chunk: its buffers fit the cache, and the cost of a call is spread over many.
_DENSE_CHUNK = 1 << 17
_COMPACT_CHUNK = 1 << 20  # little of it is gathered
_BACKWARD_CHUNK = 1 << 18
_BACKWARD_S_CHUNK = 1 << 16  # the derivative in s holds six buffers
_COMPACT_MIN_LENGTH = 512
# A call with at most this many different values of s is solved for one value after another.
_MAX_DISTINCT_S = 32
_MIN_WIDTH = 64  # rectangles of fewer columns save nothing
# A row is solved as a whole if a larger share of its groups may hold a weight (s = 1/2 apart).
_SPARSE_SHARE, _SPARSE_SHARE_AT_HALF = 0.6, 0.35
# Rows that have not converged are solved apart once they are fewer than one in this many; a call
# with fewer entries is not split.
_ROWS_PER_LATE_ROW, _MIN_ENTRIES = 8, 1 << 15
# Where the escort distribution of rows and the sum that it was divided by are written.
_Escort = tuple[Tensor, Tensor]


def _tolerance(power: Power, dtype: torch.dtype, divide: bool) -> float:
    """Largest |F - 1| that one correction in `finish` still repairs to rounding error."""
    if power.is_smooth:  # the correction's error is d^4
        return 2e-2 if dtype == torch.float32 else 1e-5
    largest = power.s if isinstance(power.s, float) else power.s.max().item()
    steep = largest > 0.6  # p < 5/3: the correction's error is d^p, not d^2
    if dtype == torch.float64:
        return 1e-13 if steep else 1e-9
    if not divide:
        return 2e-6 if steep else 1e-5
    return 1e-5 if steep else (1e-3 if largest <= 0.5 else 1e-4)


def _approach(v: Tensor, c: Tensor, power: Power, buffers: tuple[Tensor, Tensor]) -> Tensor:
    """c near its root, on either side, by multiplications only.

    With n the next integer above p, F_n and F_(n-1), which is its G, interpolate log F_p (from
    above: it is convex in p), and p F_(n-1) / F_n is about its slope. F_n / F_(n-1) <= c, so that
    c stays within [N^(-s), 1]. Newton's method jumps from below the root to above it, not beyond 1.
    """
    n = math.ceil(power.p)
    integer = Power(1 / n, "integer", power.floor, n)
    for _ in range(2):
        _, _, F, G = integer.evaluate(v, c, *buffers)
        ratio = F / G
        log_F = torch.log(ratio).mul_(power.p - n + 1).add_(G.log())
        c = c + torch.expm1(log_F.mul_(-power.s)).mul_(ratio)
    return c


def _solve_dense(
    v: Tensor,
    c: Tensor,
    power: Power,
    n_iter: int,
    tol: float,
    divide: bool,
    buffers: tuple[Tensor, Tensor],
    out: Tensor,
    escort: _Escort | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Weights of rows v = s (x - max) <= 0 into `out`; returns the root c = s max - tau.

    v is used up. before: |F - 1| one step ago, where c is not the first.
    """
    w, g = buffers
    if before is None:
        before = torch.full_like(c, math.inf)
        if power.is_approached:
            c = _approach(v, c, power, buffers)
    is_late = torch.ones_like(c, dtype=torch.bool)
    step, late, used = None, None, 0
    while used < n_iter:
        # A row that has converged keeps its c, so that its result does not depend on other rows.
        c = c if step is None else torch.where(is_late, c - step, c)
        w, g, F, G = power.evaluate(v, c, w, g)
        used += 1
        step = power.step(F, G)
        distance = F - 1
        if power.is_approached:
            distance.abs_()
        else:  # never up: rounding must not lift an entry outside the support
            step.clamp_(min=0)
        is_late = (distance >= tol) & ((distance < before) | (distance >= 1e-4))
        before = distance
        n_late = int(is_late.sum())
        if n_late == 0:
            break
        if used < n_iter and n_late * _ROWS_PER_LATE_ROW < len(v) and v.numel() > _MIN_ENTRIES:
            late = is_late.view(-1).nonzero().squeeze(1)
            v_late, c_late, late_power = v[late], (c - step)[late], power.rows(late)
            break
    else:
        c, step = (c if step is None else c - step), None
        w, g, F, G = power.evaluate(v, c, w, g)
    w = power.finish(w, g, F, G, step, v if escort is None else escort[0])
    c = c if step is None else c - step
    scale = w.sum(-1, keepdim=True).reciprocal_() if divide else torch.ones_like(c)
    if out.dtype == w.dtype:
        torch.mul(w, scale, out=out)
    else:
        out.copy_(w.mul_(scale))
    if escort is not None:
        _write_escort(out, v, c, scale, power, escort)
    if late is not None:
        buffers = (torch.empty_like(v_late), torch.empty_like(v_late))
        p = torch.empty_like(v_late, dtype=out.dtype)
        left = n_iter - used
        late_escort = None if escort is None else (torch.empty_like(p), torch.empty_like(c_late))
        c[late] = _solve_dense(
            v_late, c_late, late_power, left, tol, divide, buffers, p, late_escort, before[late]
        )
        out[late] = p
        if escort is not None and late_escort is not None:
            escort[0][late], escort[1][late] = late_escort
    return c


def _write_escort(
    p: Tensor, v: Tensor, c: Tensor, scale: Tensor, power: Power, escort: _Escort
) -> None:
    """g = p^(1-s), divided by its row sums, and the sums; p = scale [c + v]_+ ** (1/s)."""
    g, mass = escort
    if power.n == 2 or power.is_smooth:  # g = p / [c + v] / scale^s
        torch.add(v, c + (1.0 - power.start), out=g).clamp_(min=torch.finfo(g.dtype).eps)
        torch.div(p, g, out=g)
        unit = scale.log().mul_(-power.s).exp_()
    else:
        _support_power(p, power.s, out=g)
        unit = torch.ones_like(scale)
    torch.mul(g.sum(-1, keepdim=True), unit, out=mass)
    g.mul_(unit.div_(mass.clamp(min=least(mass.dtype))))


def _solve_compact(
    x: Tensor,
    maxima: Tensor,
    m: Tensor,
    power: Power,
    n_iter: int,
    tol: float,
    divide: bool,
    out: Tensor,
    escort: _Escort | None,
) -> tuple[Tensor, Tensor]:
    """The root c as in `_solve_dense`, and the rows with few zeros, where it is a bound above it.

    x is filled up with -inf to whole groups; their maxima are used up. What becomes of a row, down
    to the length at which it is summed, is up to that row alone.
    """
    (n, length), N, width = x.shape, out.shape[1], maxima.shape[1]
    group, s = length // width, power.s
    # An upper bound of c: the p = 2 root on the maxima of strided groups.
    v = maxima.sub_(m).mul_(s)
    c, t = torch.ones_like(m), torch.empty_like(v)
    for _ in range(3):
        torch.add(v, c, out=t).clamp_(min=0)
        norm = torch.linalg.vector_norm(t, 2, -1, keepdim=True)
        c = c - (norm * norm - norm) / t.sum(-1, keepdim=True)
    c.add_(4 * torch.finfo(x.dtype).eps)
    del t
    is_hit = v > -c
    is_sparse = is_hit.sum(-1) <= (_SPARSE_SHARE_AT_HALF if power.n == 2 else _SPARSE_SHARE) * width
    row, flat = groups.members(is_hit.logical_and_(is_sparse.unsqueeze(1)), group)
    flat = flat.view(-1)
    v = x.reshape(-1).index_select(0, flat).view(-1, group)
    v.sub_(m.index_select(0, row)).mul_(s if isinstance(s, float) else s.index_select(0, row))
    keep = (v > -c.index_select(0, row)).view(-1).nonzero().squeeze(1)
    v, flat = v.view(-1).index_select(0, keep), flat.index_select(0, keep).long()
    row = row.index_select(0, torch.div(keep, group, rounding_mode="floor"))
    del is_hit, keep
    count = torch.bincount(row, minlength=n)
    is_sparse &= count <= 0.6 * N
    # Rows of about as many entries are solved together, in lengths of 2^e and 3/4 of it.
    level = 1 << torch.frexp((count - 1).clamp(min=_MIN_WIDTH - 1).double()).exponent.to(count)
    level = torch.where(count <= level // 4 * 3, level // 4 * 3, level) * is_sparse
    levels = sorted(set(level.tolist()))
    full = [out] if escort is None else [out, escort[0]]
    padded = [y if y.dtype == v.dtype and length == N else v.new_empty(n, length) for y in full]
    for y in padded:
        y.zero_()
    for at in (at for at in levels if at):
        which = (level == at).nonzero().squeeze(1)
        entries, b_v, b_row, b_flat = None, v, row, flat
        if len(levels) > 1:
            entries = (level.index_select(0, row) == at).nonzero().squeeze(1)
            b_v, b_row, b_flat = (t.index_select(0, entries) for t in (v, row, flat))
        few, longest = count[which], at
        # The kept entries of each row, side by side in a rectangle.
        shift = torch.empty_like(count)
        shift[which] = groups.shifts(few, longest)
        slot = shift.index_select(0, b_row).add_(torch.arange(len(b_row), device=x.device))
        rows = v.new_full((len(which) * longest,), -4.0).index_copy_(0, slot, b_v).view(-1, longest)
        del entries, b_v, b_row
        if len(levels) == 1:
            del v, row
        w = torch.empty_like(rows)
        buffers = (torch.empty_like(rows), torch.empty_like(rows))
        g = None if escort is None else (torch.empty_like(rows), m.new_empty(len(which), 1))
        c[which] = _solve_dense(
            rows, c[which], power.rows(which), n_iter, tol, divide, buffers, w, g
        )
        for y, kept in zip(padded, [w] if g is None else [w, g[0]], strict=True):
            y.view(-1).index_copy_(0, b_flat, kept.view(-1).index_select(0, slot))
        if escort is not None and g is not None:
            escort[1][which] = g[1]
    for y, kept in zip(full, padded, strict=True):
        if y is not kept:
            y.copy_(kept[:, :N])
    return c, is_sparse.logical_not().nonzero().squeeze(1)


def _grouped(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, N), filled up with -inf to whole groups, and the maxima of its strided groups."""
    group = 8 if x.shape[1] < 2048 else 16
    x = groups.padded(x, group)
    return x, groups.maxima(x, group)


def _solve_rows(
    x: Tensor, s: float | Tensor, n_iter: int, divide: bool, strategy: str, into: list[Tensor]
) -> None:
    """Solve the rows of x (R, N) with one kind of power, chunk by chunk, into p, tau, ..."""
    dtype = into[1].dtype
    R, N = x.shape
    lowest, highest = (s, s) if isinstance(s, float) else (s.min().item(), s.max().item())
    kind, n = "log" if lowest >= LOG1P_BELOW else "log1p", 0
    if lowest == highest and lowest > 0.05 and abs(round(1 / lowest) * lowest - 1) < 1e-9:
        kind, n, s = "integer", round(1 / lowest), lowest
    power = Power(s, kind, -80.0 if dtype == torch.float32 else -600.0, n, highest < 0.33334)
    if strategy == "compact" and lowest < 0.5:
        raise ValueError(f"`strategy` 'compact' needs s >= 0.5, got s={lowest}")
    if strategy == "auto":
        strategy = "compact" if lowest >= 0.5 and N >= _COMPACT_MIN_LENGTH else "dense"
    size = _COMPACT_CHUNK if strategy == "compact" else _DENSE_CHUNK
    chunk = max(1, min(R, size // N))
    tol = _tolerance(power, dtype, divide)
    part, space = max(1, min(R, _DENSE_CHUNK // N)), None
    for start in range(0, R, chunk):
        stop = min(start + chunk, R)
        b_x, b_power = x[start:stop].to(dtype), power.rows(slice(start, stop))
        out, t, *more = b_into = [a[start:stop] for a in into]
        escort = (more[0], more[1]) if more else None
        if strategy == "compact":
            whole, maxima = _grouped(b_x)
        m = (maxima if strategy == "compact" else b_x).amax(-1, keepdim=True)
        live = m.isfinite()
        all_live = bool(live.all())
        if not all_live:  # solve a harmless row instead; the answer is written below
            b_x, m = torch.where(live, b_x, 0.0), torch.where(live, m, 0.0)
            if strategy == "compact":
                whole, maxima = _grouped(b_x)
        c, left = torch.full_like(m, power.start), None
        if strategy == "compact":
            c, left = _solve_compact(whole, maxima, m, b_power, n_iter, tol, divide, out, escort)
            left = None if len(left) == len(b_x) else left
        size = part if left is None else max(1, part // 2)  # rows that are copied
        for at in range(0, len(b_x if left is None else left), size):
            if space is None or space.shape[1] < size:
                space = torch.empty(3, size, N, dtype=dtype, device=x.device)
            rows = slice(at, at + size) if left is None else left[at : at + size]
            v, w, g = space[:, : len(m[rows])]
            torch.sub(b_x[rows], m[rows], out=v).mul_(b_power.rows(rows).s)
            of_part = [a[rows] for a in (out, *more)]  # copies of the rows that are left
            kept = (of_part[1], of_part[2]) if more else None
            c[rows] = _solve_dense(
                v, c[rows], b_power.rows(rows), n_iter, tol, divide, (w, g), of_part[0], kept
            )
            if left is not None:
                for a, solved in zip((out, *more), of_part, strict=True):
                    a[rows] = solved
        torch.sub(m * b_power.s, c.add_(1.0 - power.start), out=t)
        if not all_live:
            dead = x[start:stop].amax(-1, keepdim=True) == -math.inf
            for a in b_into:
                a.copy_(torch.where(live, a, torch.where(dead, 0.0, math.nan).to(a.dtype)))


def _check(x: Tensor, s: float | Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"`x` must be floating point, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("`x` must have at least one dimension, got a 0-d tensor")
    if not isinstance(s, Tensor) and not 0.0 <= s <= 1.0:
        raise ValueError(f"`s` must be in [0, 1], got {s}; 0 is softmax and 1 is sparsemax")


def _by_value(s: float | Tensor, x: Tensor) -> list[tuple[float, Tensor]]:
    """The few different values of s and the rows that have each; [] for a number, or for many."""
    if not isinstance(s, Tensor) or x.numel() == 0 or s.numel() == 1:
        return []
    of_rows = s.detach().double().expand(x.shape[:-1] + (1,)).reshape(-1).to(x.device)
    values = torch.unique(of_rows)
    if len(values) > _MAX_DISTINCT_S or bool(values.isnan().any()):
        return []
    return [(value, (of_rows == value).nonzero().squeeze(1)) for value in values.tolist()]


def _column(s: float | Tensor, x: Tensor, dtype: torch.dtype) -> float | Tensor:
    """s as a float or as one value per row (R, 1); zero becomes a number whose log1p is exact."""
    tiny = 2.0**-40 if dtype == torch.float32 else 2.0**-70
    if isinstance(s, Tensor) and s.numel() == 1 and s.device.type == "cpu":
        s = s.item()
    if not isinstance(s, Tensor):
        return max(float(s), tiny)
    s = s.detach().to(x.device, dtype).clamp(min=tiny)
    return s.expand(x.shape[:-1] + (1,)).reshape(-1, 1)


@torch.no_grad()
def normalize(
    x: Tensor, s: float | Tensor, n_iter: int = 40, divide: bool = True, strategy: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sparse weights [s x - tau]_+ ** (1/s) along the last dimension, and their threshold.

    Args:
        x: (..., N) scores, any floating dtype. Entries of -inf get weight 0.
        s: sparsity in [0, 1], a float or a tensor that broadcasts to (..., 1): one value per row.
            A row's bits do not depend on the other rows, except through more than 32 different
            values of s in one call.
        n_iter: cap on the Newton steps.
        divide: divide by the sum at the end. Without it the sum is 1 to 1e-5 (fp32), 1e-12 (fp64).
        strategy: "auto", "dense" or "compact" (needs s >= 1/2). The result is the same.

    Returns:
        p: (..., N) in the dtype of x. A row of only -inf gives zeros; a row with NaN or +inf, NaN.
        tau: (..., 1) in units of s * x, in fp32 (fp64 for fp64); 0 for a dead row.

    Not differentiable itself: `backward` and `backward_s` are its derivatives; `entmax` uses them.
    """
    p, tau = _normalize(x, s, n_iter, divide, strategy, False)
    return p, tau


@torch.no_grad()
def normalize_with_escort(
    x: Tensor, s: float | Tensor, n_iter: int = 40, divide: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of `normalize`, and what `escort_backward` asks for. x is fp32 or fp64.

    Returns:
        p: (..., N), the same bits.
        escort: (..., N), g / sum(g) with g = p^(1-s) on the support: the escort distribution.
        mass: (..., 1), sum(g).
    """
    p, _, escort, mass = _normalize(x, s, n_iter, divide, "auto", True)
    return p, escort, mass


def _normalize(
    x: Tensor, s: float | Tensor, n_iter: int, divide: bool, strategy: str, with_escort: bool
) -> tuple[Tensor, ...]:
    _check(x, s)
    if strategy not in ("auto", "dense", "compact"):
        raise ValueError(f"`strategy` must be auto, dense or compact, got {strategy!r}")
    if n_iter < 1:
        raise ValueError(f"`n_iter` must be at least 1, got {n_iter}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    p = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tau = torch.zeros(x.shape[:-1] + (1,), dtype=dtype, device=x.device)
    found = (p, tau, torch.empty_like(p), torch.empty_like(tau)) if with_escort else (p, tau)
    if x.numel() == 0:
        return found
    rows, *into = (a.reshape(-1, a.shape[-1]) for a in (x, *found))
    of_values = _by_value(s, x)
    if len(of_values) == 1:
        s = of_values[0][0]
    elif of_values:  # each as the number that it is: its bits then owe nothing to the others
        for value, which in of_values:
            of_value = _normalize(rows[which], value, n_iter, divide, strategy, with_escort)
            for a, b in zip(into, of_value, strict=True):
                a[which] = b
        return found
    column = _column(s, x, dtype)
    if isinstance(column, float):
        _solve_rows(rows, column, n_iter, divide, strategy, into)
        return found
    low = column.view(-1) < LOG1P_BELOW
    if bool(low.all()) or not bool(low.any()):
        _solve_rows(rows, column, n_iter, divide, strategy, into)
        return found
    # Rows near softmax and the others need different arithmetic: solve the two sets apart.
    for part in (low.nonzero().squeeze(1), low.logical_not().nonzero().squeeze(1)):
        of_part = [a[part] for a in into]
        _solve_rows(rows[part], column[part], n_iter, divide, strategy, of_part)
        for a, b in zip(into, of_part, strict=True):
            a[part] = b
    return found


def _support_power(p: Tensor, s: float | Tensor, out: Tensor) -> Tensor:
    """p ** (1 - s) as p * p ** -s: exactly 0 outside the support; NaN stays."""
    torch.clamp(p, min=least(p.dtype), out=out)
    if isinstance(s, float) and s == 0.5:
        return out.rsqrt_().mul_(p)
    return real_power(out, -s, out=out).mul_(p)


@torch.no_grad()
def _vjp(
    dy: Tensor, p: Tensor, s: float | Tensor, wants_x: bool, wants_s: bool
) -> tuple[Tensor | None, Tensor | None]:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    dx = torch.empty(p.shape, dtype=p.dtype, device=p.device) if wants_x else None
    ds = torch.zeros(p.shape[:-1] + (1,), dtype=dtype, device=p.device) if wants_s else None
    if p.numel() == 0:
        return dx, ds
    N, R = p.shape[-1], p.numel() // p.shape[-1]
    of_values = _by_value(s, p)
    if len(of_values) == 1:
        s = of_values[0][0]
    elif of_values:
        for value, which in of_values:
            some = _vjp(dy.reshape(R, N)[which], p.reshape(R, N)[which], value, wants_x, wants_s)
            for a, b in zip((dx, ds), some, strict=True):
                if a is not None and b is not None:
                    a.view(R, -1)[which] = b
        return dx, ds
    column = _column(s, p, dtype)
    chunk = max(1, min(R, (_BACKWARD_S_CHUNK if wants_s else _BACKWARD_CHUNK) // N))
    same = dx is not None and dx.dtype == dtype
    space = torch.empty(1 if same else 2, chunk, N, dtype=dtype, device=p.device)
    p_rows, dy_rows = (a.reshape(R, N).split(chunk) for a in (p, dy))
    dx_rows = None if dx is None else dx.view(R, N).split(chunk)
    ds_rows = None if ds is None else ds.view(R, 1).split(chunk)
    for i in range(len(p_rows)):
        b_p, b_dy = p_rows[i].to(dtype), dy_rows[i].to(dtype)
        b_s = column if isinstance(column, float) else column[i * chunk : (i + 1) * chunk]
        out = None if dx_rows is None else dx_rows[i]
        t = space[0, : b_p.shape[0]]
        g = out if same and out is not None else space[1, : b_p.shape[0]]
        _support_power(b_p, b_s, out=g)
        mass = g.sum(-1, keepdim=True).clamp_(min=least(dtype))  # of a dead row it is 0
        mean = torch.mul(g, b_dy, out=t).sum(-1, keepdim=True).div_(mass)
        if ds_rows is not None:
            total = _curvature(b_p, g, b_s).mul_(b_dy - mean).sum(-1, keepdim=True)
            torch.neg(total, out=ds_rows[i])
        if out is not None:
            torch.addcmul(t, g, mean, value=-1, out=out if same else t)
            if not same:
                out.copy_(t)
    return dx, ds


def backward(dy: Tensor, p: Tensor, s: float | Tensor) -> Tensor:
    """dL/dx of `normalize` from dy = dL/dp and the divided weights p: g (dy - sum(g dy)/sum(g)).

    g = p^(1-s) on the support. Dead rows give zeros.
    """
    dx, _ = _vjp(dy, p, s, True, False)
    return dx  # type: ignore[return-value]


def escort_backward(dy: Tensor, escort: Tensor, mass: Tensor) -> Tensor:
    """`backward` from what `normalize_with_escort` kept: the derivative of softmax at `escort`."""
    return torch._softmax_backward_data(dy, escort, -1, dy.dtype).mul_(mass)


def backward_s(dy: Tensor, p: Tensor, s: float | Tensor) -> Tensor:
    """dL/ds of `normalize` per row, (..., 1), from dy = dL/dp and the divided weights p.

    -sum h (dy - mean), h = p L^2 phi(-s L), L = log p, phi(u) = (e^u - 1 - u) / u^2; the series of
    phi keeps it exact down to s = 0, where h = p L^2 / 2.
    """
    _, ds = _vjp(dy, p, s, False, True)
    return ds  # type: ignore[return-value]


def backward_both(dy: Tensor, p: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor]:
    """`backward` and `backward_s` in one pass."""
    return _vjp(dy, p, s, True, True)  # type: ignore[return-value]


def _curvature(p: Tensor, g: Tensor, s: float | Tensor) -> Tensor:
    """h = -dp/ds at a fixed threshold in x: (g - p + s p log p) / s^2 with g = p^(1-s).

    Where u = -s log p is small, that difference cancels: there h = p log^2(p) phi(u) by the series.
    """
    log_p = p.clamp(min=least(p.dtype))
    log2(log_p, out=log_p).mul_(math.log(2))
    u = log_p * -s
    small = u.clamp(max=0.5)
    series = phi_series(small, 0.5).mul_(log_p).mul_(log_p).mul_(p)
    return torch.where(u < 0.5, series, g.sub(p).addcmul_(p, u, value=-1).div_(s * s))


def entmax_forward(call: Entmax) -> tuple[Tensor, Weights]:
    """What the op `rows.entmax` and its like run."""
    y = normalize(call.x, call.s, call.n_iter)[0]
    return y, Weights(y)


def entmax_backward(
    call: Entmax, saved: Weights, dy: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    dx, ds = _vjp(dy, saved.out, call.s, "x" in needs, "alpha" in needs)
    found = {} if dx is None else {"x": dx}
    return found if ds is None else {**found, "alpha": call.d_alpha(ds)}


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """alpha-entmax along `dim`: [(alpha-1) x - tau]_+ ** (1/(alpha-1)), summing to 1.

    Args:
        x: scores of any shape and floating dtype.
        alpha: in [1, 2]; 1 is softmax, 2 is sparsemax. A tensor must broadcast against x with
            size 1 along `dim`, and receives its gradient. Twice differentiable in both.
        dim: the dimension that sums to 1.

    Example:
        >>> entmax(torch.tensor([2.0, 1.0, -1.0]), alpha=2.0)
        tensor([1., 0., 0.])
    """
    if not isinstance(alpha, Tensor):
        if not 1.0 <= alpha <= 2.0:
            raise ValueError(f"`alpha` must be in [1, 2], got {alpha}; 1 is softmax, 2 sparsemax")
        alpha = torch.full((), alpha, dtype=torch.float64)
    elif alpha.dim() > 0:
        alpha = alpha.expand(_row_shape(x, alpha, dim)).movedim(dim, -1)
    if not x.dtype.is_floating_point:
        raise TypeError(f"`x` must be floating point, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("`x` must have at least one dimension, got a 0-d tensor")
    return _entmax(x.movedim(dim, -1), alpha, 40, True).movedim(-1, dim)


def _row_shape(x: Tensor, alpha: Tensor, dim: int) -> torch.Size:
    shape = list(x.shape)
    shape[dim] = 1
    if torch.broadcast_shapes(alpha.shape, shape) != torch.Size(shape):
        raise ValueError(
            f"`alpha` must broadcast to {tuple(shape)} (size 1 along dim {dim}), "
            f"got shape {tuple(alpha.shape)}"
        )
    return torch.Size(shape)


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """The Euclidean projection of x onto the probability simplex: entmax with alpha = 2."""
    return entmax(x, 2.0, dim)

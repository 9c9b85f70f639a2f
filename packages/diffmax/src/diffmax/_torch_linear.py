"""The loss of a linear layer over a large vocabulary, in PyTorch and a backend's solver of rows.

The logits of a block of rows are made tile by tile. A subset of a row's logits has a threshold that
is a lower bound of the row's own, so that each tile shows more clearly which logits can have a
weight above zero: only they are kept, and solved at the end. Forward keeps the support of each row
(columns and weights); backward is two sparse products.

A row whose support is long, by a look at some of its logits or by the search, is taken as a whole.
Its gradient is made together with the loss where the caller has room for it (``at_once``), which
pays where many rows are like that; else its logits are made a second time.

What becomes of a row, and every bit of its loss and of its gradient in hidden, is decided by the
row alone: products have a fixed number of rows, zeros where there are fewer, since a matrix library
rounds by the shape of its operands, and the search treats each row as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_kernels import groups, qexp
from shared_kernels.qpower import least
from shared_kernels.rows import wide

from . import _checks
from ._call import LinearLoss, Support
from ._entropy import entropy, entropy_slope, missing

_ROWS = 256  # rows of a block
_TILE = 1 << 20  # logits of a tile
_SOLVED_LOGITS = 1 << 19  # logits that are solved at once where rows are taken as a whole
_MULTIPLIED_LOGITS = 1 << 23  # logits that are multiplied at once there
_MIN_CLASSES = 4096  # rows of a smaller vocabulary are taken as a whole
_WHOLE_ROWS = 128  # the most rows that are multiplied at once there
_AVERAGED_ROWS = 16  # rows whose logits are averaged at once
_SAMPLED_COLUMNS = 2048  # columns that tell whether a row's support is long
_GROUP = 16  # strided groups whose maxima bound the threshold
_KEPT_MAXIMA = 128  # how many of the largest of those maxima are kept from tile to tile
_MAX_SHARE = 1 / 16  # of groups above the bound; a row with more has a better bound computed
_GRADIENT_BLOCK = 1 << 22  # elements of the gradient of the weights that are computed at once


# (R, L) logits and s to the weights of each row
Solver = Callable[[Tensor, "float | Tensor"], Tensor]


def by_newton(x: Tensor, s: float | Tensor) -> Tensor:
    return qexp.normalize(x, s, 50)[0]


class Routines(NamedTuple):
    """How a backend finds the logits of rows that may have a weight, and solves rows."""

    search: Callable[[LinearLoss, Shard, Tensor], Found]
    solve: Solver
    rows: int = _ROWS  # how many rows the search takes at once


class Shard(NamedTuple):
    """Which part of the vocabulary is here, and how sums over all of it are made."""

    first: int
    total: int
    group: str

    @classmethod
    def of(cls, call: LinearLoss) -> Shard:
        V = call.weight.shape[0]
        if not call.group:
            return cls(0, V, "")
        import torch.distributed as dist

        name: Any = call.group  # torch 2.7 takes a str, later ones a type of their own
        process_group = dist.distributed_c10d._resolve_process_group(name)
        rank = dist.get_rank(process_group)
        n, where = dist.get_world_size(process_group), call.weight.device
        sizes = torch.zeros(n, dtype=torch.float64, device=where)
        sizes[rank] = V
        sizes = cls(0, V, call.group).sum(sizes)
        return cls(int(sizes[:rank].sum()), int(sizes.sum()), call.group)

    def sum(self, x: Tensor, op: str = "sum") -> Tensor:
        if not self.group:
            return x
        found = torch.ops._c10d_functional.all_reduce(x.contiguous(), op, self.group)
        total: Tensor = torch.ops._c10d_functional.wait_tensor(found)
        return total

    def largest(self, x: Tensor) -> Tensor:
        """The largest over all shards, NaN where it is NaN on any of them.

        gloo's largest of a NaN and a number is one or the other by rank, so which are NaN is asked
        beside it.
        """
        if not self.group:
            return x
        is_nan = x.isnan()
        largest, is_nan_anywhere = self.sum(
            torch.stack((x.masked_fill(is_nan, 0.0), is_nan.to(x.dtype))), "max"
        )
        return torch.where(is_nan_anywhere > 0, torch.nan, largest)

    def local(self, target: Tensor, V: int) -> tuple[Tensor, Tensor]:
        """Columns of the targets that are here, and which ones those are."""
        column = target - self.first
        is_here = (target >= 0) & (column >= 0) & (column < V)
        return torch.where(is_here, column, 0), is_here


def looks_long(call: LinearLoss, hidden: Tensor, target: Tensor) -> Tensor:
    """Which rows probably have more weights above zero than lists keep: (R,) bool.

    The threshold is that of some columns, each of which stands for its neighbours, and of the
    targets. It decides how a row's numbers are made, and so on their last bits: by the row alone.
    """
    V, R = call.weight.shape[0], len(hidden)
    is_every_column = call.softcap is not None and bool(call.label_smoothing)
    if is_every_column or (V < _MIN_CLASSES and not call.group):
        return torch.ones(R, dtype=torch.bool, device=hidden.device)
    if call.group:  # no rank alone sees enough of the vocabulary
        return torch.zeros(R, dtype=torch.bool, device=hidden.device)
    stride = max(1, V // _SAMPLED_COLUMNS)
    some = torch.arange(stride // 2, V, stride, device=hidden.device)
    count = [target.new_zeros(0, dtype=hidden.dtype)]
    for rows in torch.arange(R, device=hidden.device).split(_ROWS):
        x = _logits(call, hidden[rows], some, _ROWS)
        column = target[rows].clamp(min=0)
        of_target = (hidden[rows].unsqueeze(1).to(x.dtype) * call.weight[column]).sum(-1)
        if call.bias is not None:
            of_target = of_target + call.bias[column]
        of_target = torch.where(target[rows] < 0, -torch.inf, _capped(of_target, call.softcap))
        x = torch.cat((x, of_target), 1)
        times = torch.full_like(x[:1], V / len(some))
        times[:, len(some) :] = 1.0
        v = (x - x.amax(-1, keepdim=True)).mul_(call.s)
        c = _threshold(v, 1 / call.s, 8, times)
        count.append((v + c > 0).to(x.dtype).mul_(times).sum(-1))
    return torch.cat(count) > 0.7 * call.capacity  # a search in vain costs more than a dense row


def linear_loss(call: LinearLoss, routines: Routines | None = None) -> tuple[Tensor, Support]:
    """The loss, and what its gradient wants. `routines` are those of a backend."""
    find, solver, height = routines or TORCH
    shard, saved = Shard.of(call), Support.empty(call)
    _check_target(call, shard)
    counted = (call.target >= 0).any(-1)
    rows = counted.nonzero().squeeze(1)
    losses = saved.d_alpha.new_zeros(len(counted), dtype=torch.float64)
    is_whole = looks_long(call, call.hidden[rows], call.target[rows])
    whole, used = [rows[is_whole]], 0
    for block in _blocks(rows[~is_whole], height):
        found = find(call, shard, block)
        p = _solve(found.x, call.s, shard, solver)
        support = p > 0
        count = support.sum(-1)
        is_long = found.is_long | (count > call.capacity)
        is_long = shard.sum(is_long.double()) > 0
        if bool(is_long.any()):
            whole.append(block[is_long])
            block, found, p, support, count = (
                block[~is_long],
                found.rows(~is_long),
                p[~is_long],
                support[~is_long],
                count[~is_long],
            )
        losses[block] = _losses(call, shard, block, found, p, saved)
        if not call.save:
            continue
        saved.sizes[block] = count
        new = slice(used, used + int(count.sum()))
        saved.keys[new] = found.keys[support]
        saved.weights[new] = p[support]
        if call.softcap is not None:
            saved.weights[new] *= _slope(found.x[support], call.softcap)
        used = new.stop
    rows = torch.cat(whole)
    if call.save:
        saved.sizes[rows] = -1
    for block in _blocks(rows, _rows_multiplied_at_once(shard)):
        gap = _gradient_in_logits(call, shard, solver, block, saved, losses)
        if call.at_once and call.save:
            one = gap.new_ones(len(block), 1)
            _add_products(call, block, gap, one, saved.d_hidden, saved.d_weight, saved.d_bias)
    losses = losses.to(wide(call.hidden))
    if call.reduction == "none":
        return losses, saved
    total = losses.sum()
    return (total / counted.sum() if call.reduction == "mean" else total), saved


def linear_loss_backward(
    call: LinearLoss,
    saved: Support,
    g: Tensor,
    needs: frozenset[str],
    routines: Routines | None = None,
) -> dict[str, Tensor]:
    solver = (routines or TORCH).solve
    hidden, weight = call.hidden, call.weight
    dtype, (N, _), V = wide(hidden), hidden.shape, weight.shape[0]
    counted = (call.target >= 0).any(-1)
    found = {}
    if call.reduction == "mean":
        g = g / counted.sum()
    of_all = g.to(dtype)
    g = torch.where(counted, of_all, 0.0)
    if "alpha" in needs:
        d_alpha = (g.double() * saved.d_alpha).sum()
        found["alpha"] = d_alpha.reshape(call.alpha.shape).to(call.alpha.device, call.alpha.dtype)
    if not needs - {"alpha"}:
        return found
    is_whole = saved.sizes < 0
    if call.at_once and bool((is_whole | ~counted).all()):
        for field in needs - {"alpha"}:
            scale = g.unsqueeze(1) if field == "hidden" else of_all
            found[field] = (getattr(saved, f"d_{field}") * scale).to(getattr(call, field).dtype)
        return found
    shard = Shard.of(call)
    count = saved.sizes.clamp(min=0)
    used = int(count.sum())
    row = torch.arange(N, device=g.device, dtype=torch.int32).repeat_interleave(count)
    # a target is one more entry of its row
    column, is_here = shard.local(call.target, V)
    is_here &= (saved.sizes >= 0).unsqueeze(1)
    y = torch.where(is_here, saved.slope, 0.0)
    value, keys = saved.weights[:used], saved.keys[:used]
    even = torch.where(is_whole, 0.0, g.new_tensor(-call.label_smoothing / shard.total))
    even = even.unsqueeze(1)  # of label smoothing
    d_hidden = d_weight = d_bias = None
    if "hidden" in needs:
        # for a loss of 1 in each row, so that a row's bits are those that `at_once` gives
        start = count.cumsum(0) - count
        d_hidden = _bags(weight, keys, start.to(keys.dtype), value)
        d_hidden -= _bags(weight, column, None, y)
        if call.label_smoothing:
            d_hidden += even * weight.sum(0, dtype=dtype)
    if needs & {"weight", "bias"}:
        here = is_here.nonzero()
        lists = (keys, row, value * g.index_select(0, row))
        of_target = -(y * g.unsqueeze(1))[is_here]
        targets = (column[is_here].to(keys.dtype), here[:, 0].to(row.dtype), of_target)
        parts = (lists, targets)
        d_weight, d_bias = _by_column(call, parts, "weight" in needs, "bias" in needs)
        even = even * g.unsqueeze(1)
        if call.label_smoothing and d_weight is not None:
            d_weight += (even * hidden).sum(0, dtype=dtype)
        if call.label_smoothing and d_bias is not None:
            d_bias += even.sum()
    if call.at_once:
        if d_hidden is not None:
            d_hidden = torch.where(is_whole.unsqueeze(1), saved.d_hidden, d_hidden)
        if d_weight is not None:
            d_weight.addcmul_(saved.d_weight, of_all)
        if d_bias is not None:
            d_bias.addcmul_(saved.d_bias, of_all)
    else:
        for block in _blocks(is_whole.nonzero().squeeze(1), _rows_multiplied_at_once(shard)):
            gap = _gradient_in_logits(call, shard, solver, block)
            _add_products(call, block, gap, g[block].unsqueeze(1), d_hidden, d_weight, d_bias)
    if d_hidden is not None:
        d_hidden *= g.unsqueeze(1)
        found["hidden"] = shard.sum(d_hidden).to(hidden.dtype)
    if d_weight is not None:
        found["weight"] = d_weight.to(weight.dtype)
    if d_bias is not None and call.bias is not None:
        found["bias"] = d_bias.to(call.bias.dtype)
    return found


def _check_target(call: LinearLoss, shard: Shard) -> None:
    """Classes of a vocabulary that is spread over ranks, whose size is known here alone."""
    if shard.group:
        _checks.classes(call.target, -1, shard.total)


class Found(NamedTuple):
    """Logits of some rows that may have a weight, and what the loss wants of all the others."""

    x: Tensor  # (R, L); -inf where there is none
    keys: Tensor  # (R, L) int32, their columns; empty where they are all columns
    top: Tensor  # (R,) the largest, of the whole vocabulary
    of_target: Tensor  # (R, K), of those that are here
    # (R,) fp64, the sum of what all that are here have beside `top`, divided by the vocabulary's
    # size, where labels are smoothed
    mean: Tensor
    is_long: Tensor  # (R,) whether some were left out

    def rows(self, which: Tensor | slice) -> Found:
        return Found(*(t[which] for t in self))


def _product(x: Tensor, matrix: Tensor, height: int, bias: Tensor | None = None) -> Tensor:
    """x @ matrix.T + bias of at most `height` rows, multiplied as so many: the others are zeros."""
    R = len(x)
    if R < height:
        x = torch.cat((x, x.new_zeros(height - R, x.shape[1])))
    return F.linear(x, matrix, bias)[:R]


def _logits(call: LinearLoss, hidden: Tensor, columns: slice | Tensor, height: int) -> Tensor:
    bias = None if call.bias is None else call.bias[columns]
    x = _product(hidden, call.weight[columns], height, bias)
    return _capped(x.to(wide(hidden)), call.softcap)


def _capped(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else (x / softcap).tanh_().mul_(softcap)


def _blocks(rows: Tensor, height: int) -> tuple[Tensor, ...]:
    return rows.split(height) if len(rows) else ()


def _rows_solved_at_once(shard: Shard) -> int:
    """How many of the rows that are taken as a whole: it depends on the vocabulary alone."""
    return max(1, min(_WHOLE_ROWS, _SOLVED_LOGITS // shard.total))


def _rows_multiplied_at_once(shard: Shard) -> int:
    """How many of these rows: a multiple of those that are solved at once."""
    step = _rows_solved_at_once(shard)
    return max(1, min(_WHOLE_ROWS, _MULTIPLIED_LOGITS // shard.total) // step) * step


def _slope(x: Tensor, softcap: float) -> Tensor:
    """The derivative of softcap * tanh(z / softcap), from its value x."""
    return 1 - (x / softcap).square_()


def search(call: LinearLoss, shard: Shard, rows: Tensor) -> Found:
    """The logits of rows that may lie above the threshold, tile by tile."""
    hidden, V, R = call.hidden[rows], call.weight.shape[0], len(rows)
    device, dtype = hidden.device, wide(hidden)
    width = max(_GROUP, _TILE // _ROWS // _GROUP * _GROUP)
    room = min(V, 2 * call.capacity)
    kept = torch.full((R, room), -torch.inf, dtype=dtype, device=device)
    keys = torch.zeros(R, room, dtype=torch.int32, device=device)
    count = torch.zeros(R, dtype=torch.int64, device=device)
    is_long = torch.zeros(R, dtype=torch.bool, device=device)
    best = torch.empty(R, 0, dtype=dtype, device=device)
    top = torch.full((R,), -torch.inf, dtype=dtype, device=device)
    low = torch.full((R, 1), -torch.inf, dtype=dtype, device=device)
    column, is_here = shard.local(call.target[rows], V)
    of_target = torch.zeros(column.shape, dtype=dtype, device=device)
    mean = torch.zeros(R, dtype=torch.float64, device=device)
    beside = top
    for first in range(0, V, width):
        x = _logits(call, hidden, slice(first, first + width), _ROWS)
        n = x.shape[1]
        is_now = is_here & (column >= first) & (column < first + n)
        here = x.gather(1, torch.where(is_now, column - first, 0))
        of_target = torch.where(is_now, here, of_target)
        if call.label_smoothing:
            beside = beside if first else _finite(x.amax(-1))
            mean += _mean(x, beside, shard)
        x = groups.padded(x, _GROUP)
        maxima = groups.maxima(x, _GROUP)
        top = torch.maximum(top, maxima.amax(-1))
        is_hit = maxima > low
        if first == 0:
            best = maxima.topk(min(_KEPT_MAXIMA, maxima.shape[1])).values
            low = _lower_bound(best, call.s)
            is_hit = maxima > low
        else:
            late = (is_hit.sum(-1) > _MAX_SHARE * maxima.shape[1]).nonzero().squeeze(1)
            if len(late):  # too many groups are above the bound of these rows
                more = torch.cat((best[late], maxima[late]), 1)
                best[late] = more.topk(best.shape[1]).values
                better = torch.maximum(low[late], _lower_bound(best[late], call.s))
                low[late] = better
                is_hit[late] = maxima[late] > better
        row, where = groups.members(is_hit, _GROUP)
        where = where.view(-1)
        candidates = x.view(-1).index_select(0, where)
        hit = (candidates.view(-1, _GROUP) > low.index_select(0, row)).view(-1).nonzero().squeeze(1)
        row = row.index_select(0, torch.div(hit, _GROUP, rounding_mode="floor"))
        where, candidates = where.index_select(0, hit).long(), candidates.index_select(0, hit)
        n = x.shape[1]
        new = torch.bincount(row, minlength=R)
        full = (count + new > room).nonzero().squeeze(1)
        if len(full):
            kept[full], keys[full], count[full] = _pruned(
                kept[full], keys[full], count[full], low[full]
            )
        slot = (count - (new.cumsum(0) - new)).index_select(0, row)
        slot += torch.arange(len(row), device=device)
        if len(full):
            is_long |= count + new > room
            low = torch.where(is_long.unsqueeze(1), torch.inf, low)  # it is taken as a whole
            fits = (slot < room).nonzero().squeeze(1)
            where, row, slot, candidates = where[fits], row[fits], slot[fits], candidates[fits]
        slot += row * room
        kept.view(-1).index_copy_(0, slot, candidates)
        keys.view(-1).index_copy_(0, slot, (where - row * n + first).to(torch.int32))
        count = (count + new).clamp(max=room)
    top = shard.largest(top)
    is_long |= ~top.isfinite() & (top != -torch.inf)  # rows with NaN or inf are solved as a whole
    kept[torch.arange(room, device=device) >= count.unsqueeze(1)] = -torch.inf
    if call.label_smoothing:
        mean += V / shard.total * (beside.double() - _finite(top).double())
    return Found(kept, keys, top, of_target, mean, is_long)


def _finite(top: Tensor) -> Tensor:
    return torch.where(top.isfinite(), top, 0.0)


def _mean(x: Tensor, beside: Tensor, shard: Shard) -> Tensor:
    """The share of logits (R, n) in the mean of all, beside a number of each row; fp64.

    The mean itself may have no digits for it, and the sum may be no number any more: a power of 2
    keeps it below the largest one. Few rows at a time stay in the cache.
    """
    small = 0.5 ** (shard.total.bit_length() + 1)
    parts = zip(
        x.split(_AVERAGED_ROWS), (small * beside).unsqueeze(1).split(_AVERAGED_ROWS), strict=True
    )
    sums = [torch.sub(top, z, alpha=small).sum(-1) for z, top in parts]
    return torch.cat(sums).double() / (-small * shard.total)


def _pruned(
    kept: Tensor, keys: Tensor, count: Tensor, low: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows without what a better bound shows to have no weight, and how much remains of each."""
    slots = torch.arange(kept.shape[1], device=kept.device)
    is_kept = (slots < count.unsqueeze(1)) & (kept > low)
    left = is_kept.sum(-1)
    place = slots < left.unsqueeze(1)
    for x in (kept, keys):
        x[place] = x[is_kept]
    return kept, keys, left


def _lower_bound(best: Tensor, s: float | Tensor) -> Tensor:
    """(R, 1), in units of the logits: below it nothing has a weight.

    The threshold of some of a row's logits, with a power that is not smaller than 1/s.
    """
    top = best[:, :1].clamp(min=torch.finfo(best.dtype).min)
    v = (best - top).mul_(s)
    n = torch.ceil(1 / s - 1e-9) if isinstance(s, Tensor) else -int(-(1 / s - 1e-9) // 1)
    c = _threshold(v, n, 4)
    return below(top - (c + 4 * torch.finfo(best.dtype).eps) / s)


def below(bound: Tensor) -> Tensor:
    """The next number: beside large logits a bound may have been rounded up to one of them."""
    return torch.nextafter(bound, torch.full_like(bound, -torch.inf))


def _threshold(v: Tensor, n: float | Tensor, steps: int, times: Tensor | None = None) -> Tensor:
    """c (R, 1), from above: the sum of times [v + c]_+ ** n is 1 there; v <= 0, and 0 once."""
    c = torch.ones_like(v[:, :1])
    for _ in range(steps):
        base = (v + c).clamp_(min=0)
        g = base.pow(n - 1) if times is None else base.pow(n - 1).mul_(times)
        G = g.sum(-1, keepdim=True)
        norm = (g.mul_(base)).sum(-1, keepdim=True)
        c = c - (norm - norm ** (1 - 1 / n)) / G.clamp(min=1.0)
    return c


def _all_logits(call: LinearLoss, shard: Shard, rows: Tensor) -> Found:
    """All logits of rows."""
    V = call.weight.shape[0]
    x = _logits(call, call.hidden[rows], slice(0, V), _rows_multiplied_at_once(shard))
    column, is_here = shard.local(call.target[rows], V)
    of_target = torch.where(is_here, x.gather(1, column), 0.0)
    top = shard.largest(x.amax(-1))
    mean = torch.zeros_like(top, dtype=torch.float64)
    if call.label_smoothing:
        mean = _mean(x, _finite(top), shard)
    empty = torch.empty(len(x), 0, dtype=torch.int32, device=x.device)
    return Found(x, empty, top, of_target, mean, torch.zeros_like(top, dtype=torch.bool))


def _solve(x: Tensor, s: float | Tensor, shard: Shard, solver: Solver) -> Tensor:
    """The weights of rows x (R, L) whose sums go over all shards."""
    if not shard.group:
        return solver(x, s)
    top = x.amax(-1, keepdim=True) if x.shape[1] else x.new_full((len(x), 1), -torch.inf)
    top = shard.largest(top)
    z = x - torch.where(top == -torch.inf, 0.0, top)
    t = torch.zeros_like(top)
    for _ in range(50):
        u = (z - t).mul_(s)
        inside = u > -1
        L = torch.where(inside, u, 0.0).log1p_().div_(s)
        w = torch.where(inside, L.exp(), 0.0)
        g = torch.where(inside, L.mul_(1 - s).exp_(), 0.0)
        F, G = shard.sum(torch.stack((w.sum(-1), g.sum(-1)))).clamp(min=1.0).unsqueeze(-1)
        is_late = F - 1 > 4 * torch.finfo(x.dtype).eps
        if not bool(is_late.any()):
            break
        # a row that has converged stays as it is: its bits do not depend on the others
        t = torch.where(is_late, t - F * torch.expm1(-s * F.log()) / (s * G), t)
    u = (z - t).mul_(s)
    w = torch.where(u > -1, u.clamp(min=-1).log1p_().div_(s).exp_(), 0.0)
    F = shard.sum(w.sum(-1, keepdim=True))
    w = w / torch.where(F == 0, 1.0, F)
    return torch.where(top < torch.inf, w, torch.nan)


def _losses(
    call: LinearLoss, shard: Shard, rows: Tensor, found: Found, p: Tensor, saved: Support
) -> Tensor:
    """<p - y, x> + H(p) - H(y) of rows, fp64; what of it is kept for the gradient is written."""
    s, top = call.s, found.top.double()
    y = call.target_weights[rows].double()
    is_one = call.target[rows] >= 0
    # where x is -inf, p is 0
    z = (found.x - found.top.unsqueeze(1)).clamp_(min=torch.finfo(p.dtype).min)
    pz, slope = z.mul_(p).sum(-1).double(), torch.zeros_like(top)
    if call.save and call.with_alpha:
        slope = entropy_slope(p, call.alpha).sum(-1).double()
    column, is_here = shard.local(call.target[rows], call.weight.shape[0])
    even = call.label_smoothing / shard.total
    used = is_here & (y != 0)
    # scores beside the largest one: scores themselves may have no digits for what is left of them
    of_target = torch.where(used, found.of_target.double() - top.unsqueeze(1), 0.0) * y
    yz = of_target.sum(-1) * (1 - call.label_smoothing)
    if call.label_smoothing:
        yz = yz + call.label_smoothing * found.mean
    pz, slope, yz = shard.sum(torch.stack((pz, slope, yz)))
    lacking = missing(torch.where(is_one, call.target_weights[rows], 0.0), -1).squeeze(-1)
    yz = yz - torch.where(lacking == 0, 0.0, top * lacking) * (1 - call.label_smoothing)
    of_p = _entropy(shard, p, pz, s)
    y = torch.where(is_one, y * (1 - call.label_smoothing) + even, 0.0)
    others = shard.total - is_one.sum(-1)
    rest = y.new_full((), even)
    of_y = entropy(y, call.alpha).sum(-1) + others * entropy(rest, call.alpha)
    loss = pz - yz + of_p - of_y
    is_dead = top == -torch.inf
    if call.save:
        if call.with_alpha:
            slope_y = entropy_slope(y, call.alpha).sum(-1)
            slope = slope - slope_y - others * entropy_slope(rest, call.alpha)
            saved.d_alpha[rows] = torch.where(is_dead, 0.0, slope).to(saved.d_alpha.dtype)
        y = call.target_weights[rows] * (1 - call.label_smoothing)
        y = torch.where(is_dead.unsqueeze(1), 0.0, y)
        if call.softcap is not None:
            y = y * _slope(found.of_target, call.softcap)
        saved.slope[rows] = y.to(saved.slope.dtype)
    return torch.where(is_dead, 0.0, loss)


def _entropy(shard: Shard, p: Tensor, pz: Tensor, s: float | Tensor) -> Tensor:
    """(1 - sum p^(1 + s)) / (s (1 + s)) of whole rows; fp64.

    On the support p^s = s z + p_max^s with z = x - max(x), so that the sum is s <p, z> + p_max^s.
    """
    largest = p.amax(-1) if p.shape[1] else p.new_zeros(len(p))
    log = shard.largest(largest).double().clamp(min=least(torch.float64)).log()
    return (-torch.expm1(s * log) / s - pz) / (1 + s)


def _gradient_in_logits(
    call: LinearLoss,
    shard: Shard,
    solver: Solver,
    rows: Tensor,
    saved: Support | None = None,
    losses: Tensor | None = None,
) -> Tensor:
    """p - y times the derivative of the cap: the gradient in all logits of rows, and zeros below.

    The losses are written where there is a place for them. Few rows at a time stay in the cache.
    The shape is always the same: the first row stands for those that are missing.
    """
    R, step = len(rows), _rows_solved_at_once(shard)
    rows = torch.cat((rows, rows[:1].expand(_rows_multiplied_at_once(shard) - R)))
    found = _all_logits(call, shard, rows)
    column, is_here = shard.local(call.target[rows], call.weight.shape[0])
    y = torch.where(is_here, call.target_weights[rows], 0.0) * (1 - call.label_smoothing)
    y = y.to(found.x.dtype)
    is_alive = (found.top != -torch.inf).unsqueeze(1)
    for some in (slice(i, i + step) for i in range(0, R, step)):
        part = found.rows(some)
        p = _solve(part.x, call.s, shard, solver)
        if saved is not None and losses is not None:
            losses[rows[some]] = _losses(call, shard, rows[some], part, p, saved)
        gap = p.scatter_add_(1, column[some], -y[some])
        if call.label_smoothing:
            gap -= call.label_smoothing / shard.total
        if call.softcap is not None:
            gap *= _slope(part.x, call.softcap)
        torch.mul(gap, is_alive[some], out=part.x)  # the logits are not needed any more
    found.x[R:] = 0.0
    return found.x


def _add_products(
    call: LinearLoss,
    rows: Tensor,
    gap: Tensor,
    scale: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """The gradients by the gap of rows, which `scale` (R, 1) multiplies but for d_hidden."""
    if d_hidden is not None:
        product = gap.to(call.weight.dtype) @ call.weight
        d_hidden[rows] = product[: len(rows)].to(d_hidden.dtype)
    gap = gap[: len(rows)]
    if d_weight is not None:
        d_weight.addmm_(gap.T, call.hidden[rows].to(gap.dtype) * scale)
    if d_bias is not None:
        d_bias.addmv_(gap.T, scale.squeeze(1))


def _bags(table: Tensor, index: Tensor, start: Tensor | None, weights: Tensor) -> Tensor:
    """Sums of rows of a table with weights, in the wide dtype: one for each start, or each row."""
    found = F.embedding_bag(
        index, table, start, mode="sum", per_sample_weights=weights.to(table.dtype)
    )
    return found.to(weights.dtype)


def _by_column(
    call: LinearLoss,
    parts: tuple[tuple[Tensor, Tensor, Tensor], ...],
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight and of the bias from lists of (column, row, value).

    Some columns at a time, and each column's sum runs over its rows in order, so that two runs
    give the same bits.
    """
    value = parts[0][2]
    V, d = call.weight.shape
    hidden = call.hidden.to(value.dtype)
    d_weight = value.new_empty(V, d) if wants_weight else None
    d_bias = value.new_empty(V) if wants_bias else None
    one = value.new_ones(len(hidden), 1)
    width = max(1, _GRADIENT_BLOCK // max(d, 1))
    for first in range(0, V, width):
        last = min(V, first + width)
        here = [((c >= first) & (c < last)).nonzero().squeeze(1) for c, _, _ in parts]
        column, row, value = (
            torch.cat([x.index_select(0, at) for x, at in zip(of_parts, here, strict=True)])
            for of_parts in zip(*parts, strict=True)
        )
        column, order = column.sort(stable=True)
        row, value = row.index_select(0, order), value.index_select(0, order)
        start = torch.arange(first, last, device=column.device, dtype=column.dtype)
        start = torch.searchsorted(column, start, out_int32=True)
        if d_weight is not None:
            d_weight[first:last] = _bags(hidden, row, start, value)
        if d_bias is not None:
            d_bias[first:last] = _bags(one, row, start, value).squeeze(1)
    return d_weight, d_bias


TORCH = Routines(search, by_newton)

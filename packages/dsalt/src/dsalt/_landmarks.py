"""Landmark scores and the choice of landmarks, in plain PyTorch for every device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_kernels import checks
from shared_kernels.rows import wide

from ._call import CausalLandmarks
from ._geometry import first_lists, n_lists, sequence_starts
from ._precision import double

FLOOR = 1e-6  # the smallest standard deviation a z-score divides by
# The smallest standard deviation as a share of the mean: norms of normalized states differ by
# rounding alone.
LEAST_SHARE = 1e-2
NEVER = torch.iinfo(torch.int64).min  # key of a token that must not be chosen
MERGED = 256  # tokens (at least) and blocks (at most) that join the running lists in one merge


class PrefixState(NamedTuple):
    """Sums over the tokens so far, of norms minus ``shift`` (the first token's norm)."""

    seen: int | Tensor
    shift: Tensor
    total: Tensor
    squares: Tensor

    def rows(self, index: Tensor) -> PrefixState:
        """The sums of rows ``index`` of the batch."""
        whole = isinstance(self.seen, Tensor) and self.seen.dim() > 0
        seen = self.seen[index] if whole and isinstance(self.seen, Tensor) else self.seen
        return PrefixState(seen, self.shift[index], self.total[index], self.squares[index])


def _spread(variance: Tensor, mean: Tensor) -> Tensor:
    """The standard deviation, at least 1 % of the mean and 1e-6; differentiable in both."""
    return torch.maximum(variance, (LEAST_SHARE * mean).square()).clamp(min=FLOOR * FLOOR).sqrt()


def z_global(n: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(n - mean) / std over the last dimension, unbiased, the std at least 1 % of the mean.

    With ``lengths``, in n's shape without its last dim, over so many first entries; 0 behind them.
    """
    x = double(n)
    if lengths is None:
        lengths = torch.full(n.shape[:-1], n.shape[-1], device=n.device)
    count = lengths[..., None].to(x.dtype)
    token = torch.arange(n.shape[-1], device=n.device) < lengths[..., None]
    mean = torch.where(token, x, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    y = torch.where(token, x - mean, 0)
    variance = y.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return (y / _spread(variance, mean)).to(n.dtype)


def z_prefix(
    n: Tensor,
    state: PrefixState | None = None,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, PrefixState | None]:
    """z-score of token j among the tokens up to j (0 for the first), and the sums to go on with.

    Norms are shifted by the sequence's first one before they are summed, so that a small spread
    around a large mean keeps its digits. ``valid`` says which places of n (..., N) hold tokens.
    A packed row gives the sums of each sequence, (S, ..., 1); with a state, its first sequence
    continues it, and no sums are given.
    """
    if n.shape[-1] == 0:
        return n, state
    x = double(n)
    count = torch.arange(1, n.shape[-1] + 1, device=n.device, dtype=x.dtype)
    after: PrefixState | None = None
    if cu_seqlens is not None:
        first = sequence_starts(n.shape[-1], cu_seqlens)
        shift = x[..., first].detach()
        if state is not None:
            continues = (first == 0) & (torch.as_tensor(state.seen, device=n.device) > 0)
            shift = torch.where(continues, state.shift, shift)
        y = x - shift
        sums = F.pad(torch.stack((y, y * y)).cumsum(-1), (1, 0))
        total, squares = sums[..., 1:] - sums[..., first]
        count = count - first
        if state is None:
            after = _packed_state(x.detach(), sums.detach(), cu_seqlens.to(torch.int64))
        else:
            total = total + torch.where(continues, state.total, 0)
            squares = squares + torch.where(continues, state.squares, 0)
            count = count + torch.where(continues, state.seen, 0)
    else:
        shift = x[..., :1].detach()
        if valid is not None:
            count = valid.to(x.dtype).cumsum(-1)
            lead = valid.to(torch.uint8).argmax(-1, keepdim=True).expand_as(shift)
            shift = x.detach().gather(-1, lead)
        seen = n.shape[-1] if valid is None else count[..., -1:]
        if state is not None and valid is not None and isinstance(state.seen, Tensor):
            shift = torch.where(state.seen > 0, state.shift, shift)  # a row may begin here
        elif state is not None:
            shift = state.shift
        y = x - shift
        if valid is not None:
            y = torch.where(valid, y, 0)
        total, squares = y.cumsum(-1), (y * y).cumsum(-1)
        if state is not None:
            total, squares = total + state.total, squares + state.squares
            count, seen = count + state.seen, seen + state.seen
        after = PrefixState(seen, shift, total[..., -1:].detach(), squares[..., -1:].detach())
    mean = total / count.clamp(min=1)
    variance = (squares - total * mean) / (count - 1).clamp(min=1)
    z = (y - mean) / _spread(variance, shift + mean)
    return z.to(n.dtype), after


def _packed_state(x: Tensor, sums: Tensor, bounds: Tensor) -> PrefixState:
    """The sums of each packed sequence from the running ones (2, 1, ..., N + 1)."""

    def rows(y: Tensor) -> Tensor:  # (1, ..., S) -> (S, ..., 1)
        return y.squeeze(0).movedim(-1, 0).unsqueeze(-1)

    begin, end = bounds[:-1], bounds[1:]
    total, squares = sums[..., end] - sums[..., begin]
    shift = x[..., begin.clamp(max=x.shape[-1] - 1)]
    seen = (end - begin).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return PrefixState(seen, rows(shift), rows(total), rows(squares))


def compared(scores: Tensor, places: Tensor | None = None, n_sink: int = 0) -> Tensor:
    """The scores as the choice compares them: rounded to 1/1024, without a gradient.

    Where ``places`` tells the tokens' places in their sequence, its first ``n_sink`` come before
    all others.
    """
    rounded = (scores.detach() * 1024).round() / 1024
    if places is None:
        return rounded
    sinks = (places >= 0) & (places < n_sink) & (scores != float("-inf"))
    return torch.where(sinks, float("inf"), rounded)


def select_global(scores: Tensor, k: int, allowed: Tensor) -> Tensor:
    """The k best allowed tokens in rising order, -1 behind; of equal scores the earlier wins."""
    n = scores.shape[-1]
    legal = allowed & (scores != float("-inf"))
    order = (
        scores.masked_fill(~legal, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    )
    order = order[..., :k]
    return _rising(torch.where(legal.gather(-1, order), order, n), n, k)


def _rising(picked: Tensor, empty: int, k: int) -> Tensor:
    picked = picked.sort(-1).values
    picked = torch.where(picked >= empty, -1, picked)
    return F.pad(picked, (0, k - picked.shape[-1]), value=-1).to(torch.int32)


def _best(values: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of candidates that stand in rising token order wherever scores are equal."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return values.gather(-1, order), index.gather(-1, order)


def _sortable(scores: Tensor) -> Tensor:
    """int64 keys that order tokens by score, the earlier first of equals: all are different.

    The low half is N - 1 - token, the high half the bits of a float32 score as an ordered integer
    (the rank of a float64 one). Tokens of score -inf have the key NEVER.
    """
    n = scores.shape[-1]
    if scores.dtype == torch.float64:
        high = scores.unique(return_inverse=True)[1]
    else:
        bits = (scores.float() + 0.0).view(torch.int32)  # -0 becomes 0
        high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).clamp(min=-0x7FFFFFFF).to(torch.int64)
    keys: Tensor = (high << 32) | torch.arange(n - 1, -1, -1, device=scores.device)
    return keys.masked_fill_(scores == float("-inf"), NEVER)


def causal_landmarks(call: CausalLandmarks) -> Tensor:
    """The lists by a loop that reads values (CPU), or by a scan that does not (other devices)."""
    return (by_loop if call.scores.device.type == "cpu" else by_scan)(call)


def by_loop(call: CausalLandmarks) -> Tensor:
    """List c of a sequence: the k best of its tokens before c * block. Some blocks per merge.

    Only a token that beats the worst of the last list can enter the next ones, and the longer the
    sequence the fewer do: a merge takes half as many blocks as there were before it. Lists stand in
    token order: those above a bound are taken from lists and newcomers, nothing is sorted.
    """
    scores, k, block, cu_seqlens = call
    B, H, n = scores.shape
    if B * H == 0:
        return by_scan(call)
    bounds, firsts = [0, n], [0]
    if cu_seqlens is not None:
        bounds, firsts = cu_seqlens.tolist(), first_lists(cu_seqlens, block).tolist()
    total_lists = n_lists(n, n, block, cu_seqlens)
    keys = _sortable(scores).view(B * H, n)
    # an empty slot has a key of its own, below every token's: each list has k different keys
    empty = NEVER + 1 + torch.arange(k, device="cpu")
    lists = empty.repeat(B * H, total_lists, 1)
    least = max(1, MERGED // block)
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        first, total = firsts[s], -(-(stop - start) // block)
        best, c = empty.expand(B * H, k), 1
        while k and c < total:
            rest = keys[:, start + (c - 1) * block : start + (total - 1) * block]
            u = min(max(least, min(c // 2, MERGED)), total - c)
            new, came = _newcomers(rest[:, : u * block], best)
            if new.shape[1] > 2 * MERGED and u > least:
                u = least
                new, came = _newcomers(rest[:, : u * block], best)
            # [rows, u, k + newcomers]; list c + v has seen the newcomers of blocks 0..v
            seen = came[:, None] < torch.arange(1, u + 1, device="cpu")[:, None] * block
            new = torch.where(seen, new[:, None], NEVER)
            both = torch.cat((best[:, None].expand(-1, u, -1), new), -1)
            bound = both.topk(k, sorted=False).values.amin(-1, keepdim=True)
            found = both.masked_select(both >= bound).view(-1, u, k)
            lists[:, first + c : first + c + u] = found
            best, c = found[:, -1], c + u
    index = torch.where(lists <= NEVER + k, n, n - 1 - (lists & 0xFFFFFFFF)).to(torch.int32)
    if k:
        short = index[..., 0] == n  # empty slots stand in front: to the end with them
        index[short] = _rising(index[short], n, k)
    return index.view(B, H, total_lists, k)


def _newcomers(keys: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Those of keys (rows, n) that beat the worst of best, in their order, and their places."""
    better = keys > best.amin(-1, keepdim=True)
    count = better.sum(-1)
    row, place = better.nonzero(as_tuple=True)
    slot = torch.arange(row.shape[0], device="cpu") - (count.cumsum(0) - count)[row]
    new = keys.new_full((keys.shape[0], int(count.max())), NEVER)
    came = torch.zeros_like(new)
    new[row, slot], came[row, slot] = keys[row, place], place
    return new, came


def by_scan(call: CausalLandmarks) -> Tensor:
    """The same lists by a scan: log2(number of blocks) merges of all lists, no host sync."""
    scores, k, block, cu_seqlens = call
    B, H, n = scores.shape
    device = scores.device
    total_lists = n_lists(n, n, block, cu_seqlens)
    if cu_seqlens is None:
        inner = torch.arange(total_lists, device=device)
        begin, end = inner * block, inner * 0 + n
    else:
        bounds = cu_seqlens.to(torch.int64)
        first = first_lists(cu_seqlens, block)[:-1]
        u = torch.arange(total_lists, device=device)
        s = (torch.searchsorted(first, u, right=True) - 1).clamp_(min=0)
        inner = u - first[s]
        begin, end = bounds[s] + inner * block, bounds[s + 1]
    if total_lists == 0 or n == 0:
        return torch.full((B, H, total_lists, k), -1, dtype=torch.int32, device=device)
    # candidates of list u at the start: the block before it in its sequence
    o_t = (begin - block)[:, None] + torch.arange(block, device=device)  # [n_lists, block]
    legal = ((inner > 0)[:, None] & (o_t < end[:, None])).expand(B, H, -1, -1)
    o_t = o_t.clamp(0, n - 1)
    values = scores[:, :, o_t].masked_fill(~legal, float("-inf"))
    index = torch.where(legal & (values != float("-inf")), o_t, n)
    values, index = _best(values, index, k)
    short = k - values.shape[-1]
    values = F.pad(values, (0, short), value=float("-inf"))
    index = F.pad(index, (0, short), value=n)
    step = 1
    while step < total_lists:
        joins = (inner > step)[step:, None]
        before_v = values[:, :, :-step].masked_fill(~joins, float("-inf"))
        before_i = torch.where(joins, index[:, :, :-step], n)
        merged_v, merged_i = _best(
            torch.cat((before_v, values[:, :, step:]), -1),
            torch.cat((before_i, index[:, :, step:]), -1),
            k,
        )
        values = torch.cat((values[:, :, :step], merged_v), 2)
        index = torch.cat((index[:, :, :step], merged_i), 2)
        step *= 2
    return _rising(index, n, k)


def norms(x: Tensor, values: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """The norms (B, H, N) of values (B, H_kv or H, N, D), and those (B, N) of x (B, N, d)."""
    dtype = wide(x)
    value_norm = torch.linalg.vector_norm(values, dim=-1, dtype=dtype)
    value_norm = value_norm.repeat_interleave(H // values.shape[1], 1)
    return value_norm, torch.linalg.vector_norm(x, dim=-1, dtype=dtype)


def mixed_scores(
    x: Tensor,
    values: Tensor,
    alpha: Tensor,
    causal: bool,
    state: tuple[Any, ...] | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The scores a z(|values|) + (1 - a) z(|x|), (B, H, N), and the sums that later ones need.

    Args:
        x: (B, N, d) hidden states.
        values: (B, H_kv, N, D) their values.
        alpha: a, (H,) or a scalar.
        causal: whether z looks at the tokens up to each one, or at all of them.
        state: causal: the sums over the tokens before these.
        lengths: (B,) how many first tokens of each row count.
        cu_seqlens: causal: bounds of packed sequences.
        valid: causal: (B, N) which places hold tokens, instead of ``lengths``.
    """
    n_heads = alpha.shape[0] if alpha.dim() else values.shape[1]
    value_norm, input_norm = norms(x, values, n_heads)
    if causal:
        if lengths is not None:
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        before = (None, None) if state is None else state
        each = None if valid is None else valid[:, None]
        z_value, value_state = z_prefix(value_norm, before[0], cu_seqlens, each)
        z_input, input_state = z_prefix(input_norm, before[1], cu_seqlens, valid)
        state = (value_state, input_state)
    else:
        if cu_seqlens is not None:
            checks.fail(
                "cu_seqlens", "be None", "a packed batch", "only causal scores know sequences"
            )
        z_value = z_global(value_norm, None if lengths is None else lengths[:, None])
        z_input, state = z_global(input_norm, lengths), None
    a = alpha.to(z_value.dtype).reshape(-1, 1)
    return a * z_value + (1 - a) * z_input[:, None], state

"""Attention over keys that several ranks hold: its call, what is kept of it, and who has what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks, distributed, packed
from shared_kernels.calls import recast, replaced
from shared_kernels.rows import wide

from . import _length_scale
from ._call import ENOUGH_STEPS, Attention

LAYOUTS = ("contiguous", "zigzag")


def sequence_places(
    n: int, group: Any = None, layout: str = "zigzag", *, rank: int | None = None, size: int = 1
) -> Tensor:
    """Which of n tokens this rank holds, for :func:`adasplash` with the same group and layout.

    "contiguous" cuts the sequence into one piece per rank. "zigzag" cuts it into two per rank, and
    rank r holds pieces r and 2 size - 1 - r: under a causal mask all ranks then have as much to do.
    Pieces are equally long; the last ones may be shorter, or empty.

    Args:
        n: tokens of the whole sequence.
        group: as for :func:`adasplash`; or None with a `rank` and a `size`.
        layout: "contiguous" or "zigzag".
        rank, size: in the place of a group.

    Returns:
        int64, rising.

    Example:
        >>> sequence_places(10, layout="zigzag", rank=0, size=2)
        tensor([0, 1, 2, 9])
    """
    checks.positive_int("n", n)
    checks.in_set("layout", layout, LAYOUTS)
    ranks = distributed.resolve(group)
    if ranks is not None:
        rank, size = ranks.rank, ranks.size
    elif rank is None:
        checks.fail("group", "be a group, or None with `rank` and `size`", None)
    checks.positive_int("size", size)
    if not isinstance(rank, int) or not 0 <= rank < size:
        checks.fail("rank", f"be an int in [0, {size - 1}]", rank)
    pieces = size if layout == "contiguous" else 2 * size
    width = -(-n // pieces)
    mine = [rank] if layout == "contiguous" else [rank, 2 * size - 1 - rank]
    return torch.cat([torch.arange(min(n, i * width), min(n, (i + 1) * width)) for i in mine])


class Sharded(NamedTuple):
    """o = entmax_alpha(cap(scale q k^T) - slope |distance|, visible keys of all ranks) v."""

    q: Tensor  # (B, H, n_q, D) of this rank
    k: Tensor  # (B, H_kv, n_k, D) of this rank
    v: Tensor  # (B, H_kv, n_k, D_v)
    alpha: Tensor | None
    alpha_value: float
    is_causal: bool
    lengths: Tensor | None  # (B,) of the whole sequences
    cu_seqlens: Tensor | None  # (sequences + 1,) of the whole row
    slopes: Tensor | None  # (H,)
    window: int | None
    s_aux: Tensor | None  # (H,)
    softcap: float | None
    scale: float
    n_iter: int
    place_q: Tensor  # (n_q,) int64 the place of each query in the whole row
    place_k: Tensor  # (n_k,) int64
    total: int  # keys of all ranks
    group: str  # name of the process group
    save: bool

    def fake(self) -> Tensor:
        return self.q.new_empty(*self.q.shape[:3], self.v.shape[-1])


class Reach(NamedTuple):
    """What is kept: the threshold of each query, and which ranks hold its support."""

    tau: Tensor  # (B, H, n_q) in units of s * score; -inf where every key has a weight
    reach: Tensor  # (ranks, B, H, n_q) bool

    @classmethod
    def fake(cls, call: Sharded) -> Reach:
        tau = call.q.new_empty(call.q.shape[:3] if call.save else (0,), dtype=wide(call.q))
        size = distributed.Ranks.named(call.group).size
        return cls(tau, tau.new_empty((size, *tau.shape), dtype=torch.bool))


def sharded_call(
    call: Attention,
    length_scale: Tensor | None,
    ranks: distributed.Ranks,
    layout: str,
) -> Sharded:
    """The call of all ranks from this rank's checked one; refused on all ranks or on none."""
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    with distributed.agreement(ranks) as agreed:
        checks.in_set("layout", layout, LAYOUTS)
        for name in ("mask", "bias"):
            if getattr(call, name) is not None:
                checks.fail(
                    name,
                    "be None with `group`",
                    "a tensor",
                    "no rank has the columns of all keys; is_causal, window, alibi_slopes, varlen "
                    "and cu_seqlens say the same without one",
                    NotImplementedError,
                )
        placed = {
            "is_causal": call.is_causal,
            "window": call.window,
            "alibi_slopes": call.slopes,
            "varlen": call.varlen,
            "cu_seqlens": call.cu_seqlens,
            "length_scale": length_scale,
            "layout='zigzag'": layout == "zigzag",
        }
        used = [name for name, x in placed.items() if x is not None and x is not False]
        if used and n_q != n_k:
            checks.fail(
                used[0],
                "come with as many queries as keys on each rank with `group`",
                f"{n_q} and {n_k}",
            )
        agreed.equal["q, k and v"] = distributed.fingerprint(
            call.q.shape[:2], call.q.shape[3], call.k.shape[:2], call.v.shape[3], str(call.q.dtype)
        )
        given = {
            "alpha": call.alpha,
            "alibi_slopes": call.slopes,
            "s_aux": call.s_aux,
            "varlen": call.varlen,
            "cu_seqlens": call.cu_seqlens,
            "length_scale": length_scale,
        }
        for name, x in given.items():
            plain = None if x is None else x.detach().double().cpu().numpy()
            number = call.alpha_value if name == "alpha" else None
            agreed.equal[name] = distributed.fingerprint(plain, number)
        for name in ("is_causal", "window", "softcap", "scale"):
            agreed.equal[name] = distributed.fingerprint(getattr(call, name))
        agreed.equal["layout"] = distributed.fingerprint(layout)
        # the backward pass exchanges messages, too
        agreed.equal["requires_grad of q, k, v or an option"] = int(call.save)
        agreed.from_all = (n_q, n_k)
    each_q, each_k = zip(*agreed.from_all, strict=True)
    total = sum(each_k)
    place_q, place_k = (
        torch.arange(sum(each[: ranks.rank]), sum(each[: ranks.rank + 1]))
        for each in (each_q, each_k)
    )
    if layout == "zigzag" and total:
        for rank, n in enumerate(each_k):
            wanted = len(sequence_places(total, layout=layout, rank=rank, size=ranks.size))
            if n != wanted:
                checks.fail(
                    "k",
                    f"hold {wanted} of the {total} tokens on rank {rank} in zigzag",
                    n,
                    "adasplash.sequence_places says which ones",
                )
        place_q = place_k = sequence_places(total, layout=layout, rank=ranks.rank, size=ranks.size)
    _check_whole(call, total)
    call = _scaled(call, length_scale, place_q, total)
    # a bound that rules keys out has to have converged
    call = replaced(call, n_iter=ENOUGH_STEPS)
    device = call.q.device
    return recast(
        call,
        Sharded,
        lengths=call.varlen,
        place_q=place_q.to(device),
        place_k=place_k.to(device),
        total=total,
        group=ranks.name,
    )


def with_whole_lengths(
    call: Attention, varlen: Tensor | None, cu_seqlens: Tensor | None
) -> Attention:
    """The call of a rank with the lengths of whole sequences, whose values are checked later."""
    if varlen is not None and cu_seqlens is not None:
        checks.fail("cu_seqlens", "not come with `varlen`", "both")
    if varlen is not None:
        checks.integer("varlen", varlen)
        checks.shape("varlen", varlen, (call.q.shape[0],), lambda: f"(B={call.q.shape[0]},)")
    if cu_seqlens is not None:
        checks.integer("cu_seqlens", cu_seqlens)
    return replaced(call, varlen=varlen, cu_seqlens=cu_seqlens)


def _check_whole(call: Attention, total: int) -> None:
    """The lengths of whole sequences, which every rank has alike."""
    if call.varlen is not None and call.varlen.numel():
        low, high = (int(x) for x in torch.aminmax(call.varlen))
        if low < 0 or high > total:
            checks.fail("varlen", f"be in [0, N={total}]", low if low < 0 else high)
    if call.cu_seqlens is not None:
        packed.check(call.cu_seqlens, total, B=call.q.shape[0])


def _scaled(call: Attention, length_scale: Tensor | None, place: Tensor, total: int) -> Attention:
    """The call with each query times the factor of the length that it sees."""
    if length_scale is None:
        return call
    place = place.to(call.q.device).view(1, 1, -1, 1)
    n = place + 1 if call.is_causal else torch.full_like(place, total)
    if call.cu_seqlens is not None:
        ends = call.cu_seqlens.to(place.device, torch.int64)
        which = torch.bucketize(place, ends[1:], right=True).clamp(max=max(len(ends) - 2, 0))
        n = place - ends[which] + 1 if call.is_causal else ends.diff()[which]
    elif call.varlen is not None and not call.is_causal:
        n = call.varlen.to(place.device).view(-1, 1, 1, 1) + 0 * place
    return _length_scale.times(call, length_scale, n)

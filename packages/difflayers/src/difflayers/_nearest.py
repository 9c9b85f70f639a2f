"""The nearest neighbours of patterns by cosine: exact, over tiles, padding left out."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._tiles import row_tiles

# Similarities held at once while neighbours are searched, in elements (8 MB, and the keys as much).
_TILE = 1 << 20
# A sort key is one integer: the similarity in fixed point, and below it the column, so that equal
# similarities are ordered by column. _ABSENT is below every key.
_FIXED, _COLUMNS = 2.0**30, 1 << 22
_ABSENT = -(1 << 62)
# On a CPU with at least _PROPOSE_FROM columns, float32 products propose k + _SLACK of them, and
# float64 decides among these.
_PROPOSE_FROM, _SLACK = 256, 8


def unit(X: Tensor) -> Tensor:
    """Rows of X (..., d) at length 1 in float64 (float32 where a device has none); zeros stay.

    Each row is first divided by its largest entry: the squares of tiny and huge rows then neither
    vanish nor overflow.
    """
    wide = X.to(torch.float32 if X.device.type == "mps" else torch.float64)
    if X.shape[-1] == 0:
        return wide
    largest = wide.detach().abs().amax(-1, keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1.0)
    # the length of every row but a zero one is at least 1 here
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=0.5)
    return wide / length


@torch.no_grad()
def nearest(
    X: Tensor, Y: Tensor, k: int, valid: Tensor | None, exclude_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The k rows of Y (B, S, d) most similar to each row of X (B, L, d), by cosine, nearest first.

    Cosines are float64, and those that agree to 1e-9 count as equal: they are ordered by index, so
    that neither padding nor the size of a batch chooses among ties.

    valid: (B, S) bool, True = may be chosen. Returns cosines (B, L, k) in fp32 or fp64, indices
    (B, L, k), and which of them exist (B, L, k): an item may have fewer than k to choose from. The
    index of one that does not exist is the row's own with ``exclude_self``, else 0.
    """
    dtype = torch.promote_types(X.dtype, torch.float32)
    same = X is Y
    X = unit(X)
    Y = X if same else unit(Y)
    (B, L, _), S = X.shape, Y.shape[1]
    proposes = _checks.reads_values(X, Y) and S >= _PROPOSE_FROM and S > k + _SLACK
    y32 = Y.float() if proposes else Y

    def search(i: int, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows i, i + 1, ... of X."""
        here = torch.arange(i, i + part.shape[1], device=X.device).unsqueeze(-1)
        own = here if exclude_self else None
        found = _proposed(part, Y, y32, k, valid, own) if proposes else None
        cosine, index, ok = _decided(part, Y, k, valid, own) if found is None else found
        return cosine.to(dtype), torch.where(ok, index, here if exclude_self else 0), ok

    tiles = row_tiles(L, B * S, _TILE)
    if len(tiles) == 1:
        return search(0, X)
    # The results are allocated before the large temporaries: allocated between them they would
    # leave holes in the heap.
    found, where = X.new_empty((B, L, k), dtype=dtype), X.new_empty((B, L, k), dtype=torch.int64)
    there = X.new_empty((B, L, k), dtype=torch.bool)
    for part in tiles:
        found[:, part], where[:, part], there[:, part] = search(part.start, X[:, part])
    return found, where, there


def _ranked(
    cosine: Tensor, index: Tensor, k: int, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest cosines, equal ones by index: (cosines, places, which of them exist, keys)."""
    key = torch.round(cosine * _FIXED).to(torch.int64) * _COLUMNS
    key = key + (_COLUMNS - 1 - index % _COLUMNS)
    if out is not None:
        key = key.masked_fill(out, _ABSENT)
    # k places more that are absent, so that there are always k to choose from
    key, place = torch.nn.functional.pad(key, (0, k), value=_ABSENT).topk(k, dim=-1)
    ok = key > _ABSENT
    place = torch.where(ok, place, 0)
    if cosine.shape[-1] == 0:
        return cosine.new_zeros(place.shape), place, ok, key
    return torch.where(ok, cosine.gather(-1, place), 0.0), place, ok, key


def _out(index: Tensor, own: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Which columns a row may not choose: itself, and those that are not valid."""
    out = None if own is None else index == own
    if valid is None:
        return out
    hidden = ~valid[:, None, :]
    return hidden if out is None else hidden | out


def _decided(
    X: Tensor, Y: Tensor, k: int, valid: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All columns in float64."""
    index = torch.arange(Y.shape[1], device=X.device)
    return _ranked(X @ Y.mT, index, k, _out(index, own, valid))[:3]


def _proposed(
    X: Tensor, Y: Tensor, y32: Tensor, k: int, valid: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """k + _SLACK columns in float32, and among them in float64; None where they may not suffice."""
    near = X.float() @ y32.mT
    if own is not None:
        near.scatter_(-1, own.expand(X.shape[0], -1, 1), -torch.inf)
    if valid is not None:
        near.masked_fill_(~valid[:, None, :], -torch.inf)
    near, index = near.topk(k + _SLACK, dim=-1)
    flat = index.flatten(1)[..., None].expand(-1, -1, Y.shape[-1])
    # [B, rows, k + _SLACK]
    exact = (Y.gather(1, flat).unflatten(1, index.shape[1:]) @ X.unsqueeze(-1)).squeeze(-1)
    cosine, place, ok, _ = _ranked(exact, index, k, near == -torch.inf)
    # no entry that was not proposed is larger than this bound
    bound = near[..., -1] + (2 * X.shape[-1] + 8) * torch.finfo(torch.float32).eps + 2 / _FIXED
    if not bool(((bound < cosine[..., -1]) | (near[..., -1] == -torch.inf)).all()):
        return None
    return cosine, index.gather(-1, place), ok

"""What every attention launch shares: tensors with their strides, sequences, tile lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from shared_kernels import blockmask, device
from shared_kernels.blockmask import TileList
from shared_kernels.configs import Config, Table
from shared_kernels.triton import math, threshold
from shared_kernels.triton.arguments import Rows, units

from .._call import SQUARE, Attention
from .weights import SMALLEST_S

# Run-time values, so that no length compiles a kernel again.
LENGTHS = ["N_q", "N_k", "window", "n_iter", "n_tiles", "n_squares"]
# The fast logarithm errs by 2e-7, which 1/s multiplies: below this s it is not taken.
LEAST_FAST_S = 0.25


class Pairs(NamedTuple):
    """What belongs to pairs (B, H, N_q, N_k), as kernels take it."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_q: int
    stride_k: int

    @classmethod
    def of(cls, x: Tensor | None, shape: tuple[int, int, int, int]) -> Pairs | None:
        """``x`` expanded to ``shape``, nothing copied; booleans as bytes."""
        if x is None:
            return None
        x = x.detach().expand(shape)
        return cls(x.view(torch.uint8) if x.dtype == torch.bool else x, *x.stride())


class Solved(NamedTuple):
    """What the backward kernels know of each query, (B, H, N_q) fp32."""

    top: Tensor  # the largest score, in units
    theta: Tensor  # the threshold (tau + 1) / s above top; of lazy attention the log2-sum-exp2
    delta: Tensor  # do . o2


def units_of(scale: float, *edits: Any) -> tuple[float, float]:
    """What multiplies products of queries and keys, and how much score a unit of the result is.

    1 where an edit (bias, slopes, cap) follows, which is in units of the score.
    """
    return (scale, 1.0) if any(edit is not None for edit in edits) else units(scale)


def in_units(score: Tensor, unit: float) -> Tensor:
    """Scores of a parameter in units, fp32 and contiguous; a finite one stays finite."""
    x = score.detach().float()
    most = torch.finfo(x.dtype).max
    return torch.where(x.isinf(), x, (x / unit).clamp(-most, most)).contiguous()


def blocks(D: int) -> int:
    """The power of two that holds a head dim."""
    return int(max(16, triton.next_power_of_2(D)))


@dataclass(frozen=True)
class Sequences:
    """The independent sequences: (start, queries, keys) each, or the batch itself."""

    table: Tensor | None
    n: int
    packed: bool

    @staticmethod
    def of(q: Tensor, varlen: Tensor | None, cu_seqlens: Tensor | None) -> Sequences:
        if cu_seqlens is not None:
            ends = cu_seqlens.to(q.device, torch.int32)
            lengths = ends.diff()
            table = torch.stack([ends[:-1], lengths, lengths], 1).contiguous()
            return Sequences(table, table.shape[0], True)
        if varlen is not None:
            both = varlen.to(q.device, torch.int32).view(q.shape[0], 1 if varlen.dim() == 1 else 2)
            both = both.expand(-1, 2)
            table = torch.cat([torch.zeros_like(both[:, :1]), both], 1).contiguous()
            return Sequences(table, table.shape[0], False)
        return Sequences(None, q.shape[0], False)


@dataclass(frozen=True)
class Problem:
    """One call, as the kernels take it."""

    call: Attention
    sequences: Sequences
    target: device.Target
    arguments: dict[str, Any]  # those of every kernel
    values: dict[str, Any]  # and of those that read the values
    s_aux: Tensor | None  # (H,) fp32, in units

    @property
    def n_squares(self) -> tuple[int, int]:
        """Squares along the queries and along the keys."""
        return triton.cdiv(self.call.q.shape[2], SQUARE), triton.cdiv(self.call.k.shape[2], SQUARE)

    def n_tiles(self, config: Config) -> int:
        """Tiles of BLOCK_Q queries; those of whole squares."""
        return self.n_squares[0] * (SQUARE // config["BLOCK_Q"])

    def n_key_tiles(self, config: Config) -> int:
        return self.n_squares[1] * (SQUARE // config["BLOCK_K"])

    def grid_of_queries(self, config: Config) -> tuple[int, ...]:
        return (self.n_tiles(config) * self.sequences.n * self.call.q.shape[1],)

    def tiles_of(self, config: Config) -> tuple[int, int, int]:
        """(sequences * H, tiles of queries, tiles of keys)."""
        n_heads = self.sequences.n * self.call.q.shape[1]
        return n_heads, self.n_tiles(config), self.n_key_tiles(config)

    def reach(self) -> float | Tensor:
        """How far below the maximum a score can matter, in units: 1/s of the score.

        A number, or (sequences * H, 1, 1).
        """
        alpha, unit = self.arguments["alpha_ptr"], float(self.arguments["unit"])
        if alpha is None:
            return 1.0 / (float(self.arguments["s"]) * unit)
        s: Tensor = (alpha - 1.0).clamp(min=SMALLEST_S.value) * unit
        return s.reciprocal().repeat(self.sequences.n).view(-1, 1, 1)

    def pick(self, plain: Table, edited: Table, exact: Table) -> Config:
        """From ``exact`` for fp32, from ``edited`` if one more tile takes room on the chip."""
        more = (self.call.mask, self.call.bias, self.call.softcap)
        is_edited = any(x is not None for x in more)
        table = exact if self.call.q.dtype == torch.float32 else edited if is_edited else plain
        return table.pick(self.target, max(self.call.q.shape[-1], self.call.v.shape[-1]))


def problem(call: Attention) -> Problem:
    q, k, v, alpha, value = call.q, call.k, call.v, call.alpha, call.alpha_value
    if alpha is not None and alpha.device != q.device:  # a number that torch.compile handed over
        value, alpha = alpha.item(), None
    B, H, N_q, D = q.shape
    H_kv, N_k = k.shape[1:3]
    target = device.target(q)
    sequences = Sequences.of(q, call.varlen, call.cu_seqlens)
    pairs = (B, H, N_q, N_k)
    s = value - 1.0
    slopes = call.slopes
    factor, unit = units_of(call.scale, call.bias, slopes, call.softcap)
    arguments = {
        **{name: Rows.of(getattr(call, name)) for name in ("q", "k")},
        **{name: Pairs.of(getattr(call, name), pairs) for name in ("mask", "bias")},
        "factor": factor,
        "unit": unit,
        "window": call.window,
        "softcap": call.softcap,
        "alpha_ptr": None
        if alpha is None
        else alpha.detach().float().reshape(-1).expand(H).contiguous(),
        "slopes_ptr": None if slopes is None else slopes.detach().float().contiguous(),
        "sequences_ptr": sequences.table,
        "s": max(s, SMALLEST_S.value) if alpha is None else 1.0,
        "H": H,
        "G": H // H_kv,
        "N_q": N_q,
        "N_k": N_k,
        "batch_step": 0 if sequences.packed else 1,
        "D": D,
        "BLOCK_D": blocks(D),
        "P": threshold.integer_exponent(s) if alpha is None and s > 0 else 0,
        "IS_CAUSAL": call.is_causal,
        "FAST": alpha is None and s >= LEAST_FAST_S and math.fast(target),
    }
    D_v = v.shape[-1]
    values = {"v": Rows.of(v), "D_V": D_v, "BLOCK_DV": blocks(D_v)}
    s_aux = None if call.s_aux is None else in_units(call.s_aux, unit)
    return Problem(call, sequences, target, arguments, values, s_aux)


def merged(tiles: Tensor, config: Config) -> Tensor:
    """Flags of whole squares from those of their tiles."""
    n_q, n_k = SQUARE // config["BLOCK_Q"], SQUARE // config["BLOCK_K"]
    if n_q == n_k == 1:
        return tiles
    squares: Tensor = tiles.unflatten(2, (-1, n_k)).unflatten(1, (-1, n_q)).amax((2, 4))
    return squares


def lists(squares: Tensor) -> TileList:
    """(sequences * H, T_q, T_k) flags -> the lists that kernels walk."""
    found = blockmask.to_lists(squares)
    return TileList(found.offsets.contiguous(), found.tiles.contiguous())

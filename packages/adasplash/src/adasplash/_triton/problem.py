"""What every attention launch shares: strides, flags, sequences and tile lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from shared_kernels import blockmask, device
from shared_kernels.configs import Config, Table
from shared_kernels.triton import math, threshold

from .._call import SQUARE, Attention
from .weights import SMALLEST_S

# Run-time values, so that no length compiles a kernel again.
LENGTHS = ["N_q", "N_k", "window", "n_iter", "n_tiles", "n_squares"]


def rows_contiguous(x: Tensor) -> Tensor:
    """x with unit stride along the head dim; other strides stay as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """Head dims, and the powers of two that hold them."""
    D, D_v = q.shape[-1], v.shape[-1]
    return {
        "D": D,
        "D_V": D_v,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": max(16, triton.next_power_of_2(D_v)),
    }


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

    q: Tensor
    k: Tensor
    v: Tensor
    sequences: Sequences
    target: device.Target
    arguments: dict[str, Any]
    flags: dict[str, Any]

    @property
    def n_squares(self) -> tuple[int, int]:
        """Squares along the queries and along the keys."""
        return triton.cdiv(self.q.shape[2], SQUARE), triton.cdiv(self.k.shape[2], SQUARE)

    def n_tiles(self, config: Config) -> int:
        """Tiles of BLOCK_Q queries; those of whole squares."""
        return self.n_squares[0] * splits(config)["SPLIT_Q"]

    def grid_of_queries(self, config: Config) -> tuple[int, ...]:
        return (self.n_tiles(config) * self.sequences.n * self.q.shape[1],)

    def tiles_of(self, config: Config) -> tuple[int, int, int]:
        """(sequences * H, tiles of queries, tiles of keys)."""
        n = self.n_squares[1] * splits(config)["SPLIT_K"]
        return self.sequences.n * self.q.shape[1], self.n_tiles(config), n

    def reach(self) -> float | Tensor:
        """1/s: how far below the maximum a score can matter. A number, or (sequences * H, 1, 1)."""
        if not self.flags["HAS_ALPHA"]:
            return 1.0 / self.arguments["s"]
        s = (self.arguments["alpha_ptr"] - 1.0).clamp(min=SMALLEST_S.value)
        return s.reciprocal().repeat(self.sequences.n).view(-1, 1, 1)

    def blocks(self) -> dict[str, int]:
        return blocks(self.q, self.v)

    def pick(self, plain: Table, edited: Table, exact: Table) -> Config:
        """From ``exact`` for fp32, from ``edited`` if a mask or a bias takes room on the chip."""
        table = edited if self.flags["HAS_MASK"] or self.flags["HAS_BIAS"] else plain
        table = exact if self.q.dtype == torch.float32 else table
        return table.pick(self.target, max(self.q.shape[-1], self.v.shape[-1]))


def problem(call: Attention) -> Problem:
    q, k, v = (rows_contiguous(x) for x in (call.q, call.k, call.v))
    alpha, value, mask, bias = call.alpha, call.alpha_value, call.mask, call.bias
    if alpha is not None and alpha.device != q.device:  # a number that torch.compile handed over
        alpha, value = None, alpha.item()
    B, H, N_q, _ = q.shape
    H_kv, N_k = k.shape[1:3]
    target = device.target(q)
    sequences = Sequences.of(q, call.varlen, call.cu_seqlens)
    per_batch = 0 if sequences.packed else 1
    pairs = (B, H, N_q, N_k)
    mask = q if mask is None else mask.expand(pairs).view(torch.uint8)
    has_mask, has_bias = mask is not q, bias is not None
    bias = bias.detach().expand(pairs) if bias is not None else q
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "alpha_ptr": q
        if alpha is None
        else alpha.detach().float().reshape(-1).expand(H).contiguous(),
        "slopes_ptr": q if call.slopes is None else call.slopes.detach().float().contiguous(),
        "mask_ptr": mask,
        "bias_ptr": bias,
        "sequences_ptr": q if sequences.table is None else sequences.table,
        **{f"stride_q{name}": q.stride(i) for i, name in enumerate("bhn")},
        **{f"stride_k{name}": k.stride(i) for i, name in enumerate("bhn")},
        **{f"stride_v{name}": v.stride(i) for i, name in enumerate("bhn")},
        **{f"stride_m{name}": mask.stride(i) if has_mask else 0 for i, name in enumerate("bhqk")},
        **{f"stride_a{name}": bias.stride(i) if has_bias else 0 for i, name in enumerate("bhqk")},
        "s": max(value - 1.0, SMALLEST_S.value) if alpha is None else 1.0,
        "scale": call.scale,
        "window": call.window or 0,
        "n_iter": call.n_iter,
        "H": H,
        "G": H // H_kv,
        "N_q": N_q,
        "N_k": N_k,
        "batch_step": per_batch,
    }
    flags = {
        "P": threshold.integer_exponent(value - 1.0) if alpha is None and value > 1.0 else 0,
        "HAS_ALPHA": alpha is not None,
        "HAS_SEQUENCES": sequences.table is not None,
        "IS_CAUSAL": call.is_causal,
        "HAS_WINDOW": call.window is not None,
        "HAS_ALIBI": call.slopes is not None,
        "HAS_MASK": has_mask,
        "HAS_BIAS": has_bias,
        "FAST": math.fast(target),
    }
    return Problem(q, k, v, sequences, target, arguments, flags)


def splits(config: Config) -> dict[str, int]:
    """How many tiles make the side of a square."""
    return {f"SPLIT_{name}": SQUARE // config[f"BLOCK_{name}"] for name in "QK"}


def merged(tiles: Tensor, config: Config) -> Tensor:
    """Flags of whole squares from those of their tiles."""
    n_q, n_k = splits(config).values()
    if n_q == n_k == 1:
        return tiles
    return tiles.unflatten(2, (-1, n_k)).unflatten(1, (-1, n_q)).amax((2, 4))


def lists(squares: Tensor) -> tuple[Tensor, Tensor]:
    """(sequences * H, T_q, T_k) flags -> offsets and tiles of :mod:`shared_kernels.blockmask`."""
    found = blockmask.to_lists(squares)
    return found.offsets.contiguous(), found.tiles.contiguous()

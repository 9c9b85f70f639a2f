"""What the operators are called with, and what their backends keep for the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks, packed
from shared_kernels.calls import replaced
from shared_kernels.ops import autocast_lower
from shared_kernels.rows import wide

from . import _checks, _geometry


class Attention(NamedTuple):
    """out_i = sum_j M_ij exp(scale q_i k_j) v_j / sum_j M_ij exp(scale q_i k_j)."""

    q: Tensor  # (B, H, N_q, D)
    k: Tensor  # (B, H_kv, N_k, D)
    v: Tensor  # (B, H_kv, N_k, D)
    windows: Tensor  # (B, H, N_q), in tokens
    landmarks: Tensor  # (B, H, K), or (B, H, lists, K) with block; -1: empty slot
    bias: Tensor | None  # landmarks' shape, log of a landmark's factor
    cu_seqlens: Tensor | None  # (S + 1,) bounds of packed sequences
    scale: float | None  # factor of the scores; None: D**-0.5
    ramp: float  # width of a window's soft edge; a hard window is one with ramp 1
    block: int | None  # queries per list of landmarks; None: one list for all
    hard: bool = False  # windows are whole numbers and ramp is 1: a pair is in the window or not

    def check(self) -> Attention:
        """The call in the operator's terms, if it is legal (ValueError or TypeError if not)."""
        # errors call the arguments by the names of dsalt_attention
        landmark_idx, block, cu_seqlens = self.landmarks, self.block, self.cu_seqlens
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            checks.floating(name, x)
        # before their dtypes are compared, as torch's attention does
        q, k, v = (x for x in autocast_lower(self.q, self.k, self.v) if x is not None)
        B, H, _, n_q, n_k, D, D_v = checks.attention_shapes(q, k, v)
        if D_v != D:
            checks.fail("V", f"have Q's head dim ({D})", D_v)
        if n_q > n_k:
            checks.fail("Q", f"have at most K's {n_k} tokens (queries are the last ones)", n_q)
        _checks.windows(self.windows, (B, H, n_q))
        _checks.ramp(self.ramp)
        checks.integer("landmark_idx", landmark_idx)
        block_causal = landmark_idx.dim() == 4
        if landmark_idx.dim() not in (3, 4) or landmark_idx.shape[:2] != (B, H):
            checks.fail(
                "landmark_idx",
                f"have shape (B={B}, H={H}, K) or (B={B}, H={H}, blocks, K)",
                tuple(landmark_idx.shape),
            )
        if cu_seqlens is not None:
            packed.check(cu_seqlens, n_k, B=B, N_q=n_q)
        if block_causal:
            if block is None:
                checks.fail(
                    "landmark_block",
                    "be given with a 4-D landmark_idx",
                    None,
                    "it says how many queries share one list of landmarks",
                )
            checks.positive_int("landmark_block", block)
            expected = _geometry.n_lists(n_q, n_k, int(block), cu_seqlens)
            if landmark_idx.shape[2] != expected:
                checks.fail(
                    "landmark_idx",
                    f"hold {expected} lists for {n_q} queries in blocks of {block}",
                    landmark_idx.shape[2],
                )
        elif block is not None:
            checks.fail("landmark_block", "be None with a 3-D landmark_idx", block)
        if self.bias is not None:
            checks.floating("landmark_bias", self.bias)
            if self.bias.shape != landmark_idx.shape:
                checks.fail(
                    "landmark_bias",
                    f"have landmark_idx's shape {tuple(landmark_idx.shape)}",
                    tuple(self.bias.shape),
                )
        if self.scale is not None:
            _checks.scale(self.scale)
        lists = {"landmark_idx": landmark_idx, "landmark_bias": self.bias}
        checks.same_device(Q=self.q, window_sizes=self.windows, **lists, cu_seqlens=cu_seqlens)
        dtype, hard = wide(self.q), self.hard or not self.windows.is_floating_point()
        return replaced(
            self,
            q=q,
            k=k,
            v=v,
            windows=self.windows.to(dtype),
            landmarks=_geometry.unique_landmarks(self.landmarks, self.k.shape[2]),
            bias=None if self.bias is None else self.bias.to(dtype),
            scale=None if self.scale is None else float(self.scale),
            ramp=1.0 if hard else float(self.ramp),
            block=None if self.block is None else int(self.block),
            hard=hard,
        )

    def fake(self) -> Tensor:
        return self.q.new_empty(self.q.shape)

    @property
    def factor(self) -> float:
        """What a product of query and key is multiplied with."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def rows(self) -> tuple[Tensor, Tensor]:
        """First visible key and landmark list of each query, (N_q,) int64 each."""
        n_q, n_k = self.q.shape[2], self.k.shape[2]
        return _geometry.row_lists(n_q, n_k, self.block, self.cu_seqlens, self.q.device)


class Normalized(NamedTuple):
    """What the attention's backward pass reads: its output and the rows' log-sum-exp.

    What is subtracted from the scores of a row is kept apart: beside 1e8 fp32 has no digits left.
    """

    out: Tensor  # (B, H, N_q, D)
    top: Tensor  # (B, H, N_q), in the units that the backend keeps scores in
    lse: Tensor  # (B, H, N_q), to the base 2, of scores less top

    @classmethod
    def fake(cls, call: Attention) -> Normalized:
        lse = call.q.new_empty(call.q.shape[:-1], dtype=wide(call.q))
        return cls(call.fake(), torch.empty_like(lse), lse)


class CausalLandmarks(NamedTuple):
    """List c holds the k best-scored tokens before c * block, (B, H, lists, k) int32."""

    scores: Tensor  # (B, H, N); -inf: never chosen
    k: int
    block: int
    cu_seqlens: Tensor | None  # lists stay in their sequence

    def check(self) -> CausalLandmarks:
        checks.positive_int("landmark_block", self.block)
        B, _, n = self.scores.shape
        if self.cu_seqlens is not None:
            packed.check(self.cu_seqlens, n, B=B)
        return replaced(self, k=int(self.k), block=int(self.block))

    def fake(self) -> Tensor:
        B, H, n = self.scores.shape
        n_lists = _geometry.n_lists(n, n, self.block, self.cu_seqlens)
        return self.scores.new_empty((B, H, n_lists, self.k), dtype=torch.int32)


class LinearCrossEntropy(NamedTuple):
    """Sum of -log softmax(hidden weight^T)[label] over the labels that are not -100."""

    hidden: Tensor  # (T, d)
    weight: Tensor  # (vocab, d)
    labels: Tensor  # (T,) int64
    chunk: int  # tokens whose logits exist at once
    with_hidden: bool  # whether the gradient of hidden will be wanted
    with_weight: bool

    def fake(self) -> Tensor:
        return self.hidden.new_empty((), dtype=wide(self.hidden))

    def fake_gradients(self, saved: LossGradients, needs: frozenset[str]) -> dict[str, Tensor]:
        dtype = saved.d_hidden.dtype  # weight has hidden's
        found = {"hidden": saved.d_hidden, "weight": saved.d_weight}
        return {field: torch.empty_like(found[field], dtype=dtype) for field in needs}


class LossGradients(NamedTuple):
    """The gradients of a summed loss, which forward makes; empty where none will be wanted."""

    d_hidden: Tensor  # (T, d) in hidden's dtype
    d_weight: Tensor  # (vocab, d), at least float32

    @classmethod
    def fake(cls, call: LinearCrossEntropy) -> LossGradients:
        hidden, weight = call.hidden, call.weight
        return cls(
            hidden.new_empty(hidden.shape if call.with_hidden else (0,)),
            weight.new_empty(weight.shape if call.with_weight else (0,), dtype=wide(hidden)),
        )

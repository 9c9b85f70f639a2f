"""AttentionOperator: one association step, dense or along the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import checks

from . import _attention, _checks


class AttentionOperator:
    """softmax(beta Q K^T) V, over all keys or over the k neighbours of each query.

    Args:
        beta: inverse temperature.
        mode: "dense", or "graph": query i sees only keys ``adj_indices[i]``, O(L k d).
        backend: what runs the association in mode "graph": "auto", "reference", "torch" or
            "triton"; ``explain`` says which it is. A dense one is PyTorch's own on every backend.

    Call with Q (L, d), K (N, d), V (N, d_v), or all with a leading batch dimension; "graph" needs
    ``adj_indices`` (L, k) int64.

    Example:
        >>> attend = AttentionOperator(beta=1.0, mode="graph")
        >>> X = torch.eye(3)
        >>> attend(X, X, X, torch.tensor([[1], [2], [0]]))
        tensor([[0., 1., 0.],
                [0., 0., 1.],
                [1., 0., 0.]])
    """

    def __init__(self, beta: float = 1.0, mode: str = "dense", *, backend: str = "auto") -> None:
        _checks.number("beta", beta)
        checks.in_set("mode", mode, _checks.ATTENTION_MODES)
        _checks.backend(backend, has_kernels=mode == "graph")
        self.beta, self.mode, self.backend = beta, mode, backend

    def __call__(
        self, Q: Tensor, K: Tensor, V: Tensor, adj_indices: Tensor | None = None
    ) -> Tensor:
        for name, x in (("Q", Q), ("K", K), ("V", V)):
            checks.floating(name, x)
            if x.dim() not in (2, 3):
                checks.fail(name, "have shape (N, d) or (B, N, d)", tuple(x.shape))
        if Q.shape[-1] != K.shape[-1]:
            checks.fail("Q", f"have the size of `K`, {K.shape[-1]}", Q.shape[-1])
        if K.shape[-2] != V.shape[-2]:
            checks.fail("V", f"have as many patterns as `K`, {K.shape[-2]}", V.shape[-2])
        q, k, v = (x[:, None] if x.dim() == 3 else x[None, None] for x in (Q, K, V))
        rule = _attention.Rule(float(self.beta), backend=self.backend)
        if self.mode == "dense":
            out = _attention.attend(q, k, v, None, rule)
        else:
            if adj_indices is None:
                checks.fail("adj_indices", "be given in mode 'graph'", None)
            checks.integer("adj_indices", adj_indices)
            if adj_indices.dim() not in (2, 3):
                checks.fail("adj_indices", "have shape (L, k)", tuple(adj_indices.shape))
            if adj_indices.shape[-2] != Q.shape[-2]:
                checks.fail(
                    "adj_indices",
                    f"have one row per query, {Q.shape[-2]}",
                    adj_indices.shape[-2],
                    "self-association needs as many queries as patterns",
                )
            if _checks.reads_values(adj_indices) and adj_indices.numel():
                low, high = (int(x) for x in adj_indices.aminmax())
                if low < 0 or high >= K.shape[-2]:
                    checks.fail("adj_indices", f"be in [0, {K.shape[-2]})", f"[{low}, {high}]")
            index = adj_indices if adj_indices.dim() == 3 else adj_indices[None]
            ok = torch.ones_like(index, dtype=torch.bool)
            out = _attention.attend_neighbours(q, k, v, index, ok, None, rule)
        return out[0, 0] if Q.dim() == 2 and K.dim() == 2 else out[:, 0]

    def __repr__(self) -> str:
        return f"AttentionOperator(beta={self.beta}, mode={self.mode!r})"

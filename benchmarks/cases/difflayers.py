"""difflayers: Hopfield layers against LayerNorm + projections + SDPA."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers import DiffusedHopfield, Hopfield

from ..registry import Row

SIZES = ((8, 128, 128, 128, 4), (2, 1024, 1024, 128, 4))  # B, L, S, d, H


def _plain(layer: Hopfield, norms: nn.ModuleList, proj: nn.ModuleList, H: int):
    """The same arithmetic from torch's own parts: three LayerNorms, four projections, SDPA."""

    def run(stored: Tensor, state: Tensor, values: Tensor) -> Tensor:
        inputs = (state, stored, values)
        q, k, v = (
            p(n(x)).unflatten(-1, (H, -1)).transpose(1, 2)
            for p, n, x in zip(proj[:3], norms, inputs, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return proj[3](out.transpose(1, 2).flatten(-2))

    return run


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    for B, L, S, d, H in SIZES:
        stored, values = (torch.randn(B, S, d, device=device) for _ in range(2))
        state = torch.randn(B, L, d, device=device)
        triple = (stored, state, values)
        layer = Hopfield(input_size=d, num_heads=H, batch_first=True).to(device).eval()
        three = Hopfield(input_size=d, num_heads=H, update_steps_max=2).to(device).eval()
        diffused = DiffusedHopfield(input_size=d, num_heads=H).to(device).eval()
        norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3)).to(device)
        hidden = d // H * H
        proj = nn.ModuleList(nn.Linear(d, hidden) for _ in range(4)).to(device)
        plain = _plain(layer, norms, proj, H)
        size = f"B{B} L{L} S{S} d{d} H{H}"

        def run(m, triple=triple):
            with torch.no_grad():
                return m(triple)

        def exact(m, triple=triple):
            wide = tuple(x.double() for x in triple)
            m.double()
            try:
                with torch.no_grad():
                    m.get_association_matrix(wide)  # the written-out softmax, not SDPA
                    return m(wide)
            finally:
                m.float()

        def peer(triple=triple, plain=plain):
            with torch.no_grad():
                return plain(*triple)

        for name, module, bar in (
            ("Hopfield, 1 update", layer, {"LayerNorm + projections + SDPA": round(1 / 1.15, 3)}),
            ("Hopfield, 3 updates", three, {"Hopfield, 1 update": round(1 / 3.5, 3)}),
            ("DiffusedHopfield, cached graph", diffused, {"Hopfield, 1 update": 1 / 2.5}),
        ):
            peers = {"LayerNorm + projections + SDPA": peer}
            if module is not layer:
                peers["Hopfield, 1 update"] = lambda layer=layer: run(layer)
            yield Row(
                f"difflayers/{name}",
                size,
                ours=lambda m=module, run=run: run(m),
                exact=lambda m=module, exact=exact: exact(m),
                peers=peers,
                bars=bar,
            )

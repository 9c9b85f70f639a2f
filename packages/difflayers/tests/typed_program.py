"""A program that type checkers read under --strict: names, arguments and results have types."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import difflayers
from difflayers import (
    AttentionOperator,
    DiffusedHopfield,
    DiffusionConfig,
    DynamicsEngine,
    EnergyTracker,
    FactoredDiffusion,
    GraphBuilder,
    GraphCache,
    Hopfield,
    HopfieldEncoderLayer,
    HopfieldLayer,
    HopfieldPooling,
    LaplacianBuilder,
    apply_diffusion,
    energy,
    explain,
    retrieve,
)


def diffmax(scores: Tensor, dim: int) -> Tensor:
    return scores.softmax(dim)


class Model(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.memory = DiffusedHopfield(size, num_heads=2, eta=0.2, separation=diffmax, dropout=0.1)
        self.pooling = HopfieldPooling(size, quantity=2, num_heads=2, batch_first=True)
        self.lookup = HopfieldLayer(size, quantity=4, scaling=0.5)
        self.encoder = HopfieldEncoderLayer(size, 2, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.memory.forward((x, x, x), association_mask=None)
        x = self.encoder.forward(self.lookup.forward(x))
        return self.pooling.forward(x)


def main() -> list[float]:
    x = torch.randn(2, 9, 8)
    model = Model(8)
    out: Tensor = model.forward(x)
    weights: Tensor = model.memory.get_association_matrix(x)
    first: bool = model.pooling.batch_first
    eta: float = model.memory.eta
    neighbours: int = model.memory.k_neighbors
    size: int | None = Hopfield(8).hidden_size
    config: DiffusionConfig = model.memory.config
    settings: dict[str, object] = config.to_dict()
    graph = GraphCache(config).get(x[0])
    W, deg, index = GraphBuilder(4, use_sparse=True).build(x[0])
    L: Tensor = LaplacianBuilder().build(W)
    smooth: Tensor = apply_diffusion(x[0], L, eta)
    operator = FactoredDiffusion(eta, steps=2).precompute_from_graph(W, deg)
    tracker = EnergyTracker()
    engine = DynamicsEngine(operator, AttentionOperator(2.0), config)
    states, keys = engine.run(x[0], x[0], x[0], tracker)
    found = retrieve(x[0], states, separation="sparsemax")
    energies: Tensor = energy(x[0], found.patterns)
    text: str = explain(model.memory, x)
    version: str = difflayers.__version__
    parts = [out, weights, graph.W, index, smooth, keys, energies]
    numbers = [float(p.to_dense().sum()) for p in parts]
    return [
        *numbers,
        eta,
        float(neighbours + len(settings) + first),
        size or 0.0,
        *([float(len(text + version))]),
    ]


if __name__ == "__main__":
    print(main())

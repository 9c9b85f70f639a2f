"""Gradients: against finite differences, through tiles, and through a learned memory."""

import pytest
import torch

import difflayers as d
from difflayers import _attention
from shared_kernels.testing import assert_close

from .cases import MODES, data_of, randn, spread

DIFFERENCES = 1e-6  # gradcheck: what differences of float64 know of a derivative


def _gradcheck(memory, data):
    names = [n for n, _ in memory.named_parameters()][:4]
    parameters = [p.detach().requires_grad_() for _, p in memory.named_parameters()][:4]

    def run(stored, state, projection, *weights):
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(memory, named, ((stored, state, projection),))

    inputs = [x.requires_grad_() for x in data]
    assert torch.autograd.gradcheck(run, (*inputs, *parameters), atol=DIFFERENCES)


@pytest.mark.parametrize("separation", ["softmax", "entmax15"])
def test_hopfield(separation):
    memory = spread(d.Hopfield(4, num_heads=2, update_steps_max=1, separation=separation)).double()
    _gradcheck(memory, data_of(memory, L=2, S=4, dtype=torch.float64))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_diffused(mode, sparse):
    """The graph is a constant: finite differences of the value inputs, exact elsewhere."""
    memory = spread(
        d.DiffusedHopfield(4, diffusion_mode=mode, eta=0.3, k_neighbors=2, use_sparse=sparse)
    ).double()
    stored, state, projection = data_of(memory, B=1, L=2, S=5, dtype=torch.float64)
    state, projection = state.requires_grad_(), projection.requires_grad_()

    def run(state, projection, gain):
        memory.norm_stored_pattern.weight.data.copy_(gain.detach())
        named = {"norm_stored_pattern.weight": gain}
        return torch.func.functional_call(memory, named, ((stored, state, projection),))

    gain = torch.linspace(0.5, 1.5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (state, projection, gain), atol=DIFFERENCES)


def test_gradient_of_the_stored_patterns_is_that_of_a_constant_graph():
    from difflayers import _reference

    memory = spread(d.DiffusedHopfield(4, eta=0.3, k_neighbors=2, use_sparse=True)).double()
    stored, state, projection = data_of(memory, B=1, L=2, S=6, dtype=torch.float64)
    stored.requires_grad_()
    (ours,) = torch.autograd.grad(memory((stored, state, projection)).square().sum(), stored)
    L = _reference.laplacian(_reference.adjacency(stored.detach()[0], 2), True)
    key = _reference.diffuse(memory.norm_stored_pattern(stored[0]), L, "factored", 0.3, 3)[None]
    core = memory.association_core
    q, k, v = core.heads(
        memory.norm_state_pattern(state), key, memory.norm_pattern_projection(projection)
    )
    out = core.output(_reference.associate(q, k, v, memory.scaling))
    (exact,) = torch.autograd.grad(out.square().sum(), stored)
    assert_close(ours, exact, "gradient")


@pytest.mark.parametrize(
    "options",
    [
        {"separation": "sparsemax"},
        {"use_logit_diffusion": True},
        {"attention_mode": "graph", "k_neighbors": 3},
    ],
    ids=lambda o: next(iter(o)),
)
def test_tiles_change_nothing(options, monkeypatch):
    memory = spread(d.DiffusedHopfield(8, num_heads=2, **options))
    data = [x.requires_grad_() for x in data_of(memory, L=11, S=9)]
    mask = torch.zeros(11, 9, dtype=torch.bool)
    mask[2, 3] = mask[9, :5] = True

    def run():
        out = memory(tuple(data), association_mask=mask)
        return out, *torch.autograd.grad(out.square().sum(), data)

    whole = run()
    monkeypatch.setattr(_attention, "TILE", 120)
    for ours, exact in zip(run(), whole, strict=True):
        assert_close(ours, exact, "gradient")


def test_learned_memory_trains():
    torch.manual_seed(0)
    memory = d.DiffusedHopfield(8, num_heads=2, k_neighbors=3)
    bank = torch.nn.Parameter(randn(1, 16, 8))
    values = torch.nn.Parameter(randn(1, 16, 8, seed=1))
    x, target = randn(4, 10, 8, seed=2), randn(4, 10, 8, seed=3)
    optimizer = torch.optim.Adam([*memory.parameters(), bank, values], lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = memory((bank.expand(4, -1, -1), x, values.expand(4, -1, -1)))
        loss = (out - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

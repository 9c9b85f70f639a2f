"""Models built of several packages: trained, compiled, cast, recomputed, saved, exported, shared.

The models are the lessons examples/mixed_model.py and examples/retrieval_model.py.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from shared_kernels.testing import assert_close

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def lesson(name):
    """A module of examples/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mixed(dtype=torch.float32):
    """A language model of all kinds of layers, and ids to feed it."""
    torch.manual_seed(0)
    model = lesson("mixed_model").MixedLM(vocab=20, d_model=32, n_heads=4).to(dtype)
    # off their starting points, where tau = -1 and equal biases hide mistakes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tau" in name or "biases" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.randint(0, 20, (2, 70))


def retrieval(dtype=torch.float32):
    """The memory model on random features, and queries."""
    torch.manual_seed(0)
    stored, labels = torch.randn(40, 8, dtype=dtype), torch.randint(0, 10, (40,))
    return lesson("retrieval_model").Retrieval(stored, labels).to(dtype), 2 * torch.randn(
        30, 8, dtype=dtype
    )


each_model = pytest.mark.parametrize("build", [mixed, retrieval], ids=lambda f: f.__name__)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@each_model
def test_every_parameter_is_trained(build):
    model, x = build()
    found = gradients(model, model(x).square().mean())
    assert all(g.abs().max() > 0 for g in found.values())


def test_the_mixed_model_learns():
    module = lesson("mixed_model")
    torch.manual_seed(0)
    ids = torch.arange(20).repeat(30)  # 0 1 2 … 19 0 1 …
    model = module.MixedLM(vocab=20, d_model=32, n_heads=4)
    losses = module.train(model, ids, steps=40, length=48, batch=4)
    assert losses[0] > 2.5 and losses[-1] < 0.5
    ids = torch.arange(20).repeat(3)[None]
    assert torch.equal(model.eval().generate(ids[:, :40], 20), ids)


def test_the_retrieval_model_learns():
    module = lesson("retrieval_model")
    torch.manual_seed(0)
    centres = 3 * torch.randn(10, 8)
    labels = torch.arange(10).repeat(12)
    x = centres[labels] + 0.5 * torch.randn(120, 8)
    model = module.Retrieval(x[:40], labels[:40])
    losses = module.train(model, x[40:], labels[40:], 30)
    assert losses[-1] < 0.2 < losses[0]
    weights = model.weights(x[40:])
    assert (weights == 0).float().mean() > 0.5
    assert_close(weights.sum(-1), torch.ones(80))


def test_the_mixed_model_is_causal():
    model, ids = mixed()
    model.eval()
    changed = ids.clone()
    changed[:, 50:] = (ids[:, 50:] + 1) % 20
    before, after = model(ids), model(changed)
    assert_close(after[:, :50], before[:, :50])
    assert (after[:, 50:] - before[:, 50:]).abs().max() > 1e-2


@pytest.mark.parametrize("cuts", [[1, 2, 3], [40], [69], [33, 64]], ids=str)
def test_one_cache_serves_every_kind_of_layer(cuts):
    model, ids = mixed()
    model.eval()
    pieces, caches, start = [], None, 0
    for end in [*cuts, ids.shape[1]]:
        logits, caches = model.extend(ids[:, start:end], caches, use_cache=True)
        pieces.append(logits)
        start = end
    assert_close(torch.cat(pieces, 1), model(ids))


@pytest.mark.system
@each_model
def test_compiles_whole(build):
    model, x = build()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = gradients(model, model(x).square().mean())
    found = gradients(model, compiled(x).square().mean())
    assert_close(compiled(x), model(x))
    for name, gradient in exact.items():
        assert_close(found[name], gradient, "gradient")


@each_model
def test_autocast(build):
    model, x = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = model(x)
    exact = model(x)
    # bfloat16 keeps 8 bits; a few layers of it
    assert (lower.float() - exact).norm() < 0.05 * exact.norm()
    assert all(g.isfinite().all() for g in gradients(model, lower.float().square().mean()).values())


def test_recomputed_blocks_give_the_same_gradients():
    model, ids = mixed()
    exact = gradients(model, model(ids).square().mean())
    x = model.embed(ids)
    for block in model.blocks:
        x = checkpoint(lambda x, block=block: block(x)[0], x, use_reentrant=False)
    found = gradients(model, model.head(model.norm(x)).square().mean())
    assert all(torch.equal(found[name], exact[name]) for name in exact)


@each_model
def test_state_dict_round_trip(build, tmp_path):
    model, x = build()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other, _ = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), model(x))


@pytest.mark.system
@each_model
def test_export(build):
    model, x = build()
    model.eval()
    exported = torch.export.export(model, (x,))
    assert_close(exported.module()(x), model(x))


def _rank(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, ids = mixed(torch.float64)
    shared = torch.nn.parallel.DistributedDataParallel(model)
    shared(ids[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, folder / "grads.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo through a FileStore is tested on Unix")
@pytest.mark.thorough
def test_two_processes_give_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    model, ids = mixed(torch.float64)
    exact = gradients(model, model(ids).square().mean())
    for name, found in torch.load(tmp_path / "grads.pt", weights_only=True).items():
        assert_close(found, exact[name], "gradient")


@pytest.mark.tools
@pytest.mark.parametrize(("name", "steps"), [("mixed_model", 2), ("retrieval_model", 3)])
def test_the_lessons_run(name, steps, tmp_path, capsys):
    lesson(name).main(["--steps", str(steps), "--out", str(tmp_path)])
    assert "drew" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_losses_are_what_pytorch_says():
    """The retrieval model's log-probabilities are probabilities."""
    model, x = retrieval()
    total = model(x).exp().sum(-1)
    assert_close(total, torch.ones_like(total))
    labels = torch.randint(0, 10, (30,))
    assert F.nll_loss(model(x), labels) > 0

import copy

import pytest
import torch

from difflayers import Hopfield, _ops, _reference, explain
from difflayers._call import Association, LogSumExp, NeighbourAttention, NeighbourSum, States
from shared_kernels import dispatch, native, ops
from shared_kernels.calls import replaced
from shared_kernels.testing import assert_close, contracts, others_thorough

from .cases import data_of, randn, spread

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("torch", "cpu", "reference")


def some_sum(dtype=torch.float32, requires_grad=False, columns=3):
    """A sum over a symmetric matrix, and that matrix."""
    A = torch.zeros(6, 6, dtype=dtype)
    for i, j, w in ((0, 1, 0.5), (1, 4, 0.25), (2, 3, 1.5), (0, 5, 0.75)):
        A[i, j] = A[j, i] = w
    csr = A.float().to_sparse_csr()
    crow, col = csr.crow_indices().clone(), csr.col_indices().clone()
    x = randn(6, columns, dtype=dtype).requires_grad_(requires_grad)
    val = csr.values().to(dtype).clone().requires_grad_(requires_grad)
    return NeighbourSum(x, crow, col, val), A


def some_attention(dtype=torch.float32, requires_grad=False):
    """Lists with a repeated pattern, empty places, and a state without any neighbour."""
    q, k, v = (
        randn(*shape, seed=seed, dtype=dtype).requires_grad_(requires_grad)
        for seed, shape in enumerate(((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 3)))
    )
    index = torch.tensor([[0, 1, 5], [2, -1, -1], [-1, -1, -1], [3, 4, 0], [1, 1, 3]])
    return NeighbourAttention(q, k, v, index.expand(2, -1, -1).contiguous(), 0.7)


def some_association(dtype=torch.float32, requires_grad=False, shape=(2, 2, 5, 6, 4, 3), steps=2):
    """One state sees nothing, another one a single pattern."""
    B, H, L, S, D, D_v = shape
    q, k, v = (
        randn(*shape, seed=seed, dtype=dtype).requires_grad_(requires_grad)
        for seed, shape in enumerate(((B, H, L, D), (B, H, S, D), (B, H, S, D_v)))
    )
    mask = randn(B, 1, L, S, seed=7) > -0.5
    mask[:, :, 0] = False
    mask[:, :, 1:2, 1:] = False
    return Association(q, k, v, mask, 0.7, steps, requires_grad)


OPS = {
    "neighbour_sum": (_ops.neighbour_sum, lambda *a: some_sum(*a)[0], ("x", "val")),
    "neighbour_attention": (_ops.neighbour_attention, some_attention, ("q", "k", "v")),
    "association": (_ops.association, some_association, ("q", "k", "v")),
}
needs_library = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
ON_BACKENDS = [(name, backend) for name in OPS for backend in BACKENDS]
ON_BACKENDS += [pytest.param("association", "native", marks=needs_library)]


class TestNeighbourSum(contracts.OpContract):
    op = staticmethod(_ops.neighbour_sum.overload)

    def samples(self):
        calls = [some_sum(torch.float32, True)[0], some_sum(columns=1)[0]]
        return [*map(tuple, calls), (*calls[0], "reference")]


class TestNeighbourSumBackward(contracts.OpContract):
    op = staticmethod(_ops.neighbour_sum.backward)

    def samples(self):
        call = some_sum()[0]
        return [(randn(6, 3, seed=5), *call, needs) for needs in ("x", "val", "x,val")]


class TestNeighbourAttention(contracts.OpContract):
    op = staticmethod(_ops.neighbour_attention.overload)

    def samples(self):
        call = some_attention(torch.float32, True)
        return [tuple(call), (*call, "reference")]


class TestAssociation(contracts.OpContract):
    op = staticmethod(_ops.association.overload)

    def samples(self):
        call = some_association(torch.float32, True)
        added = call._replace(mask=randn(5, 6, seed=8), k=call.k.detach(), steps=0)
        return [tuple(call), tuple(added), (*call, "torch"), (*call, "reference")]


class TestAssociationBackward(contracts.OpContract):
    op = staticmethod(_ops.association.backward)

    def samples(self):
        call = some_association()._replace(save=True)
        _, *slots = _ops.association.overload(*call)
        return [(randn(2, 2, 5, 3, seed=5), *call, *slots, "q,k,v")]


class TestNeighbourAttentionBackward(contracts.OpContract):
    op = staticmethod(_ops.neighbour_attention.backward)

    def samples(self):
        call = some_attention()
        out, *saved = _ops.neighbour_attention.overload(*call)
        return [(randn(*out.shape, seed=5), *call, out, *saved, "q,k,v")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, backend", ON_BACKENDS)
def test_value_and_gradients(name, dtype, backend):
    op, make, fields = OPS[name]
    if (backend, dtype) == ("native", torch.float64):
        with pytest.raises(NotImplementedError, match="takes fp32, fp16 and bf16"):
            op(make(dtype, True), backend)
        return
    call, exact_call = make(dtype, True), make(torch.float64, False)
    exact_call = exact_call._replace(
        **{f: getattr(call, f).detach().double().requires_grad_() for f in fields}
    )
    out, exact = op(call, backend), getattr(_reference, name)(exact_call)
    assert dispatch.last(f"difflayers::{name}") == backend.replace("cpu", "torch")
    assert out.dtype == dtype
    assert_close(out, exact)
    weight = randn(*out.shape, seed=4, dtype=dtype)
    ours = torch.autograd.grad(out, [getattr(call, f) for f in fields], weight)
    theirs = torch.autograd.grad(exact, [getattr(exact_call, f) for f in fields], weight.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, "gradient")


@pytest.mark.parametrize("backend", others_thorough(BACKENDS))
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives(name, backend):
    op, make, fields = OPS[name]
    call = make(torch.float64, True)

    def run(*tensors):
        return op(call._replace(**dict(zip(fields, tensors, strict=True))), backend)

    def gradient(*tensors):
        return torch.autograd.grad(run(*tensors).square().sum(), tensors, create_graph=True)

    tensors = [getattr(call, f) for f in fields]
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradcheck(gradient, tensors)


@pytest.mark.parametrize("name, backend", ON_BACKENDS)
def test_vmap_is_a_loop_over_the_batch(name, backend):
    op, make, fields = OPS[name]
    call = make(torch.float32, False)
    first = getattr(call, fields[0])
    many = torch.stack((first, first.flip(0), 0.5 * first))

    def loss(x):
        return op(replaced(call, **{fields[0]: x}), backend).square().sum()

    found = torch.vmap(torch.func.grad(loss))(many)
    for one, x in zip(found, many, strict=True):
        assert_close(one, torch.func.grad(loss)(x), "gradient")


@pytest.mark.parametrize("name", ["neighbour_sum", "neighbour_attention"])
def test_same_bits_twice_and_tile_by_tile(name, monkeypatch):
    from difflayers import _torch

    op, make, _ = OPS[name]
    call = make(torch.float32, False)
    out = op(call, "torch")
    assert torch.equal(out, op(call, "torch"))
    monkeypatch.setattr(_torch, "_TILE", 20)
    assert torch.equal(out, op(call, "torch"))


def test_weights_of_each_edge_have_their_own_gradient():
    call, A = some_sum(torch.float64, True)
    g = randn(6, 3, seed=1, dtype=torch.float64)
    dx, d_val = torch.autograd.grad(_ops.neighbour_sum(call), (call.x, call.val), g)
    assert_close(dx, A.T @ g, "gradient")
    rows = torch.arange(6).repeat_interleave(call.crow.diff())
    assert_close(d_val, (g[rows] * call.x[call.col]).sum(-1).detach(), "gradient")


def test_checks_name_the_field():
    call, attention = some_sum()[0], some_attention()
    with pytest.raises(ValueError, match="`crow` must have shape"):
        call._replace(crow=call.crow[1:]).check()
    for field in ("k", "v", "neighbours"):
        with pytest.raises(ValueError, match=f"`{field}` must have shape"):
            attention._replace(**{field: getattr(attention, field)[1:]}).check()
    assert attention.check() is attention
    assert LogSumExp.fake(attention).lse.shape == (2, 2, 5)


@pytest.mark.system
@pytest.mark.parametrize("name", OPS)
def test_an_exported_program_becomes_torch_operators_alone(name):
    op, make, fields = OPS[name]
    call = make(torch.float32, False)

    class Module(torch.nn.Module):
        def forward(self, x):
            return op(replaced(call, **{fields[0]: x}))

    x = getattr(call, fields[0])
    program = torch.export.export(Module(), (x,), strict=False).run_decompositions(
        ops.decompositions()
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("difflayers" in target for target in targets)
    assert_close(program.module()(x), op(call))


@needs_library
def test_threads_change_no_bit_of_an_association():
    call = some_association(torch.float32, True, (2, 3, 60, 70, 16, 16), 3)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            out = _ops.association(call, "native")
            found.append((out, *torch.autograd.grad(out.square().sum(), call[:3])))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_an_association_refuses():
    call = some_association()
    for changed, match in (
        ({"k": call.k[1:]}, "`k` must have shape"),
        ({"v": call.v[:, 1:]}, "`v` must have shape"),
        ({"steps": -1}, "`steps` must be at least 0"),
        ({"mask": call.mask[..., 1:]}, "`mask` must broadcast"),
        ({"mask": torch.zeros(5, 6, requires_grad=True)}, "`mask` must want no gradient"),
    ):
        with pytest.raises(ValueError, match=match):
            call._replace(**changed).check()
    assert States.fake(call).sums.numel() == 0


@pytest.mark.skipif("avx2" not in native.instruction_sets(), reason="not quicker without AVX2")
def test_a_layer_with_updates_is_one_op():
    """With its gradients, and masks of both kinds; not where one of them wants a gradient."""
    layer = Hopfield(8, num_heads=2, update_steps_max=3, scaling=0.9)
    spread(layer)
    data = data_of(layer)
    hidden = torch.tensor([[False] * 5 + [True], [False] * 6])
    added = randn(4, 6, seed=9)
    for masks in ({}, {"stored_pattern_padding_mask": hidden}, {"association_mask": added}):
        with torch.no_grad():
            assert "difflayers::association" in explain(layer, data, **masks)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        out = layer(data, **masks)
        ours = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        assert dispatch.last("difflayers::association") == "native"
        wide = copy.deepcopy(layer).double()
        exact = wide(
            tuple(x.double() for x in data),
            **{n: m if m.dtype == torch.bool else m.double() for n, m in masks.items()},
        )
        assert_close(out, exact)
        theirs = torch.autograd.grad(
            exact.square().sum(), list(wide.parameters()), allow_unused=True
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b, "gradient")
    wants = added.clone().requires_grad_()
    layer(data, association_mask=wants).square().sum().backward()
    assert wants.grad is not None and bool((wants.grad != 0).any())

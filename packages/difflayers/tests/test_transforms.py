"""Every layer, separation and diffusion mode under torch's transforms, and with nothing to do."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import difflayers as d
from shared_kernels.testing import assert_close, others_thorough, pairwise

from .cases import MODES, data_of, randn, spread

DIFFERENCES = 1e-6  # gradgradcheck: what differences of float64 know of a derivative

SEPARATIONS = ("softmax", "entmax15", "sparsemax")
LAYERS = {
    **{f"hopfield {s}": ("Hopfield", {"separation": s}) for s in SEPARATIONS},
    "updates": ("Hopfield", {"update_steps_max": 2}),
    "per head": ("Hopfield", {"scaling": torch.tensor([0.5, 1.0])}),
    "pooling": ("HopfieldPooling", {"separation": "entmax15", "quantity": 2}),
    "layer": ("HopfieldLayer", {"separation": "sparsemax", "quantity": 5}),
    **{f"diffused {m}": ("DiffusedHopfield", {"diffusion_mode": m}) for m in MODES},
    "sparse": ("DiffusedHopfield", {"use_sparse": True, "separation": "entmax15"}),
    "logit": ("DiffusedHopfield", {"use_logit_diffusion": True, "separation": "sparsemax"}),
    "adaptive": ("DiffusedHopfield", {"adaptive_eta": True, "separation": "entmax15"}),
    "both": ("DiffusedHopfield", {"diffuse_query": True, "diffuse_value": True}),
    **{
        f"graph {s}": ("DiffusedHopfield", {"attention_mode": "graph", "separation": s})
        for s in SEPARATIONS
    },
    "encoder": ("HopfieldEncoderLayer", {}),
    "decoder": ("HopfieldDecoderLayer", {}),
}


def make(name, **more):
    cls, options = LAYERS[name]
    if cls.endswith("coderLayer"):
        layer = getattr(d, cls)(8, 2, 16, 0.0, **more)
    else:
        layer = getattr(d, cls)(8, num_heads=2, **copy.deepcopy(options), **more)
    return spread(layer).eval()


def arguments(layer, N=9, B=2, dtype=torch.float32, seed=0):
    x = randn(B, N, 8, seed=seed, dtype=dtype)
    return (x, randn(B, 4, 8, seed=7, dtype=dtype)) if "Decoder" in type(layer).__name__ else (x,)


# every kind of path once; the others repeat the proof, and --thorough runs them too
ONCE = ("hopfield softmax", "layer", "diffused heat", "sparse", "logit", "graph softmax", "decoder")


@pytest.fixture(
    params=[n if n in ONCE else pytest.param(n, marks=pytest.mark.thorough) for n in LAYERS]
)
def layer(request):
    return make(request.param)


# what compiles takes long and differs in little; --thorough and -m slow compile the others, too
COMPILED = ("hopfield entmax15", "sparse")
COMPILED_TOO = ("hopfield softmax", "diffused heat", "graph softmax")


def compiled(name):
    marks = [] if name in COMPILED else [pytest.mark.thorough]
    return pytest.param(name, marks=marks if name in COMPILED + COMPILED_TOO else pytest.mark.slow)


@pytest.mark.system
@pytest.mark.parametrize("name", [compiled(name) for name in LAYERS])
def test_compiled_without_graph_breaks(name):
    layer = make(name)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for N in (9, 4):
        args = [a.requires_grad_() for a in arguments(layer, N)]
        out, exact = compiled(*args), layer(*args)
        assert_close(out, exact)
        grads = (torch.autograd.grad(x.square().sum(), args) for x in (out, exact))
        for a, b in zip(*grads, strict=True):
            assert_close(a, b, "gradient")


@pytest.mark.system
def test_traced(layer):
    first = arguments(layer)
    others = [arguments(layer, N, B, seed=3) for N, B in ((9, 2), (4, 2), (30, 3))]
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            layer(*first)  # what is kept does not become a constant of the trace
            traced = torch.jit.trace(layer, first)
            for other in others:
                assert_close(traced(*other), layer(*other))


@pytest.mark.system
def test_a_trace_is_not_cut_by_its_example(monkeypatch):
    from difflayers import _attention, _nearest

    monkeypatch.setattr(_attention, "TILE", 64)
    monkeypatch.setattr(_nearest, "_TILE", 64)
    for name in ("logit", "adaptive", "graph softmax", "hopfield sparsemax"):
        layer = make(name)
        traced = torch.jit.trace(layer, arguments(layer, 20))
        assert_close(traced(*arguments(layer, 31)), layer(*arguments(layer, 31)))


@pytest.mark.system
def test_heat_with_the_plain_laplacian_reads_a_degree_or_says_so():
    layer = d.DiffusedHopfield(8, diffusion_mode="heat", use_normalized_laplacian=False)
    x = randn(2, 9, 8)
    for call in (
        lambda: torch.jit.trace(layer, (x,)),
        lambda: torch.vmap(layer)(x[:, None]),
        lambda: layer.to("meta")(x.to("meta")),
    ):
        with pytest.raises(NotImplementedError, match="use_normalized_laplacian"):
            call()


@pytest.mark.system
@pytest.mark.parametrize(
    "layer",
    others_thorough(sorted(LAYERS, key=lambda name: name not in COMPILED), 2),
    indirect=True,
)
def test_exported_for_any_number_of_patterns(layer):
    args = arguments(layer, 9)
    N = torch.export.Dim("N", min=2, max=5000)
    shapes = ({1: N}, None) if len(args) == 2 else ({1: N},)
    program = torch.export.export(layer, args, dynamic_shapes=shapes).module()
    for n in (2, 4, 30):
        args = arguments(layer, n)
        assert_close(program(*args), layer(*args))


UNTIL = [
    ("Hopfield", {}),
    ("Hopfield", {"separation": "entmax15"}),
    ("Hopfield", {"update_steps_max": torch.tensor([3, -1])}),
    ("Hopfield", {"update_steps_max": 4, "update_steps_eps": 0.1}),
    ("DiffusedHopfield", {"use_logit_diffusion": True}),
]


@pytest.mark.system
@pytest.mark.parametrize(
    ("cls", "options"),
    [*UNTIL[:1], *(pytest.param(*c, marks=pytest.mark.thorough) for c in UNTIL[1:])],
)
def test_updates_until_nothing_moves_are_exported_and_not_traced(cls, options):
    options = {"update_steps_max": None, "scaling": 0.6, **options}
    layer = spread(getattr(d, cls)(8, num_heads=2, **options))
    N = torch.export.Dim("N", min=2, max=5000)
    x = randn(2, 9, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: N},)).module()
    for n in (9, 4, 30):
        assert_close(program(randn(2, n, 8, seed=n)), layer(randn(2, n, 8, seed=n)))
    with pytest.raises(NotImplementedError, match="update_steps_max"):
        torch.jit.trace(layer, (x,))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == x.shape


def test_vmapped(layer):
    many = [torch.stack([a, a.flip(0) * 0.5]) for a in arguments(layer)]
    out = torch.vmap(layer)(*many)
    for i in range(2):
        assert_close(out[i], layer(*(a[i] for a in many)))


def test_jacobians_and_gradients_per_sample(layer):
    args = arguments(layer, 5, 1)

    def run(x):
        return layer(x, *args[1:]).square().sum((0, 1))[:2]

    plain = torch.autograd.functional.jacobian(run, args[0])
    batched = torch.autograd.functional.jacobian(run, args[0], vectorize=True)
    assert_close(batched, plain, "gradient")
    assert_close(torch.func.jacrev(run)(args[0]), plain, "gradient")
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x, *rest = arguments(layer, 5, 3)

    def loss(parameters, one, *rest):
        out = torch.func.functional_call(layer, parameters, (one[None], *rest))
        return out.square().sum()

    rest = [r[:1] for r in rest]
    in_dims = (None, 0, *[None] * len(rest))
    each = torch.vmap(torch.func.grad(loss), in_dims=in_dims)(parameters, x, *rest)
    for i in range(3):
        alone = torch.func.grad(loss)(parameters, x[i], *rest)
        for name, grad in alone.items():
            assert_close(each[name][i], grad, "gradient")


def test_fake_and_meta_tensors_have_its_shapes(layer):
    args = arguments(layer)
    exact = layer(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = layer(*(mode.from_tensor(a) for a in args))
    assert fake.shape == exact.shape and fake.dtype == exact.dtype
    meta = copy.deepcopy(layer).to("meta")(*(a.to("meta") for a in args))
    assert meta.shape == exact.shape and meta.is_meta
    assert torch.equal(layer(*args), exact)


def test_made_on_meta_and_initialised(layer):
    name = type(layer).__name__
    kind = next(k for k, (c, _) in LAYERS.items() if c == name)
    with torch.device("meta"):
        empty = make_plain(kind)
    filled = empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*filled.parameters(), *filled.buffers()):
            tensor.fill_(1e9)
    filled.reset_parameters()
    for tensor in (*filled.parameters(), *filled.buffers()):
        assert tensor.abs().max() <= 1.5
    assert bool(filled(*arguments(layer)).isfinite().all())


def make_plain(name):
    cls, options = LAYERS[name]
    if cls.endswith("coderLayer"):
        return getattr(d, cls)(8, 2, 16, 0.0)
    return getattr(d, cls)(8, num_heads=2, **copy.deepcopy(options))


@pytest.mark.parametrize(
    "name",
    [
        *("hopfield sparsemax", "sparse", "graph softmax"),
        *(
            pytest.param(n, marks=pytest.mark.thorough)
            for n in ("hopfield entmax15", "pooling", "layer", "logit", "graph entmax15")
        ),
    ],
)
def test_twice_differentiable(name, monkeypatch):
    layer = make(name).double()
    args = [a.requires_grad_() for a in arguments(layer, 4, 1, torch.float64)]
    if isinstance(layer, d.DiffusedHopfield):
        # the graph is a constant
        x = args[0].detach()
        args = [randn(1, 3, 8, dtype=torch.float64, seed=4).requires_grad_()]
        run = lambda q: layer((x, q, x))  # noqa: E731
    else:
        run = layer
    if "graph" in name:
        assert torch.autograd.gradgradcheck(run, args, atol=DIFFERENCES)
    from difflayers import _attention

    monkeypatch.setattr(_attention, "TILE", 16)
    assert torch.autograd.gradgradcheck(run, args, atol=DIFFERENCES)


def test_softmax_is_twice_differentiable_or_says_what_it_lacks():
    layer = make("hopfield softmax").double()
    x = randn(1, 4, 8, dtype=torch.float64).requires_grad_()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(layer, (x,), atol=DIFFERENCES)


@pairwise(
    empty=["B", "S", "L"],
    cls=[d.Hopfield, d.DiffusedHopfield],
    separation=SEPARATIONS,
    steps=[0, 2, None],
)
def test_with_nothing_to_do(empty, cls, separation, steps):
    sizes = {"B": 2, "S": 5, "L": 3, empty: 0}
    options = [{}]
    if cls is d.DiffusedHopfield:
        options = [
            {"diffusion_mode": m, "diffuse_query": True, "diffuse_value": True, "use_sparse": s}
            for m in MODES
            for s in (True, False)
        ]
        options += [{"use_logit_diffusion": True}, {"adaptive_eta": True}]
        options += [{"use_normalized_laplacian": False, "eta": 0.01}]
        options += [{"attention_mode": "graph"}] if steps is not None else []
    for more in options:
        layer = cls(
            8,
            num_heads=2,
            separation=separation,
            update_steps_max=steps,
            disable_out_projection=True,
            **more,
        )
        layer = spread(layer)
        data = tuple(x.requires_grad_() for x in data_of(layer, **sizes))
        padding = torch.zeros(sizes["B"], sizes["S"], dtype=torch.bool)
        for mask in (None, padding):
            out = layer(data, mask)
            assert out.shape == (sizes["B"], sizes["L"], 8)
            assert not out.any()
            xi = layer.get_association_matrix(data, mask)
            assert xi.shape == (sizes["B"], 2, sizes["L"], sizes["S"])
            out.sum().backward()
        for x in data:
            assert x.grad is None or not x.grad.any()
        if empty != "S" or cls is d.Hopfield:
            assert layer(data[0][:, : sizes["L"]]).shape[0] == sizes["B"]


def test_functions_with_nothing_to_do():
    for B, N, L in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        memory, query = torch.randn(B, N, 4), torch.randn(B, L, 4)
        for separation in SEPARATIONS:
            found = d.retrieve(memory, query, separation=separation)
            assert (
                found.patterns.shape == (B, L, 4) and not found.patterns[:, :, : 4 * (N == 0)].any()
            )
            if N:
                assert d.energy(memory, query, separation=separation, constants=True).shape == (
                    B,
                    L,
                )
        for mode in ("dense", "graph"):
            attend = d.AttentionOperator(mode=mode)
            index = torch.zeros(L, min(2, N), dtype=torch.int64)
            out = attend(query, memory, memory, index if mode == "graph" else None)
            assert out.shape == (B, L, 4)
    with pytest.raises(ValueError, match="at least one pattern"):
        d.energy(torch.randn(0, 4), torch.randn(2, 4))
    for mode in MODES:
        assert d.apply_diffusion(torch.zeros(0, 3), torch.zeros(0, 0), 0.5, mode).shape == (0, 3)
    for name in ("pooling", "layer", "encoder"):
        layer = make(name)
        for B, N in ((0, 5), (2, 0)):
            assert layer(torch.zeros(B, N, 8)).shape[0] == B


# ---------------------------------------------------------------- modules are called


class Doubled(nn.Module):
    """What wrappers do (LoRA, parametrisation): call the module, change its output."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        out = self.inner(*args, **kwargs)
        return 2 * out if isinstance(out, torch.Tensor) else (2 * out[0], *out[1:])


def _submodules(layer):
    return [name for name, module in layer.named_modules() if name and module is not layer]


def test_every_submodule_is_called(layer):
    args = arguments(layer)
    for name in _submodules(layer):
        doubled, hooked = copy.deepcopy(layer), copy.deepcopy(layer)
        parent, _, child = name.rpartition(".")
        wrapper = Doubled(doubled.get_submodule(name))
        setattr(doubled.get_submodule(parent), child, wrapper)
        hooked.get_submodule(name).register_forward_hook(
            lambda m, i, o: 2 * o if isinstance(o, torch.Tensor) else (2 * o[0], *o[1:])
        )
        out = doubled(*args)
        assert wrapper.calls == 1, name
        assert_close(out, hooked(*args))
        assert not torch.equal(out, layer(*args)), name
        doubled.reset_parameters()


def test_output_projection_under_lora_and_quantisation(layer):
    from torch.ao.quantization import quantize_dynamic

    args = arguments(layer)
    exact = layer(*args)
    quantised = quantize_dynamic(copy.deepcopy(layer), {nn.Linear})
    assert (quantised(*args) - exact).abs().max() < 0.1 * exact.abs().max()
    assert any("quantized" in type(m).__module__ for m in quantised.modules())


@pytest.mark.parametrize("nested", [lambda f: f, torch.func.grad], ids=["values", "gradients"])
def test_a_number_of_updates_that_values_decide_is_refused_under_vmap(nested):
    memory, queries = randn(6, 8), 0.1 * randn(3, 4, 8)

    def total(q, steps):
        return d.retrieve(memory, q, steps=steps).patterns.square().sum()

    found = torch.vmap(lambda q: nested(lambda x: total(x, 2))(q))(queries)
    for one, q in zip(found, queries, strict=True):
        assert_close(one, nested(lambda x: total(x, 2))(q))
    with pytest.raises(NotImplementedError, match="`steps` must be an int inside torch.func.vmap"):
        torch.vmap(nested(lambda q: total(q, None)))(queries)
    for layer in (
        d.Hopfield(8, update_steps_max=None),
        d.Hopfield(8, 8, update_steps_eps=1e-2, update_steps_max=3),
    ):
        with pytest.raises(NotImplementedError, match="inside torch.func.vmap"):
            torch.vmap(nested(lambda q, layer=layer: layer(q[None]).square().sum()))(queries)

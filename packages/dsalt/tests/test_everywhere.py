"""Every public function and module: empty sizes, gradients, transforms, tracing, export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dsalt
from dsalt.kernels import (
    HybridEnergyScorer,
    compute_hybrid_energy_scores,
    dsalt_attention,
    hybrid_energy,
    select_landmarks,
)
from dsalt.model import DSALTLMHeadModel
from dsalt.modules import (
    DSALTAttention,
    DSALTBlock,
    DSALTTransformer,
    SwiGLU,
    WindowSizePredictor,
    window_regulariser,
)
from shared_kernels.testing import assert_close

SIZES = {"n_min": 2, "n_max": 6, "k_lmk": 2}


def _attend(**options):
    def run(q, k, v):
        B, H, N, _ = q.shape
        windows = torch.full((B, H, N), 3.5)
        block = options.get("landmark_block")
        lists = (-(-k.shape[2] // block) - (k.shape[2] - N) // block if N else 0,) if block else ()
        idx = torch.zeros(B, H, *lists, 2, dtype=torch.int32)
        return dsalt_attention(q, k, v, windows, idx, **options)

    return run


FUNCTIONS = {
    "attention": _attend(),
    "attention-blocks": _attend(landmark_block=4),
    "attention-reference": _attend(backend="reference"),
    "attention-normalizer": _attend(normalizer=torch.softmax),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("B", "H", "H_kv", "n_q", "n_k"),
    [(0, 2, 2, 5, 5), (2, 0, 1, 5, 5), (2, 2, 1, 0, 5), (2, 2, 2, 0, 0), (0, 0, 1, 0, 0)],
)
def test_empty_attention(name, B, H, H_kv, n_q, n_k):
    q = torch.randn(B, H, n_q, 4, requires_grad=True)
    k, v = (torch.randn(B, H_kv, n_k, 4, requires_grad=True) for _ in range(2))
    out = FUNCTIONS[name](q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize(("B", "N", "H"), [(0, 5, 2), (2, 0, 2), (0, 0, 2)])
def test_empty_scores_and_landmarks(B, N, H):
    x, values = torch.randn(B, N, 6, requires_grad=True), torch.randn(B, H, N, 3)
    windows = torch.full((B, H, N), 2.0)
    for causal in (False, True):
        scores = hybrid_energy(x, torch.randn(H, 6, 3), torch.full((H,), 0.5), causal=causal)
        assert scores.shape == (B, H, N)
        scores.sum().backward()
    for k in (0, 2):
        assert select_landmarks(scores, k).shape == (B, H, k)
        lists = select_landmarks(scores, k, landmark_block=2)
        assert lists.shape == (B, H, -(-N // 2), k) and bool((lists < N).all())
        found = compute_hybrid_energy_scores(
            x, torch.randn(H, 6, 3), windows, k, torch.full((H,), 0.5)
        )
        assert found.shape == (B, H, k)
        for mode in ("block_causal", "global"):
            marks = HybridEnergyScorer(H, k, landmark_mode=mode)(x, values, windows)
            assert marks.idx.shape == marks.bias.shape
    assert WindowSizePredictor(6, H, 1, 3)(x).shape == (B, H, N)
    for kind in ("entropy", "length"):
        assert bool(window_regulariser(windows, 1, 3, kind).isfinite())


MODULES = {
    "attention": lambda: DSALTAttention(8, 2, **SIZES, landmark_block=4),
    "attention-global": lambda: DSALTAttention(8, 2, **SIZES, landmark_mode="global"),
    "attention-normalizer": lambda: DSALTAttention(8, 2, **SIZES, normalizer=torch.softmax),
    "block": lambda: DSALTBlock(8, 2, **SIZES),
    "swiglu": lambda: SwiGLU(8),
    "transformer": lambda: DSALTTransformer(8, 2, 2, **SIZES, landmark_block=4),
}


def first(output):
    if isinstance(output, dsalt.LMOutput):
        return output.logits
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty_modules(name, B, N):
    module = MODULES[name]()
    x = torch.randn(B, N, 8, requires_grad=True)
    out = first(module(x))
    assert out.shape == x.shape
    out.sum().backward()
    assert not x.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty_language_model(B, N):
    model = DSALTLMHeadModel(11, 8, 1, 2, **SIZES)
    ids = torch.zeros(B, N, dtype=torch.long)
    for shift in (False, True):
        out = model(ids, labels=ids, shift_labels=shift)
        assert out.logits.shape == (B, N, 11)
        out.loss.backward()
        assert float(out.loss) == 0.0
    if N:
        assert model.generate(ids, max_new_tokens=2).shape[0] == B


def _inputs(soft=True, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 4, generator=g, dtype=dtype)
    windows = 6 * torch.rand(1, 2, 20, generator=g, dtype=dtype)
    idx = torch.tensor([0, 3, 7], dtype=torch.int32).expand(1, 2, 3)
    bias = torch.randn(1, 2, 3, generator=g, dtype=dtype)
    return {"Q": q, "K": k, "V": v, "window_sizes": windows, "landmark_bias": bias}, idx


@pytest.mark.parametrize("which", ["Q", "K", "V", "window_sizes", "landmark_bias"])
@pytest.mark.parametrize("option", ["cpu", "normalizer"])
def test_each_tensor_alone_gets_its_gradient(which, option):
    def grad(**options):
        tensors, idx = _inputs()
        tensors[which].requires_grad_()
        out = dsalt_attention(**tensors, landmark_idx=idx, **options)
        return torch.autograd.grad((out * torch.arange(80.0).view(20, 4)).sum(), tensors[which])[0]

    options = {"normalizer": torch.softmax} if option == "normalizer" else {"backend": option}
    ours, exact = grad(**options), grad(backend="reference")
    assert exact.abs().max() > 0
    assert_close(ours, exact, "gradient")


@pytest.mark.parametrize("which", ["X", "WV", "alpha"])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_give_each_tensor_its_gradient(which, causal):
    given = {
        "X": torch.randn(1, 6, 5).double(),
        "WV": torch.randn(2, 5, 3).double(),
        "alpha": torch.tensor([0.3, 0.6]).double(),
    }

    def run(x):
        return hybrid_energy(**{**given, which: x}, causal=causal)

    assert torch.autograd.gradcheck(run, (given[which].requires_grad_(),))


def test_second_derivatives_are_refused_in_words():
    tensors, idx = _inputs()
    tensors["Q"].requires_grad_()
    out = dsalt_attention(**tensors, landmark_idx=idx)
    with pytest.raises(NotImplementedError, match="derivative"):
        (first_grad,) = torch.autograd.grad(out.square().sum(), tensors["Q"], create_graph=True)
        first_grad.sum().backward()


def _language_model():
    torch.manual_seed(0)
    return DSALTLMHeadModel(11, 8, 1, 2, **SIZES, landmark_block=4, dropout=0.0).eval()


def _callables():
    """name -> (module or function, its arguments)."""
    tensors, idx = _inputs(dtype=torch.float32)
    q, k, v, w, b = tensors.values()
    x, values = torch.randn(2, 20, 8), torch.randn(2, 2, 20, 4)
    found = {
        "dsalt_attention": (
            lambda q, k, v, w, b: dsalt_attention(q, k, v, w, idx.to(q.device), landmark_bias=b),
            (q, k, v, w, b),
        ),
        "hybrid_energy": (
            lambda x, wv, a: hybrid_energy(x, wv, a, causal=True),
            (x, torch.randn(2, 8, 4), torch.full((2,), 0.4)),
        ),
        "scorer": (HybridEnergyScorer(2, 2, landmark_block=4), (x, values)),
        "windows": (WindowSizePredictor(8, 2, 1, 4), (x,)),
        "window_regulariser": (
            lambda w: window_regulariser(w, 1, 4),
            (1 + 3 * torch.rand(2, 2, 9),),
        ),
        "language-model": (_language_model(), (torch.randint(0, 11, (2, 20)),)),
    }
    for name, make in MODULES.items():
        torch.manual_seed(0)
        found[name] = (make().eval(), (x,))
    return found


CALLABLES = sorted(_callables())


def leaves(output):
    """The tensors of an output."""
    if isinstance(output, dsalt.LMOutput):
        output = output.logits
    if isinstance(output, torch.Tensor):
        return [output]
    return [x for x in output if isinstance(x, torch.Tensor)] if output is not None else []


def same(ours, exact):
    assert len(leaves(ours)) == len(leaves(exact)) > 0
    for a, b in zip(leaves(ours), leaves(exact), strict=True):
        if a.is_floating_point():
            assert_close(a, b)
        else:
            assert torch.equal(a, b)


def moved(name, device):
    run, given = _callables()[name]
    run = run.to(device) if isinstance(run, torch.nn.Module) else run
    return run, tuple(x.to(device) for x in given)


@pytest.mark.parametrize("name", CALLABLES)
def test_meta(name):
    run, given = _callables()[name]
    shapes = [x.shape for x in leaves(run(*given))]
    run, given = moved(name, "meta")
    out = leaves(run(*given))
    assert [x.shape for x in out] == shapes and all(x.device.type == "meta" for x in out)


@pytest.mark.parametrize("name", CALLABLES)
def test_fake_tensors(name):
    run, given = _callables()[name]
    shapes = [x.shape for x in leaves(run(*given))]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = leaves(run(*(mode.from_tensor(x) for x in given)))
    assert [x.shape for x in out] == shapes


ONE = "attention"  # the others repeat the proof


@pytest.mark.system
@pytest.mark.parametrize(
    "name", [ONE, *(pytest.param(n, marks=pytest.mark.thorough) for n in CALLABLES if n != ONE)]
)
def test_compiles_whole_forward_and_backward(name):
    run, given = _callables()[name]
    if name == "attention-normalizer":
        pytest.skip("its checkpointed chunks are compiled without fullgraph")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    given = tuple(x.requires_grad_() if x.is_floating_point() else x for x in given)
    same(compiled(*given), run(*given))
    if isinstance(run, torch.nn.Module) and any(x.requires_grad for x in leaves(run(*given))):
        sum(x.sum() for x in leaves(compiled(*given)) if x.requires_grad).backward()


@pytest.mark.system
@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.thorough
def test_jit_trace(name):
    run, given = _callables()[name]
    if name == "language-model":
        model = run

        class Logits(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, ids):
                return self.model(ids, return_dict=False)

        run = Logits()
    elif isinstance(run, torch.nn.Module):
        inner = run

        class Tensors(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, *given):
                return tuple(leaves(self.inner(*given)))

        run = Tensors()
    traced = torch.jit.trace(run, given)
    again = tuple(x.flip(1 if x.dim() > 1 else 0) for x in given)
    same(traced(*again), run(*again))


@pytest.mark.parametrize("name", CALLABLES)
def test_vmap(name):
    run, given = _callables()[name]
    if name == "attention-normalizer" and torch.__version__.startswith("2.7."):
        pytest.skip("the checkpoint of torch 2.7 does not know vmap")
    batches = [torch.stack((x, x.flip(1 if x.dim() > 1 else 0))) for x in given]

    def outputs(*given):
        return tuple(leaves(run(*given)))

    ours = torch.func.vmap(outputs)(*batches)
    for i in range(2):
        same(tuple(x[i] for x in ours), outputs(*(x[i] for x in batches)))


@pytest.mark.parametrize("name", CALLABLES)
def test_func_grad(name):
    run, given = _callables()[name]
    if name == "attention-normalizer":
        pytest.skip("torch's checkpoint does not know torch.func")
    if name == "language-model":
        module, ids = run, given[0]
        parameters = {n: p.detach() for n, p in module.named_parameters()}

        def loss(parameters):
            out = torch.func.functional_call(module, parameters, (ids,), {"labels": ids.flip(1)})
            return out.loss

        ours = torch.func.grad(loss)(parameters)
        module(ids, labels=ids.flip(1)).loss.backward()
        for n, p in module.named_parameters():
            assert_close(ours[n], p.grad, "gradient")
        return

    def total(*given):
        return sum(x.sum() for x in leaves(run(*given)) if x.is_floating_point())

    ours = torch.func.grad(total)(*given)
    x = given[0].clone().requires_grad_()
    (exact,) = torch.autograd.grad(total(x, *given[1:]), x)
    assert_close(ours, exact, "gradient")


@pytest.mark.system
@pytest.mark.parametrize(
    "name", [ONE, *(pytest.param(n, marks=pytest.mark.thorough) for n in CALLABLES if n != ONE)]
)
def test_export(name):
    run, given = _callables()[name]
    if not isinstance(run, torch.nn.Module):
        function = run

        class Wrapped(torch.nn.Module):
            def forward(self, *given):
                return function(*given)

        run = Wrapped()
    program = torch.export.export(run, given)
    same(program.module()(*given), run(*given))


def test_numpy_scalars_are_numbers(tmp_path):
    i, f = np.int64, np.float32
    sizes = {"n_min": f(2), "n_max": i(6), "k_lmk": i(2)}
    more = {
        "landmark_block": i(4),
        "window_ramp": f(3.0),
        "dropout": f(0.0),
        "bias": np.bool_(True),
    }
    model = DSALTLMHeadModel(i(11), i(8), i(1), i(2), **sizes, **more).eval()
    ids = torch.zeros(1, 9, dtype=torch.long)
    model.save_pretrained(tmp_path)
    assert torch.equal(DSALTLMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    plain = {"max_new_tokens": 4, "temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_new_tokens": 1}
    numpy = {n: f(x) if isinstance(x, float) else i(x) for n, x in plain.items()}
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    ours = model.generate(ids, **numpy, eos_token_id=i(3), generator=seeds[0])
    assert torch.equal(ours, model.generate(ids, **plain, eos_token_id=3, generator=seeds[1]))
    tensors, idx = _inputs(dtype=torch.float32)
    exact = dsalt_attention(**tensors, landmark_idx=idx, scale=0.5, window_ramp=2.0)
    ours = dsalt_attention(**tensors, landmark_idx=idx, scale=f(0.5), window_ramp=f(2.0))
    assert torch.equal(ours, exact)
    scores = torch.randn(1, 2, 20)
    lists = select_landmarks(scores, i(3), landmark_block=i(4), n_sink=i(1))
    assert torch.equal(lists, select_landmarks(scores, 3, landmark_block=4, n_sink=1))
    n = tensors["Q"].shape[2]
    lists = idx[:, :, None].expand(-1, -1, -(-n // 4), -1)
    ours, exact = (
        dsalt_attention(
            **{**tensors, "landmark_bias": None}, landmark_idx=lists, landmark_block=block
        )
        for block in (np.uint8(4), 4)
    )
    assert torch.equal(ours, exact)
    with pytest.raises(TypeError, match="k"):
        select_landmarks(scores, np.bool_(True))
    with pytest.raises(TypeError, match="scale"):
        dsalt_attention(**tensors, landmark_idx=idx, scale=np.bool_(True))

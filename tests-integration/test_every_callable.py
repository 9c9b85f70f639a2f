"""One test of each kind over every public module and every differentiable public function.

What a user of torch expects of any layer: empty inputs, gradients that are given or refused, right
second derivatives or a refusal, compile, trace, export, meta and fake tensors, per-sample
gradients, modules that are called and never bypassed, parameters that can be reset.
"""

from __future__ import annotations

import copy
import inspect
import io
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

from shared_kernels.ops import decompositions
from shared_kernels.testing import assert_close, others_thorough
from shared_kernels.testing.defaults import each_default

from .callables import FUNCTIONS, MODULES, NOT_DIFFERENTIABLE, PACKAGES

every_function = pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.name)
every_module = pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)
# Compiling, exporting or tracing takes seconds: one module of each package, the others thorough.
FIRSTS = {case.name.split(".")[0]: case for case in reversed(MODULES)}.values()
one_module_each = pytest.mark.parametrize(
    "case",
    others_thorough(sorted(MODULES, key=lambda case: case not in FIRSTS), plain=len(FIRSTS)),
    ids=lambda case: case.name,
)
every_case = pytest.mark.parametrize("case", FUNCTIONS + MODULES, ids=lambda case: case.name)
# Along a random direction, or entry by entry of one batch element.
each_depth = pytest.mark.parametrize(
    "is_fast", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["direction", "entries"]
)
# A refusal names the matter in these words.
REFUSED = "second derivative|double backward|derivative"


def test_no_public_name_is_missing():
    covered = {case.name.split("[")[0] for case in FUNCTIONS + MODULES}
    for package in PACKAGES:
        for name in package.__all__:
            thing = getattr(package, name)
            is_module = inspect.isclass(thing) and issubclass(thing, nn.Module)
            is_function = inspect.isfunction(thing) and name not in NOT_DIFFERENTIABLE.get(
                package.__name__, ()
            )
            if is_module or is_function:
                assert f"{package.__name__}.{name}" in covered


def leaves(tensors):
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


empty = pytest.mark.parametrize(
    ("case", "size"),
    [(case, size) for case in FUNCTIONS + MODULES for size in case.zero if case.shapes],
    ids=lambda x: x if isinstance(x, str) else x.name,
)


@empty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_inputs_give_empty_results_and_zero_gradients(case, size, dtype):
    inputs = leaves(case.tensors(dtype, **{size: 0}))
    out = case(module=case.module(dtype), **inputs)
    assert out.isfinite().all()
    out.float().sum().backward()
    for name, x in inputs.items():
        assert x.grad is None or not x.grad.any(), name
    assert any(x.grad is not None for x in inputs.values()) or not out.numel()


@every_function
@each_depth
def test_each_floating_argument_gets_its_gradient(case, is_fast):
    tensors = case.tensors(**({} if is_fast else {"B": 1}))
    for name in tensors:
        fixed = {other: x for other, x in tensors.items() if other != name}

        def call(x, name=name, fixed=fixed):
            return case(**fixed, **{name: x})

        x = tensors[name].clone().requires_grad_()
        assert gradcheck(call, (x,), fast_mode=is_fast), name


@every_case
@each_depth
def test_second_derivatives_are_right_or_refused(case, is_fast):
    tensors = leaves(case.tensors(**({} if is_fast else {"B": 1})))
    if not tensors:
        return
    module = case.module()

    def call(*values):
        return case(module=module, **dict(zip(tensors, values, strict=True)))

    try:
        right = gradgradcheck(call, tuple(tensors.values()), fast_mode=is_fast)
    except (NotImplementedError, RuntimeError) as error:
        assert isinstance(error, NotImplementedError) or "derivative" in str(error), error
    else:
        assert right


SPARSE = {  # tensors that may be sparse, go into PyTorch's own functions, or the case computes with
    "difflayers.apply_diffusion": ("L",),
    "dsalt.dsalt_attention": ("window_sizes",),
    "dsalt.window_regulariser": ("windows",),
    "dsalt.apply_rotary_emb": ("q", "k"),
}


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.name)
def test_tensors_that_are_not_dense_are_refused_by_name(case):
    tensors = case.tensors()
    for name, x in tensors.items():
        if name in SPARSE.get(case.name, ()) or name == "alpha":  # the cases compute with alpha
            continue
        with pytest.raises(TypeError, match="must be a dense tensor, got torch.sparse_coo"):
            case(**{**tensors, name: x.to_sparse()})


@every_case
@each_default()
def test_torchs_defaults_change_no_result(case, default):
    """What is made beside the tensors of a call has their dtype and device."""
    module, inputs = case.module(torch.float32), leaves(case.tensors(torch.float32))
    of = [*inputs.values(), *(() if module is None else module.parameters())]
    of = [x for x in of if x.requires_grad]

    def run():
        out = case(module=module, **inputs)
        found = torch.autograd.grad(out.square().sum(), of, allow_unused=True) if of else ()
        return out, *found

    exact = run()
    with default():
        found = run()
    for ours, right in zip(found, exact, strict=True):
        assert (ours is None and right is None) or torch.equal(ours, right)


@pytest.mark.system
@one_module_each
def test_compiles_whole(case):
    torch._dynamo.reset()
    module, inputs = case.module(torch.float32), case.tensors(torch.float32)
    compiled = torch.compile(
        lambda **tensors: case(module=module, **tensors), fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(**inputs), case(module=module, **inputs))


@pytest.mark.system
@one_module_each
def test_is_traced(case):
    module, inputs = case.module(torch.float32), case.tensors(torch.float32)
    if not inputs:
        return

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, *values):
            return case(module=self.inner, **dict(zip(inputs, values, strict=True)))

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch.jit is deprecated, and Python values become constants
        traced = torch.jit.trace(Positional(), tuple(inputs.values()))
    assert_close(traced(*inputs.values()), case(module=module, **inputs))


@pytest.mark.system
@one_module_each
def test_is_exported(case):
    module, inputs = case.module(torch.float32), case.tensors(torch.float32)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, tensors):
            return case(module=self.inner, **tensors)

    exported = torch.export.export(Named(), (inputs,), strict=False)
    assert_close(exported.module()(inputs), case(module=module, **inputs))


OF_ROWS = [c for c in MODULES if "diffmax.Diffmax" in c.name and "Loss" not in c.name]
OF_ROWS += [c for c in MODULES if c.name.startswith("difflayers.Hopfield[")]


@pytest.mark.system
@pytest.mark.parametrize("case", others_thorough(OF_ROWS), ids=lambda case: case.name)
def test_an_exported_module_of_rows_decomposes_into_torch_alone(case):
    """What torch.onnx.export(program, dynamo=True) takes."""
    module, inputs = case.module(torch.float32), case.tensors(torch.float32)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, tensors):
            return case(module=self.inner, **tensors)

    trained = {name: x.requires_grad_() for name, x in inputs.items()}  # no other op under grad
    program = torch.export.export(Named(), (trained,), strict=False)
    program = program.run_decompositions(decompositions())
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls and {op.namespace for op in calls if hasattr(op, "namespace")} == {"aten"}
    assert_close(program.module()(inputs), case(module=module, **inputs))


@every_module
def test_meta_and_fake_tensors(case):
    module, inputs = case.module(torch.float32), case.tensors(torch.float32)
    shape = case(module=module, **inputs).shape
    if inputs:
        meta = {name: x.to("meta") for name, x in inputs.items()}
        assert case(module=copy.deepcopy(module).to("meta"), **meta).shape == shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in inputs.items()}
        assert case(module=module, **fake).shape == shape


@every_function
def test_per_sample_gradients_of_functions(case):
    """vmap(grad) equals a loop, or is refused in words."""
    tensors = case.tensors()
    names = list(tensors)

    def loss(first, rest):
        return case(**{names[0]: first}, **rest).square().sum()

    rest = {name: tensors[name] for name in names[1:]}
    samples = torch.stack([tensors[names[0]], 0.5 * tensors[names[0]]])
    try:
        found = vmap(grad(loss), in_dims=(0, None))(samples, rest)
    except NotImplementedError:
        return
    for sample, ours in zip(samples, found, strict=True):
        leaf = sample.clone().requires_grad_()
        (exact,) = torch.autograd.grad(loss(leaf, rest), leaf)
        assert_close(ours, exact, "gradient")


@every_module
def test_per_sample_gradients_of_modules(case):
    """torch.func.grad over functional_call equals backward(), or is refused in words."""
    module, inputs = case.module(), case.tensors()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    if not parameters:
        return

    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self):
            return case(module=self.inner, **inputs)

    def loss(values):
        named = {f"inner.{name}": value for name, value in values.items()}
        return functional_call(Run(), named, ()).square().sum()

    try:
        found = grad(loss)(parameters)
    except NotImplementedError:
        return
    module.zero_grad()
    case(module=module, **inputs).square().sum().backward()
    for name, p in module.named_parameters():
        exact = torch.zeros_like(p) if p.grad is None else p.grad
        assert_close(found[name], exact, "gradient")


class Doubled(nn.Module):
    """A wrapper that doubles what a module returns, as a LoRA layer or a hook may change it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        for name in ("in_features", "out_features", "normalized_shape"):  # what LoRA wrappers keep
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return out * 2 if isinstance(out, torch.Tensor) else out


PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


@every_module
def test_no_submodule_is_bypassed(case):
    module, inputs = case.module(), case.tensors()
    for parameter in module.parameters():  # no bias or weight of zeros hides a submodule
        with torch.no_grad():
            parameter.add_(0.5 * torch.randn_like(parameter))
    exact = case(module=module, **inputs)
    for name, child in module.named_modules():
        if not name or not isinstance(child, PLAIN):  # a layer is no submodule of its own
            continue
        changed = copy.deepcopy(module)
        above, _, last = name.rpartition(".")
        setattr(changed.get_submodule(above), last, Doubled(changed.get_submodule(name)))
        assert not torch.equal(case(module=changed, **inputs), exact), f"{name} is bypassed"


@every_module
def test_parameters_can_be_reset(case):
    """meta -> to_empty -> reset_parameters leaves no garbage behind."""
    module = case.module(torch.float32)
    with torch.no_grad():
        for x in module.parameters():
            x.fill_(torch.nan)
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
        elif hasattr(child, "_reset_parameters"):
            child._reset_parameters()
    for name, x in module.named_parameters():
        assert x.isfinite().all(), f"{name} is not reset"


@every_module
def test_copies_and_files(case):
    module, inputs = case.module(torch.float32), case.tensors(torch.float32)
    exact = case(module=module, **inputs)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    again = case.build().eval()
    again.load_state_dict(torch.load(stored))
    assert torch.equal(case(module=again, **inputs), exact)
    assert torch.equal(case(module=copy.deepcopy(module), **inputs), exact)


# -------------------------------------------------------- bits that do not depend on others

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BATCHED = [case for case in FUNCTIONS if next(iter(case.shapes.values())).startswith("B")]


@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.name)
@each_dtype
@pytest.mark.parametrize("N", [7, 200])
def test_a_batch_element_does_not_depend_on_others(case, dtype, N):
    if case.name.endswith(("loss", "window_regulariser")):  # a sum over the batch
        return
    tensors = case.tensors(dtype, B=5, N=N)
    whole = case(**tensors)
    for i in (0, 3):
        one = {
            name: x[i : i + 1] if case.shapes[name].startswith("B") else x
            for name, x in tensors.items()
        }
        assert torch.equal(case(**one)[0], whole[i])


@pytest.mark.parametrize("case", [c for c in FUNCTIONS if c.causal], ids=lambda case: case.name)
@each_dtype
@pytest.mark.parametrize("N", [7, 200])
def test_earlier_rows_do_not_depend_on_later_keys(case, dtype, N):
    tensors = case.tensors(dtype, N=N)
    whole = case(**tensors)
    for scale in (1.0, 30.0):
        changed = dict(tensors)
        for name in case.causal:
            x = tensors[name].clone()
            later = x[:, :, N // 2 :]
            x[:, :, N // 2 :] = later if name in case.positive else scale * later.flip(2)
            changed[name] = x
        assert torch.equal(case(**changed)[:, :, : N // 2], whole[:, :, : N // 2])

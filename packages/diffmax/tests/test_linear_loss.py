"""The loss of a linear layer whose logits are never stored."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from diffmax import (
    DiffmaxLinearLoss,
    HillMap,
    _torch_linear,
    diffmax_linear_loss,
    diffmax_loss,
    explain,
    losses,
)
from shared_kernels import dispatch
from shared_kernels.testing import (
    Case,
    assert_close,
    assert_no_worse,
    contracts,
    cpu_backends,
    others_thorough,
    pairwise,
    parametrize,
)
from shared_kernels.testing.memory import measure_memory

from .cases import on_each_backend

CASES = [
    Case("plain"),
    Case("sparse", alpha=0.1),
    Case("cubes", alpha=2 / 3),
    Case("real-power", alpha=0.85),
    Case("nearly-softmax", alpha=0.98),
    Case("bias", bias=True),
    Case("smoothing", bias=True, label_smoothing=0.1),
    Case("cap", softcap=3.0, bias=True),
    Case("cap-and-smoothing", softcap=3.0, label_smoothing=0.2, alpha=0.3),
    Case("soft", soft=5),
    Case("soft-smoothing-cap", soft=4, label_smoothing=0.1, softcap=2.0, alpha=0.7),
    Case("one-class", V=1),
    Case("small", V=5, N=3),
    Case("flat", scale=1e-3, alpha=0.4),
    Case("forbidden", bias=True, forbidden=True),
    Case("several-tiles", V=20_000, N=5, scale=2.0),
    Case("several-tiles-flat", V=20_000, N=3, scale=0.02, alpha=0.6),
    Case("several-blocks", N=300, V=70),
]
PATHS = ("lists", "at once", "twice")  # how the gradient is made


@contextlib.contextmanager
def taking(path):
    """All rows take one path, whether or not it is their best; cap and smoothing know no lists."""

    def looks_long(call, hidden, target):
        dense = call.softcap is not None and bool(call.label_smoothing)
        return target.new_full((len(hidden),), dense or path != "lists", dtype=torch.bool)

    with pytest.MonkeyPatch.context() as patch:
        if path is not None:
            patch.setattr(_torch_linear, "looks_long", looks_long)
        if path == "twice":
            patch.setattr(losses, "_many_rows_are_long", lambda *_: False)
        yield


def tensors(case, dtype=torch.float64):
    """The tensors of a case: hidden, weight, alpha, and bias where it has one."""
    generator = torch.Generator().manual_seed(len(case.name))
    N, V, d = case.get("N", 11), case.get("V", 300), 6

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {"hidden": random(N, d) * case.get("scale", 1.0), "weight": random(V, d)}
    found["alpha"] = torch.tensor(case.get("alpha", 0.5))
    if case.get("bias"):
        found["bias"] = random(V)
        if case.get("forbidden"):
            found["bias"][::2] = -torch.inf
    return {k: x.to(dtype) for k, x in found.items()}


def options(case):
    generator = torch.Generator().manual_seed(1)
    N, V, K = case.get("N", 11), case.get("V", 300), case.get("soft")
    shape = (N,) if K is None else (N, K)
    target = torch.randint(V, shape, generator=generator)
    if case.get("forbidden"):
        target |= 1  # these are allowed
    target[1] = -100
    found = {k: case.get(k) for k in ("label_smoothing", "softcap") if case.get(k)}
    if K is not None:
        target[0, 1] = target[0, 0]  # one class twice
        target[2, -1] = -100
        found["target_weights"] = torch.rand(N, K, generator=generator).softmax(-1)
    return target, found


def run(case, backend, path=None, dtype=torch.float64, reduction="mean", device="cpu", **more):
    """The loss and its gradients in every tensor of the case."""
    target, found = options(case)
    inputs = {k: x.to(device).requires_grad_() for k, x in tensors(case, dtype).items()}
    found = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in found.items()}
    with taking(path):
        loss = diffmax_linear_loss(
            target=target.to(device),
            reduction=reduction,
            backend=backend,
            **inputs,
            **found,
            **more,
        )
        assert dispatch.last("diffmax::linear_loss") == backend
        g = torch.linspace(1.0, 2.0, loss.numel()).to(loss.dtype).reshape(loss.shape)
        gradients = torch.autograd.grad(loss, inputs.values(), g)
    return loss.detach(), dict(zip(inputs, gradients, strict=True))


@pairwise(case=CASES, path=PATHS, backend=cpu_backends(), reduction=["mean", "sum", "none"])
def test_is_the_reference(case, path, backend, reduction):
    exact, gradients = run(case, "reference", reduction=reduction)
    for dtype in (torch.float64, torch.float32):
        loss, found = run(case, backend, path, dtype, reduction)
        assert loss.dtype == dtype
        assert_close(loss, exact)
        for name, exact_gradient in gradients.items():
            assert found[name].dtype == dtype
            assert_close(found[name], exact_gradient, "gradient")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@parametrize([CASES[0], CASES[5], CASES[9]])
def test_half_types_err_no_more_than_pytorch_in_that_dtype(case, path, dtype):
    exact_inputs = {k: x.to(dtype).double() for k, x in tensors(case).items() if k != "alpha"}
    target, more = options(case)

    def loss(function, inputs):
        inputs = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        value = function(**inputs)
        return value.detach(), *torch.autograd.grad(value, inputs.values())

    def stored(hidden, weight, bias=None):
        y = more.get("target_weights", torch.ones(len(hidden), 1))
        return dense(hidden, weight, bias, 0.5, target.view(len(hidden), -1), y, None, 0.0)

    with taking(path):
        half = {k: x.to(dtype) for k, x in exact_inputs.items()}
        ours = loss(lambda **i: diffmax_linear_loss(target=target, alpha=0.5, **i, **more), half)
    exact = loss(stored, exact_inputs)
    for found, eager, right in zip(ours, loss(stored, half), exact, strict=True):
        assert found.dtype == dtype
        assert_no_worse(found, eager=eager, exact=right)


def dense(hidden, weight, bias, alpha, target, y, softcap, label_smoothing):
    """The same loss of stored logits, in the dtype of hidden; classes -100 are left out."""
    X = F.linear(hidden, weight, bias)
    X = X if softcap is None else softcap * torch.tanh(X / softcap)
    kept = target >= 0
    y = torch.where(kept, y, 0.0).to(X.dtype)
    y = torch.zeros_like(X).scatter_add(1, target.clamp(min=0), y)
    y = (1 - label_smoothing) * y + label_smoothing / X.shape[1]
    counted = kept.any(-1)
    return (diffmax_loss(X, y, alpha, reduction="none") * counted).sum() / counted.sum()


@pairwise(
    softcap=[None, 3.0],
    bias=[False, True],
    soft=[1, 3],
    label_smoothing=[0.0, 0.1],
    is_ignored=[False, True],
    dtype=[torch.float32, torch.bfloat16],
    is_learned=[False, True],
    path=PATHS,
    backend=cpu_backends(),
)
def test_options_with_each_other(
    softcap, bias, soft, label_smoothing, is_ignored, dtype, is_learned, path, backend
):
    case = Case("options", N=9, V=120, bias=bias)
    inputs = {k: x.to(dtype).double() for k, x in tensors(case).items() if k != "alpha"}
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(120, (9, soft), generator=generator)
    y = torch.rand(9, soft, generator=generator).softmax(-1) if soft > 1 else torch.ones(9, 1)
    if is_ignored:
        target[3] = -100
    more = {"softcap": softcap, "label_smoothing": label_smoothing}

    def found(function, dtype):
        given = {k: x.to(dtype).requires_grad_() for k, x in inputs.items()}
        given.setdefault("bias", None)
        alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=is_learned)
        loss = function(**given, alpha=alpha, **more)
        wanted = [x for x in (*given.values(), alpha) if x is not None and x.requires_grad]
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    def stored(**given):
        return dense(target=target, y=y, **given)

    def ours(**given):
        if soft == 1:
            return diffmax_linear_loss(target=target[:, 0], backend=backend, **given)
        return diffmax_linear_loss(target=target, target_weights=y, backend=backend, **given)

    exact = found(stored, torch.float64)
    with taking(path):
        results = found(ours, dtype)
    for result, eager, right in zip(results, found(stored, dtype), exact, strict=True):
        assert result.dtype == eager.dtype
        if dtype == torch.float32:  # alpha is float64, and its gradient computed as the others are
            assert_close(result.to(dtype), right, "gradient")
        else:
            assert_no_worse(result, eager=eager, exact=right)


@pytest.mark.parametrize("path", PATHS)
@parametrize([c for c in CASES if c.get("V", 300) <= 300 and c.name != "several-blocks"])
def test_gradcheck(case, path):
    target, more = options(case)
    inputs = {k: x.requires_grad_() for k, x in tensors(case).items()}
    if case.get("forbidden"):
        inputs["bias"].requires_grad_(False)
    with taking(path):
        assert torch.autograd.gradcheck(
            lambda *values: diffmax_linear_loss(
                target=target, **dict(zip(inputs, values, strict=True)), **more
            ),
            tuple(inputs.values()),
            fast_mode=True,
        )


def test_a_second_derivative_is_refused_by_name():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = diffmax_linear_loss(hidden, torch.randn(9, 4), torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="diffmax::linear_loss"):
        gradient.sum().backward()


def test_it_is_the_dense_loss_and_its_gradient_is_the_gap():
    hidden, weight = torch.randn(2, 7, 6), torch.randn(50, 6)
    target = torch.randint(50, (2, 7))
    for reduction in ("mean", "sum", "none"):
        ours = diffmax_linear_loss(hidden, weight, target, 0.4, reduction=reduction)
        assert_close(ours, diffmax_loss(hidden @ weight.T, target, 0.4, reduction=reduction))


@pytest.mark.parametrize("seen", ["target first", "target last"])
def test_the_support_is_found_wherever_it_lies(seen):
    """The bound of the first tile is poor where the large logits come last."""
    V = 40_000
    hidden, weight = torch.ones(3, 1, dtype=torch.float64), torch.linspace(-40, 3, V).double()
    weight = weight.unsqueeze(1) if seen == "target last" else weight.flip(0).unsqueeze(1)
    hidden[1] = 0.0  # a row whose weights are all the same
    weight.requires_grad_()
    target = torch.tensor([0, 1, V - 1])
    results = []
    for backend in ("torch", "reference"):
        loss = diffmax_linear_loss(hidden, weight, target, 0.5, reduction="none", backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), weight)))
    for ours, exact in zip(*results, strict=True):
        assert_close(ours, exact, "gradient")


VARIANTS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 20.0, "bias": True},
    {"softcap": 20.0, "label_smoothing": 0.1},
    {"soft": 3, "alpha": 0.8},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
    {"V": 700},
    {"at_once": True, "V": 700, "bias": True},
    {"at_once": True, "label_smoothing": 0.1},
]


@on_each_backend
@pytest.mark.parametrize("variant", others_thorough(VARIANTS, 5), ids=str)
def test_the_bits_of_a_row_do_not_depend_on_other_rows(variant, backend):
    """Short supports, long ones, and some between: each row alone, and all together."""
    rows_have_the_bits_that_they_have_alone(variant, backend)


def rows_have_the_bits_that_they_have_alone(variant, backend, device="cpu", V=9000, N=140):
    more = dict(variant)
    dtype, V = more.pop("dtype", torch.float32), more.pop("V", V)
    reduction = "sum" if more.pop("at_once", False) else "none"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 8, generator=generator)
    # the size of a row decides how long its support is: from some classes to most of them
    hidden *= torch.logspace(0.8, -2.5, N)[torch.randperm(N, generator=generator)].unsqueeze(1)
    weight = torch.randn(V, 8, generator=generator).to(device, dtype)
    target = torch.randint(V, (N,), generator=generator)
    if more.pop("bias", False):
        more["bias"] = torch.randn(V, generator=generator).to(device, dtype)
    if K := more.pop("soft", 0):
        target = torch.randint(V, (N, K), generator=generator)
        more["target_weights"] = torch.rand(N, K, generator=generator).softmax(-1).to(device)
    hidden, target = hidden.to(device, dtype), target.to(device)

    def of(rows):
        x = hidden[rows].clone().requires_grad_()
        one = {k: v[rows] if k == "target_weights" else v for k, v in more.items()}
        alpha = one.pop("alpha", 0.5)
        loss = diffmax_linear_loss(
            x, weight, target[rows], alpha, reduction=reduction, backend=backend, **one
        )
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    losses_, gradients = of(slice(None))
    for i in [*range(0, N, 9), N - 1]:
        loss, gradient = of(slice(i, i + 1))
        if reduction == "none":
            assert torch.equal(loss, losses_[i : i + 1]), i
        assert torch.equal(gradient, gradients[i : i + 1]), i
    some = slice(3, 60)
    loss, gradient = of(some)
    assert reduction == "sum" or torch.equal(loss, losses_[some])
    assert torch.equal(gradient, gradients[some])


@on_each_backend
@pytest.mark.parametrize("path", PATHS)
def test_two_runs_same_bits(path, backend):
    case = Case("bits", N=40, V=5000, bias=True)
    (loss, first), (again, second) = (run(case, backend, path, torch.float32) for _ in range(2))
    assert torch.equal(loss, again)
    assert all(torch.equal(first[k], second[k]) for k in first)


class TestLinearLoss(contracts.OpContract):
    op = torch.ops.diffmax.linear_loss.default

    def samples(self):
        for case, reduction, at_once in (
            (CASES[0], "mean", False),
            (CASES[6], "none", False),
            (CASES[9], "sum", True),
        ):
            inputs = tensors(case, torch.float32)
            target, more = options(case)
            y = more.get("target_weights", torch.ones(len(target), 1))
            classes = target.view(len(target), -1)
            classes = torch.where(classes == -100, -1, classes)
            if classes.shape[1] > 1:
                classes[0, 1] = -1
            grad = torch.Tensor.requires_grad_
            yield (
                grad(inputs["hidden"]),
                grad(inputs["weight"]),
                grad(inputs["bias"]) if "bias" in inputs else None,
                classes,
                y,
                grad(inputs["alpha"]),
                more.get("label_smoothing", 0.0),
                more.get("softcap"),
                reduction,
                "",
                True,
                at_once,
                True,
            )


@pytest.mark.system
def test_compiles_whole():
    torch._dynamo.reset()
    weight = torch.randn(90, 6, requires_grad=True)

    def loss(hidden, target):
        return diffmax_linear_loss(hidden.sin(), weight, target, 0.6, label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for N in (5, 12):
        hidden, target = torch.randn(N, 6, requires_grad=True), torch.randint(90, (N,))
        results = [f(hidden, target) for f in (loss, compiled)]
        found = [(x, *torch.autograd.grad(x, (hidden, weight))) for x in results]
        for eager, ours in zip(*found, strict=True):
            assert_close(ours, eager, "gradient")


def test_vmap_and_func_grad():
    hidden, weight, target = torch.randn(3, 5, 6), torch.randn(40, 6), torch.randint(40, (3, 5))
    each = torch.vmap(lambda h, t: diffmax_linear_loss(h, weight, t, 0.5))(hidden, target)
    found = torch.func.grad(lambda w: diffmax_linear_loss(hidden, w, target, 0.5))(weight)
    w = weight.clone().requires_grad_()
    for i in range(3):
        assert_close(each[i], diffmax_linear_loss(hidden[i], weight, target[i], 0.5))
    loss = diffmax_linear_loss(hidden, w, target, 0.5)
    assert_close(found, torch.autograd.grad(loss, w)[0], "gradient")


def test_autocast_multiplies_in_its_dtype_and_gives_fp32():
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True)
    target = torch.randint(40, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = diffmax_linear_loss(hidden, weight, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = diffmax_linear_loss(hidden.bfloat16(), weight.bfloat16(), target)
    assert_close(loss.bfloat16(), exact)


def test_explain_says_which_backend_ran():
    hidden, weight, target = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 2])
    text = explain(diffmax_linear_loss, hidden, weight, target)
    assert (
        "diffmax::linear_loss" in text
        and f"{dispatch.last('diffmax::linear_loss')}: chosen" in text
    )
    diffmax_linear_loss(hidden, weight, target, backend="reference")
    assert dispatch.last("diffmax::linear_loss") == "reference"


def test_the_layer_is_the_function_and_learns_alpha():
    hidden, weight, target = torch.randn(4, 9, 6), torch.randn(80, 6), torch.randint(80, (4, 9))
    layer = DiffmaxLinearLoss(0.4, label_smoothing=0.1, softcap=5.0, reduction="none")
    more = {"label_smoothing": 0.1, "softcap": 5.0, "reduction": "none"}
    assert torch.equal(
        layer(hidden, weight, target), diffmax_linear_loss(hidden, weight, target, 0.4, **more)
    )
    assert not list(layer.parameters()) and "softcap=5.0" in repr(layer)
    learned = DiffmaxLinearLoss(0.4, HillMap())
    learned(hidden, weight, target, torch.zeros(80)).backward()
    assert [name for name, _ in learned.named_parameters()] == ["normalizer.log_beta"]
    assert learned.normalizer.log_beta.grad.abs() > 0
    classes, y = torch.randint(80, (4, 9, 3)), torch.full((4, 9, 3), 1 / 3)
    soft = learned(hidden, weight, classes, target_weights=y)
    assert_close(
        soft, diffmax_linear_loss(hidden, weight, classes, learned.alpha, target_weights=y)
    )


def test_the_memory_does_not_hold_the_logits():
    N, V = 512, 16_000
    hidden, weight = torch.randn(N, 16) * 2, torch.randn(V, 16)
    target = (hidden @ weight.T).argmax(-1)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step(**more):
        torch.autograd.grad(
            diffmax_linear_loss(hidden, weight, target, 0.3, **more), (hidden, weight)
        )

    for more in ({}, {"reduction": "sum"}, {"label_smoothing": 0.1}):
        assert measure_memory(lambda more=more: step(**more)).peak < 4 * N * V / 2.5


# --- bad input, both losses alike ---------------------------------------------------------------


def of_logits(X, target, **more):
    return diffmax_loss(X, target, 0.5, **more)


def of_layer(X, target, **more):
    """The same logits from a layer: hidden is X, the weight the identity."""
    return diffmax_linear_loss(X, torch.eye(X.shape[-1]).to(X), target, 0.5, **more)


def of_bias(X, target, **more):
    """The same logits, one row at a time, as a bias, which may be -inf."""
    zero = X.new_zeros(1, 2)
    reduction = more.pop("reduction", "mean")
    rows = [
        diffmax_linear_loss(
            zero, X.new_zeros(X.shape[-1], 2), t[None], 0.5, x, reduction="sum", **more
        )
        for x, t in zip(X, target, strict=True)
    ]
    found = torch.stack(rows)
    counted = (target != -100).sum()
    return {"none": found, "sum": found.sum(), "mean": found.sum() / counted}[reduction]


both = pytest.mark.parametrize("loss", [of_logits, of_layer])


@both
@pytest.mark.parametrize("wrong", [4, -1, 99])
def test_a_target_outside_names_its_value_and_position(loss, wrong):
    target = torch.tensor([0, 1, wrong])
    with pytest.raises(ValueError, match=rf"`target` must be in \[0, 3\], got {wrong} at .*\(2,\)"):
        loss(torch.randn(3, 4), target)


@both
def test_an_empty_batch_is_that_of_cross_entropy(loss):
    X, target = torch.randn(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert loss(X, target, reduction="sum") == 0
    assert loss(X, target, reduction="none").shape == (0,)
    assert math.isnan(loss(X, target)) and math.isnan(F.cross_entropy(X, target))
    loss(X, target, reduction="sum").backward()
    ignored = torch.full((3,), -100)
    assert math.isnan(loss(torch.randn(3, 4), ignored))
    assert loss(torch.randn(3, 4), ignored, reduction="sum") == 0


@both
def test_nan_makes_only_its_row_nan(loss):
    X = torch.randn(3, 4)
    X[1, 2] = torch.nan
    if loss is of_layer:
        X[1] = torch.nan
    X.requires_grad_()
    found = loss(X, torch.tensor([0, 1, 3]), reduction="none")
    assert found.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(found.sum(), X)
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("loss", [of_logits, of_bias])
@pytest.mark.parametrize("soft", [False, True])
def test_minus_infinity(loss, soft):
    """A dead row counts as 0 without a gradient; a target that cannot be costs +inf."""
    X = torch.tensor([[1.0, 0.2, -torch.inf], [-torch.inf] * 3, [0.3, 0.1, -torch.inf]])
    X.requires_grad_()
    target = torch.tensor([0, 1, 2])
    if soft and loss is of_logits:
        target = F.one_hot(target, 3).float().requires_grad_()
    found = loss(X, target, reduction="none")
    assert found[0].isfinite() and found[1] == 0 and found[2] == torch.inf
    (gradient,) = torch.autograd.grad(found[:2].sum(), X, retain_graph=True)
    assert bool(gradient.isfinite().all()) and gradient[1].abs().max() == 0
    if soft and loss is of_logits:
        (gradient,) = torch.autograd.grad(found[1], target)
        assert gradient[1].abs().max() == 0
    assert_close(loss(X[:2], target[:2]), found[:2].sum() / 2)  # a dead row counts in the mean


def test_arguments_that_do_not_fit():
    hidden, weight, target = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 2])
    for match, change in {
        r"`weight` must have shape \(V, d=4\)": {"weight": torch.randn(9, 5)},
        r"`weight` must have at least one class": {"weight": torch.randn(0, 4)},
        r"`bias` must have shape \(V=9,\)": {"bias": torch.randn(8)},
        r"`weight` must have the dtype of `hidden`": {"weight": weight.double()},
        r"`target` must have shape \(3,\)": {"target": target[:2]},
        r"`label_smoothing` must be in \[0, 1\)": {"label_smoothing": 1.0},
        r"`softcap` must be above 0": {"softcap": 0.0},
        r"`reduction` must be one of": {"reduction": "max"},
        r"`alpha` must be in \(0, 1\)": {"alpha": 1.5},
        r"`alpha` must broadcast to \(1,\)": {"alpha": torch.full((3,), 0.5)},
        r"`target` must have shape \(3, 'K'\)": {"target_weights": torch.rand(3, 2)},
        r"`target_weights` must not require a gradient": {
            "target": target[:, None],
            "target_weights": torch.ones(3, 1).requires_grad_(),
        },
    }.items():
        arguments = {"hidden": hidden, "weight": weight, "target": target, **change}
        with pytest.raises(ValueError, match=match):
            diffmax_linear_loss(**arguments)
    with pytest.raises(TypeError, match="`target` must be an integer tensor"):
        diffmax_linear_loss(hidden, weight, target.float())
    with pytest.raises(TypeError, match="`hidden` must be a floating-point tensor"):
        diffmax_linear_loss(target, weight, target)


def test_the_kind_of_rows_is_looked_up():
    """Many rows with a long support have their gradient made with the loss."""
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(5000, 4)
    target = torch.randint(5000, (64,))
    for scale, expected in ((4.0, False), (0.01, True)):
        call = losses._call(hidden * scale, weight, target, 0.5, None, None, -100)
        assert losses._many_rows_are_long(call, "auto") is expected
        assert losses._many_rows_are_long(call._replace(reduction="none"), "auto") is False

"""normmax, budgets, their losses, and the names of entmax beside entmax itself."""

import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F

import diffmax.entmax as ours
from diffmax import (
    budget_loss,
    budget_sparsemax,
    diffmax_loss,
    entmax_loss,
    normmax,
    normmax_loss,
)
from shared_kernels.testing import assert_close
from shared_kernels.testing.tolerances import tolerance

ROUNDING64 = tolerance(torch.float64, "rounding")


def double(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def objective(name, p, x, parameter):
    """What the weights p of scores x maximise."""
    if name == "normmax":
        return (p * x).sum(-1) - (p**parameter).sum(-1) ** (1 / parameter)
    return (p * x).sum(-1) - p.square().sum(-1) / 2


SOLVERS = {"normmax": normmax, "budget": budget_sparsemax}
CASES = [("normmax", a) for a in (1.1, 1.5, 2.0, 5.0)] + [("budget", k) for k in (0.5, 1, 3.7, 9)]


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_nothing_near_is_better(name, parameter):
    x = double(20, 12) * 2
    p = SOLVERS[name](x, parameter)
    mass = 1.0 if name == "normmax" else parameter
    assert_close(p.sum(-1), torch.full((20,), float(mass), dtype=torch.float64))
    assert p.min() >= 0 and (name == "normmax" or p.max() <= 1)
    assert (p == 0).any() or parameter == 9
    best = objective(name, p, x, parameter)
    for seed in range(20):  # towards another point of the polytope
        other = SOLVERS[name](double(20, 12, seed=seed + 1), parameter)
        for step in (1e-3, 0.3):
            near = objective(name, p + step * (other - p), x, parameter)
            assert bool((near <= best + ROUNDING64).all())


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_gradients(name, parameter):
    x, solve = double(4, 7).requires_grad_(), SOLVERS[name]
    parameter = torch.tensor(min(parameter, 6.2) + 0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (x, parameter))
    rows = torch.linspace(1.2, 1.9, 4, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    assert torch.autograd.gradcheck(solve, (x, rows))
    if name == "normmax":  # smooth below 2
        assert torch.autograd.gradgradcheck(lambda x: solve(x, 1.4), x)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_dims_and_edges(name, dtype):
    solve, x = SOLVERS[name], (double(5, 8, 3) * 2).to(dtype)
    assert solve(x, 1.7, 1).dtype == dtype
    exact = solve(x.double(), 1.7, 1)
    assert_close(solve(x, 1.7, 1), exact)
    assert_close(solve(x.movedim(1, -1), 1.7).movedim(-1, 1), exact.to(dtype))
    row = torch.tensor([[0.0, -torch.inf, 0.2], [-torch.inf] * 3, [0.1, torch.nan, 0.0]])
    p = solve(row.to(dtype), 1.5)
    assert p[0, 1] == 0 and p[1].abs().max() == 0 and bool(p[2].isnan().all())
    assert bool(p[0].isfinite().all())
    assert solve(torch.empty(3, 0), 1.5).shape == (3, 0)
    assert bool(solve(torch.tensor([3e38, 0.0, -3e38]), 1.5).isfinite().all())


def test_ties_and_whole_budgets():
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 3.0, 0.0, 0.0], [2.0, 1.0, -torch.inf, 0.0]])
    expected = torch.tensor([[0.5] * 4, [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert_close(budget_sparsemax(x, 2.0), expected)
    assert_close(budget_sparsemax(x[:2], 4.0), torch.ones(2, 4))
    few = torch.tensor([[1.0, -torch.inf, -torch.inf]])
    assert budget_sparsemax(few, 2.0).tolist() == [[1.0, 0.0, 0.0]]
    assert_close(budget_sparsemax(x, 1.0), ours.sparsemax(x))


def test_arguments_that_do_not_fit():
    x = torch.randn(3, 5)
    for match, call in {
        "`alpha` must be above 1, got 1.0": lambda: normmax(x, 1.0),
        r"`budget` must be in \(0, 5\], got 6": lambda: budget_sparsemax(x, 6),
        r"`budget` must be in \(0, 5\], got 0": lambda: budget_sparsemax(x, 0),
        r"`budget` must broadcast to \(3, 1\)": lambda: budget_sparsemax(x, torch.ones(5)),
        r"`alpha` must be in \(1, 2\], got 2.5": lambda: entmax_loss(x, torch.zeros(3).long(), 2.5),
        r"`target` must have the shape of `X`": lambda: budget_loss(x, torch.ones(3, 4)),
        r"`target` must be in \[0, 1\], got 2": lambda: budget_loss(x, torch.full((3, 5), 2.0)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    for call in (lambda: normmax(x, "2"), lambda: budget_sparsemax(x, None), lambda: normmax([1])):
        with pytest.raises(TypeError):
            call()


LOSSES = {
    "entmax": lambda X, y, **more: entmax_loss(X, y, 1.4, **more),
    "sparsemax": lambda X, y, **more: entmax_loss(X, y, 2.0, **more),
    "normmax": lambda X, y, **more: normmax_loss(X, y, 1.6, **more),
}
WEIGHTS = {
    "entmax": lambda X: ours.entmax_bisect(X, 1.4),
    "sparsemax": ours.sparsemax,
    "normmax": lambda X: normmax(X, 1.6),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_loss_is_the_gap(name):
    loss, X = LOSSES[name], double(6, 5).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, -100])
    each = loss(X, target, reduction="none")
    assert bool((each >= 0).all()) and each[5] == 0
    (dX,) = torch.autograd.grad(each.sum(), X)
    gap = WEIGHTS[name](X) - F.one_hot(target.clamp(min=0), 5)
    assert_close(dX, torch.where((target >= 0).unsqueeze(1), gap, 0.0), "gradient")
    assert_close(loss(X, target), each.sum() / 5)
    assert torch.autograd.gradcheck(lambda X: loss(X, target), X)
    soft = double(6, 5).softmax(-1)
    assert torch.autograd.gradcheck(lambda X: loss(X, soft), X)
    assert loss(X, WEIGHTS[name](X).detach()).abs() < ROUNDING64
    dead = torch.tensor([[-torch.inf] * 3, [0.0, 1.0, -torch.inf]], requires_grad=True)
    found = loss(dead, torch.tensor([0, 2]), reduction="none")
    assert found[0] == 0 and found[1] == torch.inf
    assert torch.autograd.grad(found[0], dead)[0].abs().max() == 0


def test_entmax_loss_is_diffmax_loss_and_differentiable_in_alpha():
    X, target = double(6, 5), torch.randint(5, (6,))
    assert_close(entmax_loss(X, target, 1.7), diffmax_loss(X, target, 2 - 1.7))
    alpha = torch.tensor([[1.2], [1.5], [1.7], [1.9], [1.3], [1.6]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: entmax_loss(X, target, a), alpha.requires_grad_())


def test_several_labels():
    X = double(8, 6).requires_grad_()
    y = (double(8, 6, seed=3) > 0).double()
    y[2] = 0
    each = budget_loss(X, y, reduction="none")
    assert bool((each >= -1e-12).all()) and each[2] == 0
    (dX,) = torch.autograd.grad(each.sum(), X)
    k = y.sum(-1, keepdim=True)
    gap = budget_sparsemax(X, k.clamp(min=1)) - y
    assert_close(dX, torch.where(k > 0, gap, 0.0), "gradient")
    assert torch.autograd.gradcheck(lambda X: budget_loss(X, y), X)
    assert budget_loss(10 * y, y.bool()).abs() < ROUNDING64  # every label leads by 1


# --- beside the package entmax ------------------------------------------------------------------

FUNCTIONS = {
    "sparsemax": {},
    "entmax15": {},
    "sparsemax_bisect": {},
    "entmax_bisect": {"alpha": 1.3},
    "normmax_bisect": {"alpha": 1.7},
    "budget_bisect": {"budget": 3.0},
}
OF_ROWS = {
    "sparsemax_loss": {},
    "entmax15_loss": {},
    "sparsemax_bisect_loss": {},
    "entmax_bisect_loss": {"alpha": 1.3},
    "normmax_bisect_loss": {"alpha": 1.7},
}
LAYERS = {
    "Sparsemax": {},
    "Entmax15": {},
    "SparsemaxBisect": {"n_iter": 50},
    "EntmaxBisect": {"alpha": 1.3},
    "NormmaxBisect": {"alpha": 1.7},
    "BudgetBisect": {"budget": 3.0},
}
LOSS_LAYERS = {
    "SparsemaxLoss": {},
    "SparsemaxBisectLoss": {},
    "Entmax15Loss": {},
    "EntmaxBisectLoss": {"alpha": 1.3},
    "NormmaxBisectLoss": {"alpha": 1.7},
}


def test_every_name_of_the_table_is_there():
    assert sorted(ours.__all__) == sorted([*FUNCTIONS, *OF_ROWS, *LAYERS, *LOSS_LAYERS])
    x, target = torch.randn(4, 6), torch.randint(6, (4,))
    for name, options in LAYERS.items():
        assert getattr(ours, name)(**options)(x).shape == x.shape
    for name, options in LOSS_LAYERS.items():
        for reduction in ("mean", "elementwise_mean", "sum", "none"):
            layer = getattr(ours, name)(**options, reduction=reduction)
            assert layer(x, target).shape == ((4,) if reduction == "none" else ())


@pytest.mark.extras
def test_values_and_gradients_are_those_of_entmax():
    theirs = importlib.import_module("entmax")
    public = {n for n, x in vars(theirs).items() if callable(x)}
    assert public == set(ours.__all__)
    X, target = double(8, 9), torch.randint(9, (8,))
    for name, options in {**FUNCTIONS, **LAYERS, **OF_ROWS, **LOSS_LAYERS}.items():
        results = []
        for module in (ours, theirs):
            function, x = getattr(module, name), X.clone().requires_grad_()
            if name in FUNCTIONS:
                value = function(x, **options)
            elif name in LAYERS:
                value = function(**options)(x)
            elif name in OF_ROWS:
                value = function(x, target, **options)
            else:
                value = function(**options)(x, target)
            g = torch.linspace(1, 2, value.numel(), dtype=torch.float64).reshape(value.shape)
            results.append((value.detach(), torch.autograd.grad(value, x, g)[0]))
        for a, b in zip(*results, strict=True):
            assert_close(a, b, "gradient")
        mine, other = (inspect.signature(getattr(m, name)).parameters for m in (ours, theirs))
        assert list(mine)[: len(other)] == list(other), name


@pytest.mark.extras
def test_where_entmax_1_3_is_not_right():
    """What the table of docs/diffmax/from-entmax.md says of it."""
    theirs = importlib.import_module("entmax")
    X, target = torch.randn(4, 6), torch.tensor([0, 1, -100, 2])
    with pytest.raises(RuntimeError):  # the default ignore_index is never looked at
        theirs.SparsemaxLoss()(X, target)
    assert_close(
        ours.SparsemaxLoss()(X, target), ours.SparsemaxLoss()(X[[0, 1, 3]], target[[0, 1, 3]])
    )
    dead = torch.full((1, 3), -torch.inf)
    assert bool(theirs.entmax_bisect(dead).isnan().all())
    assert ours.entmax_bisect(dead).abs().max() == 0

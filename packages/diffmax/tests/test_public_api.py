"""Signatures, the loss, the statistics, and the monitored variant."""

import inspect
import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import diffmax
from diffmax import diffmax_bisect, diffmax_loss, sparsity_stats
from shared_kernels.testing.tolerances import tolerance

ROUNDING64 = tolerance(torch.float64, "rounding")
ROUNDING32 = tolerance(torch.float32, "rounding")
FLOAT32 = tolerance(torch.float32)
LIMIT = 1e-5  # alpha = 1 - 1e-7 is this near to softmax
RESIDUAL = 1e-4  # of the sum of weights after the default number of steps


def test_documented_signatures():
    defaults = {
        k: p.default for k, p in inspect.signature(diffmax_bisect).parameters.items() if k != "X"
    }
    added = {name: defaults.pop(name) for name in ("dtype", "backend")}
    assert added == {"dtype": None, "backend": "auto"}
    assert defaults == {"alpha": 0.9, "dim": -1, "n_iter": 50, "ensure_sum_one": True}
    layer = inspect.signature(diffmax.DiffmaxBisectModule).parameters
    names = ["alpha", "dim", "n_iter", "ensure_sum_one", "alpha_map", "num_heads"]
    assert list(layer) == [*names, "device", "dtype"]
    assert all(layer[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("device", "dtype"))


def test_every_form_of_alpha():
    X = torch.randn(3, 9)
    Y = diffmax_bisect(X, 0.25)
    parameter = torch.nn.Parameter(torch.tensor(0.25))
    for alpha in (
        parameter,
        torch.tensor([0.25]),
        lambda: 0.25,
        lambda: parameter,
        parameter.half(),
    ):
        torch.testing.assert_close(diffmax_bisect(X, alpha), Y)
    assert diffmax_bisect(torch.tensor(3.0)) == 1


# --- diffmax_loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_loss_gradient_is_the_gap(alpha):
    X = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (6,))
    loss = diffmax_loss(X, target, alpha, reduction="sum")
    (dX,) = torch.autograd.grad(loss, X)
    torch.testing.assert_close(dX, diffmax_bisect(X, alpha).detach() - F.one_hot(target, 5))
    assert torch.autograd.gradcheck(lambda X: diffmax_loss(X, target, alpha), X)
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(-1)
    assert torch.autograd.gradcheck(lambda X: diffmax_loss(X, soft, alpha), X)
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: diffmax_loss(X.detach(), soft, a), a)


def test_loss_tends_to_cross_entropy_and_has_a_margin():
    X, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    ours = diffmax_loss(X, target, 1 - 1e-7, reduction="none")
    torch.testing.assert_close(
        ours, F.cross_entropy(X, target, reduction="none"), rtol=LIMIT, atol=0
    )
    assert diffmax_loss(torch.tensor([[2.1, 0.0]]), torch.tensor([0]), 0.5) == 0
    soft = diffmax_bisect(X, 0.4)
    assert diffmax_loss(X, soft, 0.4).abs() < ROUNDING64
    assert bool((diffmax_loss(X, target, 0.4, reduction="none") >= 0).all())


def test_loss_reductions_masks_and_ignored_rows():
    X = torch.randn(4, 5, 3)
    target = torch.randint(5, (4, 3))
    target[0, 0] = -100
    each = diffmax_loss(X, target, 0.6, dim=1, reduction="none")
    assert each.shape == (4, 3) and each[0, 0] == 0
    torch.testing.assert_close(diffmax_loss(X, target, 0.6, dim=1, reduction="sum"), each.sum())
    torch.testing.assert_close(diffmax_loss(X, target, 0.6, dim=1), each.sum() / 11)
    masked = torch.tensor([[1.0, 0.5, -math.inf]], requires_grad=True)
    loss = diffmax_loss(masked, torch.tensor([0]), 0.8)
    loss.backward()
    assert bool(loss.isfinite()) and bool(masked.grad.isfinite().all())


# --- dtype --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [torch.int64, torch.float16, torch.float32, torch.float64])
def test_dtype_casts_the_scores_first_as_softmax_does(of, to):
    X = (3 * torch.randn(4, 9)).to(of)
    assert torch.equal(diffmax_bisect(X, 0.5, dtype=to), diffmax_bisect(X.to(to), 0.5))
    assert diffmax_bisect(X, 0.5, dtype=to).dtype == torch.softmax(X, -1, dtype=to).dtype


def test_a_gradient_comes_back_in_the_dtype_of_the_scores():
    X = torch.randn(4, 9, dtype=torch.float16, requires_grad=True)
    wide = X.detach().double().requires_grad_()
    for x, options in ((X, {"dtype": torch.float64}), (wide, {})):
        diffmax_bisect(x, 0.5, **options).square().sum().backward()
    assert X.grad.dtype == torch.float16 and torch.equal(X.grad, wide.grad.half())


@pytest.mark.system
def test_dtype_compiles():
    function = torch.compile(
        lambda x: diffmax_bisect(x, 0.5, dtype=torch.float32), fullgraph=True, backend="eager"
    )
    X = torch.randint(-3, 3, (4, 9))
    assert torch.equal(function(X), diffmax_bisect(X.float(), 0.5))


# --- sparsity_stats -----------------------------------------------------------------------------


def test_stats_of_known_weights():
    Y = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4, [math.nan] * 4])
    stats = sparsity_stats(Y)
    expected = {
        "sparsity": 5 / 8,
        "support_mean": 1.5,
        "support_min": 1.0,
        "entropy": math.log(2) / 2,
        "max_prob": 0.75,
        "sum_error": 0.0,
    }
    assert stats.keys() == expected.keys()
    assert all(type(v) is float for v in stats.values())
    assert all(abs(stats[k] - v) < ROUNDING32 for k, v in expected.items())
    assert sparsity_stats(Y.T, 0) == stats
    for empty in (torch.zeros(3, 4), torch.empty(0, 4), torch.empty(3, 0)):
        assert set(sparsity_stats(empty).values()) == {0.0}


# --- monitoring ---------------------------------------------------------------------------------

FORWARD = {
    *(f"forward/{k}" for k in sparsity_stats(torch.ones(1, 1))),
    *(f"alpha/{k}" for k in ("mean", "min", "max")),
    *(f"convergence/{k}" for k in ("iterations", "residual_max", "tau_mean")),
    *(f"meta/{k}" for k in ("rows", "length", "n_iter")),
}
BACKWARD = {f"backward/{k}" for k in ("grad_norm", "grad_max", "alpha_grad")}


@pytest.fixture
def logged(monkeypatch):
    """Calls of a stand-in for swanlab.log, as (dict, step)."""
    calls = []
    fake = types.ModuleType("swanlab")
    fake.log = lambda data, step=None: calls.append((data, step))
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    return calls


def test_monitored_result_gradients_and_keys(logged):
    from diffmax import diffmax_bisect_monitored

    X, alpha = torch.randn(2, 3, 9, requires_grad=True), torch.tensor(0.6, requires_grad=True)
    weight = torch.randn(2, 3, 9)
    plain = diffmax_bisect(X, alpha)
    expected = torch.autograd.grad((plain * weight).sum(), (X, alpha))
    Y = diffmax_bisect_monitored(X, alpha, name_prefix="enc/0", step=7, extra_metadata={"layer": 3})
    assert torch.equal(Y, plain) and len(logged) == 1
    got = torch.autograd.grad((Y * weight).sum(), (X, alpha))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not X._backward_hooks and not alpha._backward_hooks
    (forward, step), (backward, step_back) = logged
    assert step == step_back == 7
    assert set(forward) == {f"enc/0/{k}" for k in FORWARD | {"meta/layer"}}
    assert set(backward) == {f"enc/0/{k}" for k in BACKWARD}
    assert all(type(v) is float and math.isfinite(v) for v in (forward | backward).values())
    assert abs(backward["enc/0/backward/grad_norm"] - got[0].norm().item()) < FLOAT32 / 2
    assert abs(backward["enc/0/backward/grad_max"] - got[0].abs().max().item()) < ROUNDING32
    assert abs(backward["enc/0/backward/alpha_grad"] - got[1].item()) < FLOAT32 / 2


def test_monitored_numbers_are_right(logged):
    from diffmax import diffmax_bisect_monitored

    X = torch.randn(4, 30)
    X[0] = -math.inf
    Y = diffmax_bisect_monitored(X, torch.tensor([[0.1], [0.2], [0.5], [0.6]]))
    (found, step) = logged[0]
    assert step is None
    stats = sparsity_stats(Y)
    assert all(abs(found[f"diffmax/forward/{k}"] - v) < ROUNDING32 for k, v in stats.items())
    assert abs(found["diffmax/alpha/mean"] - 0.35) < ROUNDING32
    assert 2 <= found["diffmax/convergence/iterations"] <= 14
    assert found["diffmax/convergence/residual_max"] < RESIDUAL
    taus = []
    for row, y, a in zip(X[1:], Y[1:], (0.8, 0.5, 0.4), strict=True):
        i = int(row.argmax())  # y = (1 + a (x - tau))^(1/a)
        taus.append(row[i].item() - (y[i].item() ** a - 1) / a)
    assert abs(found["diffmax/convergence/tau_mean"] - sum(taus) / 3) < FLOAT32 / 2


def test_monitored_leaves_out_what_is_not_computed(logged):
    from diffmax import diffmax_bisect_monitored

    X = torch.randn(3, 9, requires_grad=True)
    diffmax_bisect_monitored(X, 0.5).square().sum().backward()
    assert set(logged[1][0]) == {"diffmax/backward/grad_norm", "diffmax/backward/grad_max"}
    logged.clear()
    alpha = torch.tensor(0.5, requires_grad=True)
    diffmax_bisect_monitored(X.detach(), alpha).square().sum().backward()
    assert set(logged[1][0]) == {"diffmax/backward/alpha_grad"}
    logged.clear()
    diffmax_bisect_monitored(torch.full((2, 3), -math.inf), 0.5)
    diffmax_bisect_monitored(torch.empty(0, 3), 0.5)
    for found, _ in logged:
        assert all(math.isfinite(v) for v in found.values())
        assert found["diffmax/forward/entropy"] == 0.0 == found["diffmax/convergence/tau_mean"]
    with pytest.raises(ValueError, match="extra_metadata"):
        diffmax_bisect_monitored(X, 0.5, extra_metadata={"x": math.nan})


def test_without_swanlab_the_import_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(ImportError, match=r"diffmax\[monitoring\]"):
        from diffmax import diffmax_bisect_monitored  # noqa: F401
    with pytest.raises(AttributeError):
        _ = diffmax.no_such_name


@pytest.mark.system
def test_star_import_needs_no_extra():
    code = "import sys; sys.modules['swanlab'] = None\nfrom diffmax import *\ndiffmax_loss"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.extras
def test_real_swanlab_offline(tmp_path):
    """The keys are in the file that swanlab writes without network or login, with their numbers."""
    pytest.importorskip("swanlab", reason="needs the optional swanlab")
    code = f"""
import swanlab, torch
from diffmax import diffmax_bisect_monitored
swanlab.init(project="test", mode="offline", logdir={str(tmp_path)!r})
X, alpha = torch.randn(4, 9, requires_grad=True), torch.tensor(0.5, requires_grad=True)
for step in range(3):
    diffmax_bisect_monitored(
        X, alpha, name_prefix="enc", step=step, extra_metadata={{"layer": 3.0}}
    ).square().sum().backward()
swanlab.finish()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*.swanlab"))
    for key in FORWARD | BACKWARD | {"meta/layer"}:
        assert f"enc/{key}".encode() in written, key
    assert b"enc/no/such/key" not in written

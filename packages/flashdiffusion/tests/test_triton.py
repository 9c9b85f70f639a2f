"""The CPU leg's cases on the Triton backend: compiled on a GPU, interpreted without one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flashdiffusion import DiffusionMap, FlashDiffusion, _reference, explain
from flashdiffusion._operator import Kernel
from flashdiffusion._problem import LOG2_E, Problem
from shared_kernels import device, dispatch
from shared_kernels.testing import assert_close, parametrize, poisoned_empty, tolerance

from . import rank
from .cases import CASES, ROWS, SOLVED, SPANS, TOL, inputs, swiss_roll
from .test_group import job, loaded

pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)

WHERE = "cuda" if torch.cuda.is_available() and not device.interpreting() else "cpu"


def runs(case):
    """Where FlashDiffusion is made of kernel products: |x - y|^2, and rows only of one set."""
    two_sets = "M" in case.values and case.get("normalize") != "none"
    return case.get("score") is None and not two_sets


@parametrize([c for c in CASES if runs(c)])
def test_equals_the_dense_operator(case):
    Q, K, V, kwargs = inputs(case)
    kwargs["h"] = None if kwargs["h"] is None else kwargs["h"].to(WHERE)
    exact = _reference.flash_diffusion(
        Q.double(),
        K.double(),
        V.double(),
        **{**kwargs, "h": None if kwargs["h"] is None else kwargs["h"].cpu()},
    )
    q, k, v = (Q.to(WHERE), (Q if K is Q else K).to(WHERE), V.to(WHERE))
    with poisoned_empty():
        out = FlashDiffusion(q, k, v, **kwargs, precision="float32", backend="triton")
    assert dispatch.last("flashdiffusion::matvec") == "triton"
    assert_close(out.cpu(), exact)


@pytest.mark.parametrize("r", [1, 16, 17, 40])
def test_columns(r):
    X, V = torch.randn(70, 3), torch.randn(70, r) * torch.logspace(-6, 6, r)
    kernel = Kernel(Problem(X.to(WHERE), None, 1.0), backend="triton")
    with poisoned_empty():
        out = kernel.matvec(V.to(WHERE)).cpu()
    exact = torch.exp(-(torch.cdist(X.double(), X.double()) ** 2)) @ V.double()
    # each column in its own units
    size = exact.abs().amax(0)
    assert_close((out / size).float(), exact / size, scale=0.2)


def test_small_weights_and_large_norms_keep_their_digits():
    X = torch.randn(64, 2) * 3.0
    exact = torch.exp(-(torch.cdist(X.double(), X.double()) ** 2))
    problem = Problem(X.to(WHERE), None, 1.0, precision="float32")
    out = Kernel(problem, backend="triton").matvec(torch.eye(64, device=WHERE))
    assert ((out.cpu() - exact).abs() < 5 * SPANS * exact + SOLVED).all()


def test_bits_repeat():
    X, V = torch.randn(65, 3, device=WHERE), torch.randn(65, 2, device=WHERE)
    kernel = Kernel(Problem(X, None, 1.0), backend="triton")
    assert torch.equal(kernel.matvec(V), kernel.matvec(V))


def test_empty():
    kernel = Kernel(Problem(torch.zeros(0, 3, device=WHERE), None, 1.0), backend="triton")
    assert kernel.matvec(torch.zeros(0, 2, device=WHERE)).shape == (0, 2)


def test_explain_knows_the_kernel():
    lines = explain(torch.randn(8, 3, device=WHERE)).splitlines()
    assert "  triton: can run" in lines or "  triton: chosen" in lines


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"score": "dot"}, "score"),
        ({"precision": "float64"}, "float64"),
        ({"precision": "mixed"}, "float64"),
        ({"d": 253}, "252"),
    ],
)
def test_what_it_cannot_run_is_refused(kwargs, words):
    X = torch.randn(8, kwargs.pop("d", 3), device=WHERE)
    kernel = Kernel(Problem(X, None, 0.01, **kwargs), backend="triton")
    with pytest.raises(NotImplementedError, match=words):
        kernel.matvec(torch.ones(8, 1, device=WHERE))


def in_half(X, V, beta):
    """K V as fp16 operands make it: points, weights and columns rounded, all else exact."""
    X = X.double() - X.double().mean(0)
    norm = beta * LOG2_E * (X * X).sum(1)
    points = ((2.0 * beta * LOG2_E) ** 0.5 * X).half().double()
    weights = torch.exp2(points @ points.T - norm[:, None] - norm + 14.0).half().double() / 2**14
    size = V.abs().amax(0)
    return weights @ (V / size).half().double() * size


@pytest.mark.parametrize("r", [1, 12, 33])
def test_half_precision_rounds_operands_and_nothing_else(r):
    X, V = torch.randn(150, 3) + 50.0, torch.randn(150, r) * torch.logspace(-6, 6, r)
    kernel = Kernel(Problem(X.to(WHERE), None, 2.0, precision="half"))
    with poisoned_empty():
        out = kernel.matvec(V.to(WHERE)).cpu()
    assert dispatch.last("flashdiffusion::matvec") == "triton"
    expected = in_half(X, V.double(), 2.0)
    size = expected.abs().amax(0)
    # a weight may fall on the other side of an fp16 rounding: one in a sum of many
    assert_close((out / size).half(), expected / size, scale=0.5)
    exact = torch.exp(-2.0 * torch.cdist(X.double(), X.double()) ** 2) @ V.double()
    # what the roundings may cost: 2^-10 of the largest cancelling term, in powers of two
    spread = 2.0 * float(((X - X.mean(0)) ** 2).sum(1).max())
    bound = np.expm1(2.0**-10 * 2.0 * spread) + tolerance(torch.float16)
    assert ((out - exact).abs() <= bound * (V.double().abs().sum(0))).all()
    assert torch.equal(kernel.matvec(V.to(WHERE)), kernel.matvec(V.to(WHERE)))


def fitted(X, beta, precision="half", **kwargs):
    on = "cuda" if WHERE == "cuda" else None
    dm = DiffusionMap(beta, n_components=4, solver="krylov", precision=precision, **kwargs)
    return dm.set_params(device=on).fit(X)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_first_rung_in_half_precision(dtype):
    X = (swiss_roll(200)[0] / 8.0).astype(dtype)
    without, rung = fitted(X, 3.0, "auto"), fitted(X, 3.0)
    assert without.n_half_passes_ == 0 and rung.converged_
    # it has run, and the solves after it had less to do
    assert rung.n_half_passes_ >= 2
    assert rung.n_passes_ - rung.n_half_passes_ < without.n_passes_
    atol = TOL if dtype == np.float32 else SOLVED
    np.testing.assert_allclose(rung.eigenvalues_, without.eigenvalues_, rtol=0, atol=atol)
    # what is reported is measured with the exact operator
    assert rung.residuals_.max() <= rung.tol
    P = rung.operator()
    unit = torch.from_numpy(rung.eigenvectors_ * np.sqrt(rung.stationary_)[:, None])
    left = (P.apply(unit) - unit * torch.from_numpy(rung.eigenvalues_)).norm(dim=0)
    assert float(left.max()) <= (2.0 if dtype == np.float64 else 20.0) * rung.tol


@pytest.mark.skipif(WHERE == "cuda", reason="a forked process has no CUDA")
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_several_processes_share_a_rung_in_half_precision(tmp_path):
    assert job("rough", tmp_path, 2) == [0, 0]
    rank.rough(tmp_path, None, "alone")
    found = [loaded(tmp_path / f"rough-{r}.npz") for r in range(2)]
    alone = loaded(tmp_path / "rough-alone.npz")
    for name in alone:
        np.testing.assert_array_equal(found[0][name], found[1][name])
    assert found[0]["passes"][1] >= 2
    np.testing.assert_allclose(found[0]["values"], alone["values"], rtol=0, atol=TOL)


def test_a_rung_that_does_not_help_does_no_harm(monkeypatch):
    X = np.random.default_rng(0).standard_normal((160, 20)).astype(np.float32)
    without, rung = fitted(X, 0.02, "auto"), fitted(X, 0.02)
    np.testing.assert_allclose(rung.eigenvalues_, without.eigenvalues_, rtol=0, atol=TOL)
    assert rung.n_passes_ - rung.n_half_passes_ <= without.n_passes_ + 1

    from flashdiffusion._triton import forward

    launch = forward.launch_matvec_forward

    def noise(prepared, V, N, first, *, is_half):
        if not is_half:
            return launch(prepared, V, N, first, is_half=False)
        return torch.randn(N, V.shape[1], device=V.device)

    # nothing that it finds has to do with the operator
    monkeypatch.setattr(forward, "launch_matvec_forward", noise)
    lost = fitted(X, 0.02)
    assert lost.converged_ and 0 < lost.n_half_passes_ <= 20
    np.testing.assert_allclose(lost.eigenvalues_, without.eigenvalues_, rtol=0, atol=TOL)
    assert lost.n_passes_ - lost.n_half_passes_ <= without.n_passes_ + 1


def test_a_map_with_a_rung_in_half_precision_goes_on_as_any_other(tmp_path, monkeypatch):
    X = (swiss_roll(160)[0] / 8.0).astype(np.float32)
    exact = fitted(X, 3.0)
    matvec, left = Kernel.matvec, [0]

    class Stop(Exception):  # noqa: N818 - it is no error
        pass

    def stop(self, V):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return matvec(self, V)

    monkeypatch.setattr(Kernel, "matvec", stop)
    for start in range(100):
        # the first sums rows twice before there is anything to keep
        left[0] = 1 if start else 3
        try:
            dm = fitted(X, 3.0, checkpoint=tmp_path / "c")
            break
        except Stop:
            continue
    assert start >= exact.n_passes_ - 4
    np.testing.assert_array_equal(dm.eigenvalues_, exact.eigenvalues_)
    assert (dm.n_passes_, dm.n_half_passes_) == (exact.n_passes_, exact.n_half_passes_)


def test_new_points_and_landmarks_after_a_rung_in_half_precision():
    X = (swiss_roll(160)[0] / 8.0).astype(np.float32)
    without, rung = (fitted(X, 3.0, p, landmarks=np.arange(100)) for p in ("auto", "half"))
    assert rung.n_half_passes_ > 0
    np.testing.assert_allclose(rung.eigenvectors_, without.eigenvectors_, rtol=0, atol=ROWS)
    new = X[:9] + np.float32(0.01)
    np.testing.assert_allclose(rung.transform(new), without.transform(new), rtol=0, atol=ROWS)


@pytest.mark.parametrize(
    ("beta", "words"),
    [("self-tuning", "written for the score"), (100.0, "above 128 half precision")],
)
def test_half_precision_that_cannot_be_is_refused_before_any_sweep(beta, words, monkeypatch):
    monkeypatch.setattr(Kernel, "matvec", None)
    X = np.random.default_rng(0).standard_normal((60, 3))
    dm = DiffusionMap(beta, n_components=4, precision="half", device=WHERE)
    with pytest.raises(NotImplementedError, match=words):
        dm.fit(X)

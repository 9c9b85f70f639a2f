import pytest
import torch

from flashdiffusion import eigensolver
from shared_kernels.testing import assert_close

from .cases import ROUNDING, SOLVED


def problem(n=300, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    values = torch.linspace(1.0, 0.0, n, dtype=torch.float64) ** (3.0 * spread)
    return q, values, (q * values) @ q.T


@pytest.mark.parametrize("max_basis", [400, 24])
def test_pairs_with_and_without_restart(max_basis):
    q, values, A = problem()
    passes = []

    def apply(V):
        passes.append(V.shape[1])
        return A @ V

    start = torch.randn(300, 6, dtype=torch.float64)
    seen = []
    pairs = eigensolver.block_krylov(
        apply, 5, start, tol=1e-9, max_basis=max_basis, on_pass=lambda n, r: seen.append((n, r))
    )
    assert pairs.converged and pairs.n_passes == len(passes) and set(passes) == {6}
    assert_close(pairs.values, values[:5])
    measured = (A @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert measured.max() < 2 * SOLVED
    assert (pairs.residuals - measured).abs().max() < ROUNDING
    assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(5, dtype=torch.float64))
    assert_close((pairs.vectors * q[:, :5]).sum(0).abs(), torch.ones(5, dtype=torch.float64))
    assert seen[-1][1] <= SOLVED


def test_locked_vectors_are_left_out():
    q, values, A = problem()
    start = torch.randn(300, 6, dtype=torch.float64)
    pairs = eigensolver.block_krylov(lambda V: A @ V, 3, start, locked=q[:, :2], tol=1e-9)
    assert_close(pairs.values, values[2:5])
    assert (q[:, :2].T @ pairs.vectors).abs().max() < ROUNDING


def test_multiple_eigenvalues_and_an_invariant_start():
    # a start block that is itself invariant says nothing new: other directions are added
    values = torch.tensor([1.0] * 4 + [0.5] * 3 + [0.1] * 93, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))[0]
    A = (q * values) @ q.T
    start = torch.cat((q[:, :1], q[:, 4:5], q[:, 50:52], q[:, :1]), 1)
    pairs = eigensolver.block_krylov(lambda V: A @ V, 7, start, tol=1e-10)
    assert_close(pairs.values, values[:7])


def test_giving_up_is_reported():
    _, _, A = problem(spread=0.1)
    start = torch.randn(300, 4, dtype=torch.float64)
    pairs = eigensolver.block_krylov(lambda V: A @ V, 3, start, tol=1e-14, max_passes=4)
    assert not pairs.converged and pairs.n_passes == 4
    measured = (A @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert (pairs.residuals - measured).abs().max() < ROUNDING and measured.max() > 1e-14


@pytest.mark.parametrize("solve", [eigensolver.lobpcg, eigensolver.lanczos])
def test_the_other_solvers(solve):
    q, values, A = problem(spread=3.0)
    start = torch.randn(300, 6, dtype=torch.float64)
    pairs = solve(lambda V: A @ V, 3, start, locked=q[:, :1], tol=1e-7)
    assert pairs.converged and pairs.n_passes > 1
    assert_close(pairs.values, values[1:4], scale=10.0)  # LOBPCG stops at tol, not below


def test_the_whole_space():
    _, values, A = problem(12)
    start = torch.randn(12, 5, dtype=torch.float64)
    pairs = eigensolver.block_krylov(lambda V: A @ V, 3, start, tol=1e-12)
    assert pairs.values[0] <= values[0] + ROUNDING
    assert pairs.residuals.isfinite().all()

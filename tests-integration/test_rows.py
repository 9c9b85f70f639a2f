"""Every row function of every package: second derivatives, transforms, bits of a row."""

import pytest
import torch
from torch.autograd import functional, gradcheck, gradgradcheck

from adasplash import triton_entmax, triton_entmax15, triton_sparsemax
from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect, diffmax_loss
from shared_kernels import qexp
from shared_kernels.testing import others_thorough
from shared_kernels.testing.tolerances import tolerance

ROUNDING64 = tolerance(torch.float64, "rounding")

_learned = DiffmaxBisectModule(0.6, alpha_map=HillMap()).double()


def _loss(x, alpha=1.5):
    target = torch.zeros(x.shape[:-1], dtype=torch.long)
    return diffmax_loss(x, target, 2 - alpha, reduction="none").unsqueeze(-1)


# (x, alpha) -> weights, alpha as entmax counts it
WITH_ALPHA = {
    "triton_entmax": triton_entmax,
    "triton_entmax reference": lambda x, a: triton_entmax(x, a, backend="reference"),
    "qexp.entmax": qexp.entmax,
    "diffmax_bisect": lambda x, a: diffmax_bisect(x, 2 - a),
    "diffmax_bisect reference": lambda x, a: diffmax_bisect(x, 2 - a, backend="reference"),
    "diffmax_loss": _loss,
}
FIXED = {
    "triton_sparsemax": triton_sparsemax,
    "triton_entmax15": triton_entmax15,
    "qexp.sparsemax": qexp.sparsemax,
    "DiffmaxBisectModule": _learned,
    "softmax": lambda x: triton_entmax(x, 1.0),
}
ROWS = {
    **FIXED,
    **{name: (lambda x, f=f: f(x, 1.5)) for name, f in WITH_ALPHA.items()},
    **{f"{name} 1.3": (lambda x, f=f: f(x, 1.3)) for name, f in WITH_ALPHA.items()},
}


def _scores(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ROWS)
def test_twice_differentiable_in_the_scores(name):
    x = _scores(2, 5).requires_grad_()
    assert gradgradcheck(ROWS[name], (x,))
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)

    def f(x):
        return (ROWS[name](x) * weight).sum()

    row = x.detach()[0]
    hessian = functional.hessian(f, row)
    assert hessian.abs().max() > 1e-3 or "sparsemax" in name
    for other in (
        functional.hessian(f, row, vectorize=True),
        torch.func.jacrev(torch.func.jacrev(f))(row),
    ):
        assert torch.allclose(other, hessian, rtol=100 * ROUNDING64, atol=ROUNDING64 / 10)


@pytest.mark.parametrize("alpha", others_thorough([[[1.2], [1.7]], 1.01, 1.4, 1.9]), ids=str)
@pytest.mark.parametrize("name", WITH_ALPHA)
def test_twice_differentiable_in_alpha(name, alpha):
    x = _scores(2, 5).requires_grad_()
    alpha = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    assert gradcheck(WITH_ALPHA[name], (x, alpha))
    assert gradgradcheck(WITH_ALPHA[name], (x, alpha))


@pytest.mark.parametrize("name", ["triton_entmax", "qexp.entmax", "diffmax_bisect", "diffmax_loss"])
def test_third_derivatives_follow(name):
    def second(x):
        f = torch.func.jacrev(lambda x: WITH_ALPHA[name](x, 1.4).pow(3).sum())
        return torch.func.jacrev(f)(x)

    assert gradcheck(second, (_scores(4).requires_grad_(),))


@pytest.mark.parametrize("name", ROWS)
def test_transforms(name):
    f, x = ROWS[name], _scores(4, 3, 6)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(f(x).square().sum(), x)

    def loss(x):
        return f(x).square().sum()

    x = x.detach()
    assert torch.allclose(
        torch.func.grad(loss)(x), expected, rtol=ROUNDING64, atol=ROUNDING64 / 100
    )
    per_sample = torch.vmap(torch.func.grad(loss))(x)
    assert torch.allclose(per_sample, expected, rtol=ROUNDING64, atol=ROUNDING64 / 100)
    jacobian = torch.func.jacrev(f)(x[0])
    assert torch.allclose(functional.jacobian(f, x[0], vectorize=True), jacobian)
    if "reference" in name:  # plain operators
        _, tangent = torch.func.jvp(f, (x[0],), (x[0],))
        assert torch.allclose(tangent, torch.einsum("ijkl,kl->ij", jacobian, x[0]))
    else:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(f, (x,), (x,))


@pytest.mark.parametrize("name", WITH_ALPHA)
def test_per_sample_gradients_in_alpha(name):
    x, alpha = _scores(4, 3, 6), torch.tensor(1.4, dtype=torch.float64)

    def loss(alpha, x):
        return WITH_ALPHA[name](x, alpha).square().sum()

    together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(alpha, x)
    each = torch.stack([torch.func.grad(loss)(alpha, x) for x in x])
    assert torch.allclose(together, each, rtol=ROUNDING64)
    own = torch.linspace(1.1, 1.9, 4, dtype=torch.float64)
    together = torch.vmap(torch.func.grad(loss))(own, x)
    each = torch.stack([torch.func.grad(loss)(a, x) for a, x in zip(own, x, strict=True)])
    assert torch.allclose(together, each, rtol=ROUNDING64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROWS)
def test_bits_of_a_row_alone_and_among_others(name, dtype):
    """Neither the number of rows nor their order nor their neighbours matter; gradients too."""
    scale = torch.logspace(-2, 1.5, 24)[torch.randperm(24), None]
    for N in (5, 700):
        x = (_scores(24, N, seed=N) * scale).to(dtype).requires_grad_()
        whole = ROWS[name](x)
        (grad,) = torch.autograd.grad(whole, x, torch.ones_like(whole).cumsum(-1))
        for rows in ([3], [23, 0, 11], list(range(7, 19))):
            part = x.detach()[rows].requires_grad_()
            found = ROWS[name](part)
            assert torch.equal(found, whole[rows])
            (found,) = torch.autograd.grad(found, part, torch.ones_like(found).cumsum(-1))
            assert torch.equal(found, grad[rows])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 0)])
@pytest.mark.parametrize("name", [n for n in ROWS if "loss" not in n])
def test_empty_rows(name, shape):
    x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    found = ROWS[name](x)
    found.sum().backward()
    assert found.shape == x.grad.shape == shape

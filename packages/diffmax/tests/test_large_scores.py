"""Scores of any size: weights and losses know only differences of scores."""

from __future__ import annotations

import pytest
import torch

from diffmax import (
    _torch_linear,
    budget_loss,
    budget_sparsemax,
    diffmax_bisect,
    diffmax_linear_loss,
    diffmax_loss,
    diffmax_sample,
    entmax_loss,
    normmax,
    normmax_loss,
)
from diffmax.entmax import entmax_bisect, sparsemax
from shared_kernels.testing import assert_close, pairwise

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the largest number of the dtype: twice the last one is no number any more.
SHARES = (2.0**-40, 2.0**-4, 0.9)
N = 24
NORMALIZERS = {
    **{
        f"{backend} {alpha}": lambda x, a=alpha, b=backend: diffmax_bisect(x, a, backend=b)
        for backend in ("reference", "torch", "native")
        for alpha in (0.02, 0.3, 0.5, 0.75, 0.98)
    },
    "sparsemax": sparsemax,
    "entmax 1.3": lambda x: entmax_bisect(x, 1.3),
    "normmax": normmax,
    "budget 1": lambda x: budget_sparsemax(x, 1.0),
    "budget 2.5": lambda x: budget_sparsemax(x, 2.5),
}
LOSSES = {
    "diffmax": lambda x, y: diffmax_loss(x, y, 0.5, reduction="none"),
    "diffmax 0.3": lambda x, y: diffmax_loss(x, y, 0.3, reduction="none"),
    "entmax 1.3": lambda x, y: entmax_loss(x, y, 1.3, reduction="none"),
    "sparsemax": lambda x, y: entmax_loss(x, y, 2.0, reduction="none"),
    "normmax": lambda x, y: normmax_loss(x, y, reduction="none"),
}


def rows(size, dtype):
    """Rows of `size` and of steps below it that the dtype holds, and the same less `size`.

    The steps are whole numbers, at least one last place of `size`; a row ends in scores that are as
    far away as numbers go.
    """
    generator = torch.Generator().manual_seed(0)
    exponent = torch.tensor(size, dtype=torch.float64).log2().floor().item()
    step = max(0.25, torch.finfo(dtype).eps * 2.0**exponent)
    size = round(size / step) * step
    near = -step * torch.randint(0, 4, (5, N), generator=generator).double()
    near[0] = 0.0
    near[:, 0] = 0.0
    near[1, 1:] = -step
    far = near.clone()
    far[2:4, N // 2 :] = -2 * size
    return (far + size).to(dtype), far.double()


def sizes(dtype):
    return [
        share * torch.finfo(dtype).max for share in SHARES if share * torch.finfo(dtype).max > 64
    ]


# and one whose sums in fp32 are numbers, without the digits of the steps
CASES = [(torch.float32, 1e8), *((dtype, size) for dtype in DTYPES for size in sizes(dtype))]


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_weights_are_those_of_the_differences(name, dtype, size):
    x, near = rows(size, dtype)
    exact, found = (
        (p, *torch.autograd.grad((p * torch.arange(N).to(p)).sum(), y))
        for y in (near.requires_grad_(), x.requires_grad_())
        for p in (NORMALIZERS[name](y),)
    )
    assert_close(found[0], exact[0].to(dtype))
    assert_close(found[1], exact[1].to(dtype), "gradient")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_losses_are_those_of_the_differences(name, soft, dtype, size):
    x, near = rows(size, dtype)
    y = torch.tensor([0, 3, 1, 2, 0])
    targets = y, y
    if soft:
        weights = torch.zeros(5, N, dtype=torch.float64)
        weights[:, :4] = torch.tensor([0.25, 0.5, 0.125, 0.125])
        targets = weights, weights.to(dtype)
    exact, found = (
        (loss, *torch.autograd.grad(loss.sum(), z))
        for z, target in ((near.requires_grad_(), targets[0]), (x.requires_grad_(), targets[1]))
        for loss in (LOSSES[name](z, target),)
    )
    assert_close(found[0], exact[0].to(dtype))
    assert_close(found[1], exact[1].to(dtype), "gradient")


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_losses_of_several_labels_are_those_of_the_differences(dtype, size):
    x, near = rows(size, dtype)
    y = torch.zeros(5, N)
    y[:, [1, 4]] = 1.0
    exact, found = (budget_loss(z, y, reduction="none") for z in (near, x))
    assert_close(found, exact.to(dtype))


@pairwise(
    backend=["reference", "torch", "native"],
    case=CASES,
    smoothing=[0.0, 0.125],
    weights=["one class", "several classes"],
    path=["rows as a whole", "search"],
)
def test_the_loss_of_a_vocabulary_is_that_of_the_differences(
    backend, case, smoothing, weights, path, monkeypatch
):
    if path == "search":
        monkeypatch.setattr(_torch_linear, "_MIN_CLASSES", 1)
    assert_loss_of_a_vocabulary(backend, case, smoothing, weights)


def assert_loss_of_a_vocabulary(backend, case, smoothing, weights, device="cpu"):
    """A loss and its gradient are those of logits less the largest of their row."""
    x, near = rows(case[1], case[0])
    finite = x.isfinite()  # products with an infinite weight are none
    x = torch.where(finite, x, torch.finfo(x.dtype).min).requires_grad_()
    near = torch.where(finite, near, -case[1] + (torch.finfo(x.dtype).min)).requires_grad_()
    y, given = torch.tensor([0, 3, 1, 2, 0]), {}
    target = torch.nn.functional.one_hot(y, N).double()
    if weights == "several classes":
        y = torch.arange(4).expand(5, 4)
        share = torch.tensor([0.25, 0.5, 0.125, 0.125]).expand(5, 4)
        given["target_weights"] = share.to(device, x.dtype)
        target = torch.zeros(5, N).scatter(1, y, share).double()
    found = diffmax_linear_loss(
        torch.eye(5, dtype=x.dtype, device=device),
        x.T.contiguous().to(device),
        y.to(device),
        label_smoothing=smoothing,
        reduction="none",
        backend=backend,
        **given,
    ).cpu()
    target = (1 - smoothing) * target + smoothing / N
    exact = diffmax_loss(near, target, 0.5, reduction="none")
    is_number = exact.abs() < 2.0**-8 * torch.finfo(x.dtype).max  # sums on the way are numbers, too
    for ours, right in zip(found[is_number], exact.to(x.dtype)[is_number], strict=True):
        assert_close(ours, right)
    d_found, d_exact = (torch.autograd.grad(z.sum(), w)[0] for z, w in ((found, x), (exact, near)))
    assert_close(d_found, d_exact.to(x.dtype), "gradient")


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_what_is_drawn_has_a_weight(dtype, size):
    x, near = rows(size, dtype)
    index, log_prob = diffmax_sample(x, alpha=0.5)
    weights = diffmax_bisect(near, 0.5).gather(-1, index[:, None])[:, 0]
    assert (weights > 0).all()
    assert_close(log_prob, weights.log().to(dtype))


@pytest.mark.parametrize("total", [0.5, 1.0, 2.0])
def test_targets_of_any_sum_have_the_loss_of_the_formula(total):
    x = (torch.randn(3, N, dtype=torch.float64) + 5).requires_grad_()
    y = (total * torch.softmax(torch.randn(3, N, dtype=torch.float64), -1)).requires_grad_()
    p = diffmax_bisect(x, 0.5)

    def entropy(p):
        return ((p - p**1.5) / 0.75).sum(-1)

    loss = diffmax_loss(x, y, 0.5, reduction="none")
    assert_close(loss, ((p - y) * x).sum(-1) + entropy(p) - entropy(y))
    normed = normmax_loss(x, y, reduction="none")
    q = normmax(x)
    exact = ((q - y) * x).sum(-1) - q.norm(dim=-1) + y.norm(dim=-1)
    assert_close(normed, exact)
    for z in (x, y):
        found, wanted = (
            torch.autograd.grad(r.sum(), z, retain_graph=True)[0] for r in (normed, exact)
        )
        assert_close(found, wanted, "gradient")

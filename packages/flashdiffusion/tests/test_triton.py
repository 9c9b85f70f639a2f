"""The CPU leg's cases on the Triton backend: compiled on a GPU, interpreted without one."""

import pytest
import torch

from flashdiffusion import FlashDiffusion, _reference, explain
from flashdiffusion._operator import Kernel
from shared_kernels import device, dispatch
from shared_kernels.testing import assert_close, parametrize, poisoned_empty

from .cases import CASES, SOLVED, SPANS, inputs

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
    exact = _reference.flash_diffusion(Q.double(), K.double(), V.double(), **{
        **kwargs, "h": None if kwargs["h"] is None else kwargs["h"].cpu()
    })  # fmt: skip
    q, k, v = (Q.to(WHERE), (Q if K is Q else K).to(WHERE), V.to(WHERE))
    with poisoned_empty():
        out = FlashDiffusion(q, k, v, **kwargs, precision="float32", backend="triton")
    assert dispatch.last("flashdiffusion::matvec") == "triton"
    assert_close(out.cpu(), exact)


@pytest.mark.parametrize("r", [1, 16, 17, 40])
def test_columns(r):
    X, V = torch.randn(70, 3), torch.randn(70, r) * torch.logspace(-6, 6, r)
    kernel = Kernel(X.to(WHERE), beta=1.0, backend="triton")
    with poisoned_empty():
        out = kernel.matvec(V.to(WHERE)).cpu()
    exact = torch.exp(-(torch.cdist(X.double(), X.double()) ** 2)) @ V.double()
    # each column in its own units
    size = exact.abs().amax(0)
    assert_close((out / size).float(), exact / size, scale=0.2)


def test_small_weights_and_large_norms_keep_their_digits():
    X = torch.randn(64, 2) * 3.0
    exact = torch.exp(-(torch.cdist(X.double(), X.double()) ** 2))
    out = Kernel(X.to(WHERE), beta=1.0, precision="float32", backend="triton").matvec(
        torch.eye(64, device=WHERE)
    )
    assert ((out.cpu() - exact).abs() < 5 * SPANS * exact + SOLVED).all()


def test_bits_repeat():
    X, V = torch.randn(65, 3, device=WHERE), torch.randn(65, 2, device=WHERE)
    kernel = Kernel(X, beta=1.0, backend="triton")
    assert torch.equal(kernel.matvec(V), kernel.matvec(V))


def test_empty():
    kernel = Kernel(torch.zeros(0, 3, device=WHERE), beta=1.0, backend="triton")
    assert kernel.matvec(torch.zeros(0, 2, device=WHERE)).shape == (0, 2)


def test_explain_knows_the_kernel():
    lines = explain(torch.randn(8, 3, device=WHERE)).splitlines()
    assert any(line.startswith(("  triton: can run", "  triton: chosen")) for line in lines[1:3])


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
    kernel = Kernel(X, beta=0.01, backend="triton", **kwargs)
    with pytest.raises(NotImplementedError, match=words):
        kernel.matvec(torch.ones(8, 1, device=WHERE))

"""The kernels, under the interpreter or on a GPU: the CPU leg's cases."""

from __future__ import annotations

import pytest
import torch

from dsalt.kernels import dsalt_attention, select_landmarks
from shared_kernels import device, dispatch
from shared_kernels.testing import assert_close, compare, guarded, parametrize, poisoned_empty

from .cases import CASES, attention, differentiable, inputs

pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)
DEVICE = "cpu" if device.interpreting() else "cuda"


def on_device(options):
    """``dsalt_attention`` of CPU tensors, run by Triton where it runs."""
    moved = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}

    def run(**tensors):
        tensors = {n: x.to(DEVICE) for n, x in tensors.items()}
        with poisoned_empty():
            out = dsalt_attention(**tensors, **moved, backend="triton").cpu()
        assert dispatch.last("dsalt::attention") == "triton"
        return out

    return run


def close_to_reference(case, dtype):
    tensors, options = inputs(case)
    names = differentiable(case)
    if dtype.itemsize == 2:  # windows and gates stay what they are: a half type cannot hold them
        kept = {n: tensors.pop(n).float() for n in ("landmark_bias",) if n in tensors}
        windows = tensors.pop("window_sizes")
        kept["window_sizes"] = windows.float() if case.soft else windows
        options, names = {**options, **kept}, ["Q", "K", "V"]
    elif case.name == "large-scores":
        tensors["Q"] /= 3  # scores of 100: fp32 itself rounds them by 1e-5
    compare(
        on_device(options),
        attention(options, "reference"),
        tensors,
        differentiable=names,
        dtype=dtype,
    )
    assert dispatch.last("dsalt::attention_backward") == "triton"


@parametrize([c for c in CASES if c.name not in ("many-landmarks", "window-zero")])
def test_float32(case):
    close_to_reference(case, torch.float32)


HALF = ("plain", "odd-block-gqa", "packed", "window-zero", "last-queries", "head-dim-256")


@parametrize([c for c in CASES if c.name in HALF])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(case, dtype):
    close_to_reference(case, dtype)


def test_more_landmarks_than_a_tile():
    close_to_reference(next(c for c in CASES if c.name == "many-landmarks"), torch.float32)


@pytest.mark.parametrize("name", ["plain", "hard"])
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-12], ids=str)
def test_hidden_pairs_stay_hidden_at_every_scale(name, scale):
    tensors, options = inputs(next(c for c in CASES if c.name == name))
    options = {**options, "scale": scale}
    names = ["Q", "K", "V"]
    compare(on_device(options), attention(options, "reference"), tensors, differentiable=names)


def test_strides_and_missing_gradients():
    q, k, v = (torch.randn(2, 40, 2, 8, device=DEVICE).transpose(1, 2) for _ in range(3))
    windows = torch.rand(2, 2, 40, device=DEVICE) * 20
    idx = torch.randint(-1, 40, (2, 2, 5), device=DEVICE)
    strided = dsalt_attention(q, k, v, windows, idx, backend="triton")
    dense = dsalt_attention(*(x.contiguous() for x in (q, k, v)), windows, idx, backend="triton")
    assert torch.equal(strided, dense)
    wide = torch.randn(2, 2, 40, 16, device=DEVICE)[..., ::2]
    assert_close(
        dsalt_attention(wide, k, v, windows, idx, backend="triton"),
        dsalt_attention(wide.contiguous(), k, v, windows, idx, backend="triton"),
    )
    k = k.detach().requires_grad_()
    dsalt_attention(q, k, v, windows, idx, backend="triton").sum().backward()
    assert k.grad is not None and bool(k.grad.isfinite().all())


def test_bits_repeat():
    q, k, v = (torch.randn(1, 2, 70, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    windows = (torch.rand(1, 2, 70, device=DEVICE) * 20).requires_grad_()
    idx = select_landmarks(torch.randn(1, 2, 70, device=DEVICE), 4, landmark_block=32)
    runs = []
    for _ in range(2):
        out = dsalt_attention(q, k, v, windows, idx, landmark_block=32, backend="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, windows))))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_nothing_is_written_outside(monkeypatch):
    checks = []
    real = torch.empty

    def empty(*shape, dtype=torch.float32, device="cpu", **more):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if not dtype.is_floating_point or not shape:
            return real(*shape, dtype=dtype, device=device, **more)
        view, check = guarded(tuple(shape), dtype, device)
        checks.append(check)
        return view

    tensors, options = inputs(next(c for c in CASES if c.name == "gqa-bias"))
    tensors = {
        n: (x.float() if x.is_floating_point() else x).to(DEVICE) for n, x in tensors.items()
    }
    leaves = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]
    monkeypatch.setattr(torch, "empty", empty)
    out = dsalt_attention(**tensors, **options, backend="triton")
    torch.autograd.grad(out.sum(), leaves)
    monkeypatch.undo()
    assert len(checks) > 8
    for check in checks:
        check()


def test_double_is_refused_by_name():
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64, device=DEVICE)
    windows, idx = torch.ones(1, 1, 4, device=DEVICE), torch.zeros(1, 1, 1, device=DEVICE).int()
    with pytest.raises(NotImplementedError, match="the kernels take float16, bfloat16 and float32"):
        dsalt_attention(q, q, q, windows, idx, backend="triton")

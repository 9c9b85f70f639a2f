"""`python -m shared_kernels.offline.ptx run`: what it prints, and a line for each bad input."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from shared_kernels import device
from shared_kernels.offline.ptx.__main__ import main

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(device.interpreting(), reason="compiles, so Triton must not interpret"),
]


@triton.jit
def _double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)


def doubles():
    x, y = torch.arange(300.0), torch.empty(300)
    _double_kernel[(3,)](x, y, 300, BLOCK=128)
    assert torch.equal(y, 2 * x)


def reads_too_far():
    _double_kernel[(3,)](torch.ones(200), torch.empty(300), 300, BLOCK=128)


def reads_what_nobody_wrote():
    _double_kernel[(3,)](torch.empty(300), torch.empty(300), 300, BLOCK=128)


def on_a_device():
    x = torch.ones(300, device="meta")
    _double_kernel[(3,)](x, torch.empty(300), 300, BLOCK=128)


def launches_nothing():
    torch.ones(3).sum()


RUNS = {
    "doubles": (0, "nothing found"),
    "reads_too_far": (1, "out of bounds"),
    "reads_what_nobody_wrote": (1, "uninitialised"),
    "on_a_device": (1, "a tensor on meta; CPU tensors are run here"),
    "launches_nothing": (1, "launched no Triton kernel"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_function_is_run_and_watched(name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_kernels", sys.modules[__name__])
    code, words = RUNS[name]
    assert main(["run", f"my_kernels:{name}"]) == code
    printed = capsys.readouterr().out
    assert words in printed
    assert name != "doubles" or "_double_kernel: instructions of warps" in printed


BAD = {
    "no colon": (["run", "my_kernels"], "give MODULE:FUNCTION"),
    "no module": (["run", "a_module_that_is_not_there:f"], "cannot import"),
    "no function": (["run", "json:no_such_function"], "has no function"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_leads_nowhere_is_one_line(name, capsys):
    arguments, words = BAD[name]
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--largest-grid", "2"], "a grid of 3 programs; at most 2 are run here"),
        (["--target", "gfx942"], "`target` must be one of sm_80, sm_90, sm_120"),
    ],
)
def test_what_cannot_be_run_is_one_line(options, words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_kernels", sys.modules[__name__])
    assert main(["run", "my_kernels:doubles", *options]) == 1
    out = capsys.readouterr().out
    assert words in out and len(out.splitlines()) == 1

"""Laws that every normaliser, attention, op and package obeys: subclass and inherit the tests.

::

    class TestDiffmaxContract(contracts.NormalizerContract):
        normalize = staticmethod(lambda x, dim: diffmax_bisect(x, 0.7, dim))
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from . import readme
from .memory import measure_memory
from .tolerances import assert_close


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class NormalizerContract:
    """scores, dim -> weights, as ``torch.softmax``. Fill in ``normalize``."""

    normalize: ClassVar[Callable[..., Tensor]]  # (x, dim)
    dtypes: ClassVar[Sequence[torch.dtype]] = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )
    exact_gradient: ClassVar[bool] = True

    def _dtypes(self) -> Sequence[torch.dtype]:
        return self.dtypes

    def test_is_a_distribution_in_every_dtype(self) -> None:
        for dtype in self._dtypes():
            x = _randn(7, 33, dtype=dtype) * 3
            y = self.normalize(x, -1)
            assert y.dtype == dtype and y.shape == x.shape
            assert bool((y >= 0).all())
            assert_close(y.double().sum(-1).to(dtype), torch.ones(7, dtype=dtype))

    def test_larger_scores_weigh_more(self) -> None:
        x = _randn(5, 17)
        order = x.argsort(-1)
        assert bool((self.normalize(x, -1).gather(-1, order).diff(dim=-1) >= -1e-7).all())

    def test_shift_changes_nothing(self) -> None:
        x = _randn(5, 17, dtype=torch.float64)
        assert_close(self.normalize(x + 100, -1), self.normalize(x, -1))

    def test_permutation_permutes(self) -> None:
        x = _randn(5, 17)
        p = torch.randperm(17, generator=torch.Generator().manual_seed(1))
        assert_close(self.normalize(x[:, p], -1), self.normalize(x, -1)[:, p])

    def test_every_dim_and_stride(self) -> None:
        x = _randn(4, 5, 6)
        for dim in range(-3, 3):
            moved = self.normalize(x.movedim(dim, -1).contiguous(), -1).movedim(-1, dim)
            assert_close(self.normalize(x, dim), moved)
            strided = x.repeat_interleave(2, 0)[::2]
            assert_close(self.normalize(strided, dim), moved)

    def test_dead_row_gives_zeros_and_zero_gradient(self) -> None:
        x = _randn(3, 9)
        x[1] = -torch.inf
        x.requires_grad_()
        y = self.normalize(x, -1)
        assert bool((y[1] == 0).all())
        (grad,) = torch.autograd.grad((y * _randn(3, 9, seed=1)).sum(), x)
        assert bool((grad[1] == 0).all()) and bool(grad.isfinite().all())

    def test_masked_entries_weigh_nothing(self) -> None:
        x = _randn(3, 9)
        masked = x.clone()
        masked[:, 4:] = -torch.inf
        y = self.normalize(masked, -1)
        assert bool((y[:, 4:] == 0).all())
        assert_close(y[:, :4], self.normalize(x[:, :4], -1))

    def test_nan_harms_only_its_row(self) -> None:
        x = _randn(3, 9)
        clean = self.normalize(x, -1)
        x[1, 2] = torch.nan
        y = self.normalize(x, -1)
        assert bool(y[1].isnan().all())
        assert_close(y[[0, 2]], clean[[0, 2]])

    def test_huge_scores_stay_finite(self) -> None:
        x = _randn(4, 9) * 1e30
        x[0, 0], x[1, 1] = 3e38, -3e38
        y = self.normalize(x, -1)
        assert bool(y.isfinite().all())
        assert_close(y.sum(-1), torch.ones(4))

    def test_empty_and_single(self) -> None:
        assert self.normalize(torch.empty(0, 5), -1).shape == (0, 5)
        assert self.normalize(torch.empty(3, 0), -1).shape == (3, 0)
        assert_close(self.normalize(_randn(3, 1), -1), torch.ones(3, 1))

    def test_input_is_left_alone_and_bits_repeat(self) -> None:
        x = _randn(6, 40)
        kept = x.clone()
        first, second = self.normalize(x, -1), self.normalize(x, -1)
        assert torch.equal(x, kept)
        assert torch.equal(first, second)

    def test_gradcheck(self) -> None:
        if not self.exact_gradient:
            pytest.skip("this normaliser declares no exact gradient")
        x = _randn(3, 7, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: self.normalize(x, -1), x)


class AttentionContract:
    """q, k, v (B, H, N, D) -> (B, H, N_q, D_v). Fill in ``attend``; say what it offers."""

    attend: ClassVar[Callable[..., Tensor]]
    causal: ClassVar[dict[str, Any] | None] = None  # keyword arguments that make it causal
    always_causal: ClassVar[bool] = False
    grouped: ClassVar[bool] = True
    cross: ClassVar[bool] = True
    options: ClassVar[dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, Any]]]] = {}
    head_dims: ClassVar[Sequence[int]] = (1, 16, 80)
    N_memory: ClassVar[int] = 16384

    def _qkv(
        self, B: int = 2, H: int = 2, N: int = 37, D: int = 16, H_kv: int | None = None
    ) -> Any:
        H_kv = H_kv or H
        return tuple(
            _randn(B, h, N, D, seed=i).requires_grad_() for i, h in enumerate((H, H_kv, H_kv))
        )

    def test_weights_sum_to_one(self) -> None:
        q, k, _ = self._qkv()
        ones = self.attend(q, k, torch.ones_like(k))
        assert_close(ones, torch.ones_like(ones))

    def test_every_head_dim_and_length(self) -> None:
        for D in self.head_dims:
            for N in (0, 1, 2, 65):
                q, k, v = self._qkv(N=N, D=D)
                out = self.attend(q, k, v)
                assert out.shape == q.shape and bool(out.isfinite().all())
                out.sum().backward()
                assert q.grad is not None and bool(q.grad.isfinite().all())

    def test_grouped_queries_share_keys(self) -> None:
        if not self.grouped:
            pytest.skip("no grouped queries here")
        q, k, v = self._qkv(H=4, H_kv=2)
        repeated = self.attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        assert_close(self.attend(q, k, v), repeated)

    def test_strided_and_expanded_tensors(self) -> None:
        q, k, v = (x.detach() for x in self._qkv())
        exact = self.attend(q, k, v)
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        assert_close(self.attend(*strided), exact)
        expanded = v[:1, :1].expand_as(v)
        assert_close(self.attend(q, k, expanded), self.attend(q, k, expanded.contiguous()))

    def test_expanded_output_gradient(self) -> None:
        q, k, v = self._qkv()
        whole = torch.autograd.grad(self.attend(q, k, v).sum(), (q, k, v))
        out = self.attend(q, k, v)
        dense = torch.autograd.grad(out, (q, k, v), torch.ones_like(out).clone())
        for a, b in zip(whole, dense, strict=True):
            assert_close(a, b, "gradient")

    def test_one_gradient_at_a_time(self) -> None:
        q, k, v = self._qkv()
        weight = _randn(*q.shape, seed=9)
        every = torch.autograd.grad((self.attend(q, k, v) * weight).sum(), (q, k, v))
        for i in range(3):
            alone = [x.detach().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
            (grad,) = torch.autograd.grad((self.attend(*alone) * weight).sum(), alone[i])
            assert_close(grad, every[i], "gradient")

    def test_inputs_are_left_alone_and_bits_repeat(self) -> None:
        q, k, v = self._qkv()
        kept = [x.detach().clone() for x in (q, k, v)]
        runs = []
        for _ in range(2):
            out = self.attend(q, k, v)
            runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)
        for x, before in zip((q, k, v), kept, strict=True):
            assert torch.equal(x, before)

    def test_the_future_changes_nothing(self) -> None:
        if self.causal is None and not self.always_causal:
            pytest.skip("no causal form")
        q, k, v = (x.detach() for x in self._qkv())
        keywords = self.causal or {}
        before = self.attend(q, k, v, **keywords)
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 20:] += 3
        v2[:, :, 20:] -= 5
        after = self.attend(q, k2, v2, **keywords)
        assert torch.equal(after[:, :, :20], before[:, :, :20])
        assert not torch.equal(after[:, :, 20:], before[:, :, 20:])

    def test_nan_in_one_query_stays_there(self) -> None:
        q, k, v = (x.detach() for x in self._qkv())
        clean = self.attend(q, k, v)
        q = q.clone()
        q[0, 1, 5] = torch.nan
        out = self.attend(q, k, v)
        assert bool(out[0, 1, 5].isnan().all())
        clean[0, 1, 5] = out[0, 1, 5] = 0
        assert_close(out, clean)

    @pytest.mark.system
    def test_no_option_changes_the_memory_class(self) -> None:
        N = self.N_memory
        cap = N * N * 4
        for name, make in {"plain": lambda q, k, v: {}, **self.options}.items():
            q, k, v = self._qkv(B=1, H=1, N=N, D=4)

            def both(q: Tensor = q, k: Tensor = k, v: Tensor = v, make: Any = make) -> None:
                self.attend(q, k, v, **make(q, k, v)).sum().backward()

            peak = measure_memory(both).peak
            assert peak < cap, (
                f"{name}: {peak / 2**20:.0f} MB, one N x N buffer is {cap / 2**20:.0f}"
            )


class OpContract:
    """A registered op. Fill in ``op`` and ``samples`` (tuples of arguments)."""

    op: ClassVar[Any]

    def samples(self) -> Sequence[tuple[Any, ...]]:
        raise NotImplementedError

    @pytest.mark.system
    def test_opcheck(self) -> None:
        for args in self.samples():
            torch.library.opcheck(self.op, args)

    # `opcheck` traces the same samples with symbolic sizes; "inductor" compiles C++ for the graph
    @pytest.mark.thorough
    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compiles_without_graph_breaks(self, compiler: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *a: self.op(*a), fullgraph=True, dynamic=True, backend=compiler
        )
        for args in self.samples():
            eager, ours = self.op(*args), compiled(*args)
            eager, ours = ((x,) if isinstance(x, Tensor) else x for x in (eager, ours))
            for a, b in zip(ours, eager, strict=True):
                if a.is_floating_point():
                    assert_close(a, b, scale=0.1)
                else:
                    assert torch.equal(a, b)


class PackageContract:
    """A distribution. Fill in ``package`` (import name) and ``root`` (its folder)."""

    package: ClassVar[str]
    root: ClassVar[Path]

    def test_readme_blocks_run(self) -> None:
        torch.manual_seed(0)
        assert readme.blocks(self.root / "README.md"), "the README shows no code"
        readme.run_blocks(self.root / "README.md")

    def test_readme_lists_the_public_names(self) -> None:
        module = importlib.import_module(self.package)
        assert readme.api_names(self.root / "README.md") == set(module.__all__)

    def test_public_names_are_documented(self) -> None:
        module = importlib.import_module(self.package)
        bare = [n for n in module.__all__ if callable(o := getattr(module, n)) and not o.__doc__]
        assert not bare, f"no docstring: {bare}"

    def test_version_is_the_file_s(self) -> None:
        module = importlib.import_module(self.package)
        assert module.__version__ == importlib.import_module(f"{self.package}._version").__version__

    @pytest.mark.system
    def test_imports_without_optional_packages(self) -> None:
        code = (
            "import sys\n"
            "for name in ('triton', 'swanlab', 'matplotlib'): sys.modules[name] = None\n"
            f"import {self.package}\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


__all__ = [
    "AttentionContract",
    "NormalizerContract",
    "OpContract",
    "PackageContract",
]

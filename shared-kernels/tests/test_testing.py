"""The test tools must be able to fail."""

import pytest
import torch

from shared_kernels.testing import (
    Case,
    assert_close,
    assert_no_worse,
    compare,
    contracts,
    guarded,
    measure_memory,
    pairwise,
    poisoned_empty,
    readme,
)


def test_assert_close_catches_two_percent_and_nan():
    exact = torch.randn(50, dtype=torch.float64)
    assert_close(exact.float(), exact)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close((exact * 1.02).to(dtype), exact)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(exact.clone().index_fill_(0, torch.tensor([3]), torch.nan), exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(exact[:-1], exact)


def test_two_times_rule():
    exact = torch.randn(1000, dtype=torch.float64)
    eager = exact.bfloat16()
    assert_no_worse(eager, eager=eager, exact=exact)
    with pytest.raises(AssertionError, match="errs by"):
        assert_no_worse((exact * 1.02).bfloat16(), eager=eager, exact=exact)


def test_compare_checks_values_and_gradients():
    inputs = {"x": torch.randn(4, 5), "y": torch.randn(4, 5)}

    def product(x, y):
        return x * y

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        compare(product, product, inputs, differentiable=("x", "y"), dtype=dtype)

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            return g * y * 1.02, g * x

    with pytest.raises(AssertionError, match="gradient of x"):
        compare(lambda x, y: WrongGradient.apply(x, y), product, inputs, differentiable=("x", "y"))
    with pytest.raises(AssertionError, match="forward"):
        compare(lambda x, y: x * y * 1.02, product, inputs)


def test_pairwise_leaves_no_pair_to_the_thorough_cases():
    own = pytest.mark.skipif(False, reason="a mark of the value")
    axes = {"a": [1, 2, 3, 4], "b": ["x", "y", "z"], "c": [pytest.param(True, marks=own), False]}
    names, cases = pairwise(**axes).args
    assert names == ("a", "b", "c") and len(cases) == len({c.values for c in cases}) == 24
    plain = [c.values for c in cases if pytest.mark.thorough.mark not in [m.mark for m in c.marks]]
    assert len(plain) <= 14
    for i, j, pairs in ((0, 1, 12), (0, 2, 8), (1, 2, 6)):
        assert len({(values[i], values[j]) for values in plain}) == pairs
    assert all((own in c.marks) == c.values[2] for c in cases)
    (_, both) = pairwise(a=[1, 2], b=[3, 4]).args
    assert not any(c.marks for c in both)


def test_poison_and_guards():
    with poisoned_empty():
        assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
        assert (torch.empty_like(torch.zeros(2, dtype=torch.int32)) < 0).all()
    view, check = guarded((5, 4))
    assert view.isnan().all()
    view.zero_()
    check()
    torch.as_strided(view, (1,), (1,), view.storage_offset() + 20).fill_(1)
    with pytest.raises(AssertionError, match="outside"):
        check()


def test_memory_is_counted():
    memory = measure_memory(lambda: (torch.ones(1000, 1000) * 2).sum())
    assert 8_000_000 <= memory.peak < 8_100_000
    assert memory.largest == 4_000_000


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("a 1.00\n", "a   0.985", True),
        ("a 1.00", "a 0.95", False),
        ("a 0.01", "a 0.03", True),
        ("a 0.01", "a 0.05", False),
        ("7 keys", "8 keys", False),
        ("70 keys", "71 keys", True),
        ("70 keys", "74 keys", False),
        ("tensor([0.5, 0.5])", "tensor([0.5, 0.5, 0.0])", False),
        ("a 1.0e-07", "a 2.0e-07", False),
        ("a 1.0", "b 1.0", False),
        ("a 1.0\nb", "a 1.0", False),
        ("-1.5", "1.5", False),
    ],
)
def test_an_output_is_compared_with_what_is_shown(tmp_path, shown, printed, equal):
    assert (readme.difference(shown, printed) is None) == equal
    page = tmp_path / "page.md"
    page.write_text(f"# t\n\n```python\nprint({printed!r})\n```\n\n```text\n{shown}\n```\n")
    if equal:
        readme.run_blocks(page)
    else:
        with pytest.raises(ValueError, match="'t' prints something else than it shows"):
            readme.run_blocks(page)
        readme.renew(page)
        readme.run_blocks(page)


def test_a_block_without_output_may_print_anything(tmp_path, capsys):
    page = tmp_path / "page.md"
    text = "```python\nprint(1)\n```\n\nWords.\n\n```text\n2\n```\n"
    page.write_text(text)
    readme.run_blocks(page)
    assert capsys.readouterr().out == "1\n"
    readme.renew(page)
    assert page.read_text() == text


def test_readme_tools(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "# t\n\n```python\nx = 1\n```\n\n```python\nx += 1\n```\n\n"
        "| Symbol | Description |\n|---|---|\n| `f(a, b)` | f |\n| `G` | g |\n\n| `no` | x |\n"
    )
    assert readme.run_blocks(path)["x"] == 2
    assert readme.api_names(path) == {"f", "G"}


def test_case_reads_as_attributes():
    case = Case("a", B=2)
    assert case.B == 2 and case.get("C", 3) == 3 and case.replaced("b", B=4).B == 4
    with pytest.raises(AttributeError, match="case 'a' has no 'H'"):
        _ = case.H


class _Softmax(contracts.NormalizerContract):
    """torch.softmax obeys each law but the one for dead rows."""

    normalize = staticmethod(lambda x, dim: torch.softmax(x, dim).nan_to_num(nan=0.0))


def test_contract_tests_fail_where_they_should():
    contract = _Softmax()
    contract.test_is_a_distribution_in_every_dtype()
    contract.test_permutation_permutes()
    contract.test_every_dim_and_stride()
    contract.test_gradcheck()
    with pytest.raises(AssertionError):
        contract.test_dead_row_gives_zeros_and_zero_gradient()
    with pytest.raises(AssertionError):
        contract.test_nan_harms_only_its_row()

    class Scaled(contracts.NormalizerContract):
        normalize = staticmethod(lambda x, dim: torch.softmax(x, dim) * 1.02)

    with pytest.raises(AssertionError):
        Scaled().test_is_a_distribution_in_every_dtype()


class TestAttentionContractOnSdpa(contracts.AttentionContract):
    attend = staticmethod(
        lambda q, k, v, **kw: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kw
        )
    )
    causal = {"is_causal": True}
    N_memory = 2048


def test_attention_contract_can_fail():
    class Quadratic(contracts.AttentionContract):
        attend = staticmethod(
            lambda q, k, v, **kw: torch.softmax(q @ k.transpose(-1, -2), -1) @ v * 1.02
        )
        always_causal = True
        N_memory = 1024

    contract = Quadratic()
    for name in (
        "test_weights_sum_to_one",
        "test_the_future_changes_nothing",
        "test_no_option_changes_the_memory_class",
    ):
        with pytest.raises(AssertionError):
            getattr(contract, name)()

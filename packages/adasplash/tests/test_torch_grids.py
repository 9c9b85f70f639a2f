"""Every combination of the options of PyTorch's own attention, at alpha = 1, values and gradients.

Two whole grids: ``F.scaled_dot_product_attention`` (19 008 calls) and ``nn.MultiheadAttention``
(15 552 calls). Neither refuses any of them. Where PyTorch is wrong, the test says so and compares
with another call of PyTorch that means the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from adasplash import MultiheadAttention, scaled_dot_product_attention
from shared_kernels.testing import assert_close, assert_no_worse

pytestmark = pytest.mark.slow


def combinations(axes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


# --- scaled_dot_product_attention ----------------------------------------------------------------

# shapes in front of (N, D) of the queries and of the keys, and the options of the call
LAYOUTS = {
    "matrices": ((), (), {}),
    "heads": ((4,), (4,), {}),
    "batch": ((2, 4), (2, 4), {}),
    "two batches": ((2, 3, 4), (2, 3, 4), {}),
    "one key head": ((2, 4), (2, 1), {}),
    "one batch of keys": ((2, 4), (1, 4), {}),
    "two groups": ((2, 4), (2, 2), {"enable_gqa": True}),
    "one group": ((2, 4), (2, 1), {"enable_gqa": True}),
}
MASKS = (
    "none",
    "is_causal",
    "upper left",
    "lower right",
    "boolean pairs",
    "boolean keys",
    "boolean heads",
    "boolean with an empty row",
    "float pairs",
    "float heads",
    "float rows",
)
CAUSAL = MASKS[1:4]
SDPA = {
    "lengths": ((5, 5), (4, 7), (7, 4)),
    "scale": (None, 0.7, 0.0),
    "dtype": (torch.float64, torch.float32, torch.bfloat16),
    "features": ((8, 8), (8, 3), (3, 8), (1, 1)),
    "strided": (False, True),
}


def numbers(*size: int) -> Tensor:
    """Random numbers that bfloat16 holds, so that one exact answer serves every dtype."""
    return torch.randn(size).bfloat16().double()


def sdpa_inputs(lead, lead_kv, lengths, features, strided) -> list[Tensor]:
    (N_q, N_k), (D, D_v) = lengths, features
    sizes = ((*lead, N_q, D), (*lead_kv, N_k, D), (*lead_kv, N_k, D_v))
    tensors = [numbers(*size) for size in sizes]
    if strided:  # the features are not next to each other in memory
        tensors = [x.mT.contiguous().mT for x in tensors]
    return tensors


def sdpa_mask(kind: str, lead, lengths) -> tuple[Any, dict[str, Any]]:
    """The mask in float64 or boolean, and the other arguments that say it."""
    N_q, N_k = lengths
    if kind == "none":
        return None, {}
    if kind == "is_causal":
        return None, {"is_causal": True}
    if kind in ("upper left", "lower right"):
        return (causal_upper_left if kind == "upper left" else causal_lower_right)(N_q, N_k), {}
    sort, _, extent = kind.partition(" ")
    heads = lead[-1:] if lead else ()
    size = {"heads": (*heads, N_q, N_k), "rows": (N_q, 1), "keys": (1, N_k)}.get(extent, lengths)
    mask = numbers(*size)
    if sort == "float":
        return mask, {}
    mask = mask < 0.8
    mask[..., 0] = True
    if extent == "with an empty row":
        mask[1] = False
    return mask, {}


def sdpa_both(function, tensors, mask, dtype, options, **more) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of a call in one dtype."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    if type(mask) is Tensor and mask.is_floating_point():
        mask = mask.to(dtype).detach().requires_grad_()
        leaves.append(mask)
    out = function(*leaves[:3], attn_mask=mask, **options, **more)
    weight = torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape)
    return out, torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)


def flat(call: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    return [call[0], *call[1]]


@pytest.mark.filterwarnings("ignore:Lower right causal bias will")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MASKS)
def test_sdpa(kind, layout):
    lead, lead_kv, more = LAYOUTS[layout]
    calls, in_other_words = 0, 0
    for case in combinations(SDPA):
        lengths, scale, dtype = case["lengths"], case["scale"], case["dtype"]
        tensors = sdpa_inputs(lead, lead_kv, lengths, case["features"], case["strided"])
        mask, options = sdpa_mask(kind, lead, lengths)
        options |= {"scale": scale, **more}
        ours = sdpa_both(scaled_dot_product_attention, tensors, mask, dtype, options, alpha=1.0)
        if kind in CAUSAL and scale == 0:  # PyTorch's fused kernel gives NaN: 0 times infinity
            in_other_words += 1
            shift = lengths[1] - lengths[0] if kind == "lower right" else 0
            mask = torch.ones(lengths, dtype=torch.bool).tril(shift)
            options.pop("is_causal", None)
        arguments = (F.scaled_dot_product_attention, tensors, mask)
        eager = sdpa_both(*arguments, dtype, options)
        try:
            if dtype == torch.bfloat16:
                exact = sdpa_both(*arguments, torch.float64, options)
                for a, b, c in zip(flat(ours), flat(eager), flat(exact), strict=True):
                    assert_no_worse(a, eager=b, exact=c)
            else:
                assert_close(ours[0], eager[0])
                for a, b in zip(ours[1], eager[1], strict=True):
                    assert_close(a, b, "gradient")
        except AssertionError as error:
            raise AssertionError(f"{kind}, {layout}, {case}") from error
        calls += 1
    assert calls * len(MASKS) * len(LAYOUTS) == 19008
    assert in_other_words == (72 if kind in CAUSAL else 0)


# --- MultiheadAttention --------------------------------------------------------------------------

B, H, E, N_Q, N_K = 2, 2, 8, 4, 5
# what is asked: keywords of the constructor and the lengths of queries and keys
INPUTS = {
    "self": ({}, N_K, N_K),
    "cross": ({}, N_Q, N_K),
    "kdim and vdim": ({"kdim": 6, "vdim": 3}, N_Q, N_K),
}
WEIGHTS = {
    "none": {"need_weights": False},
    "mean": {},
    "heads": {"average_attn_weights": False},
}
CONSTRUCTOR = dict.fromkeys(("bias", "add_bias_kv", "add_zero_attn"), (False, True))
MODULE = {
    "batch_first": (False, True),
    "batched": (True, False),
    "weights": tuple(WEIGHTS),
    "padding": (None, "boolean", "float"),
    "attn_mask": (
        None,
        "boolean",
        "float",
        "boolean heads",
        "float heads",
        "causal boolean",
        "causal float",
        "causal boolean, hint",
        "causal float, hint",
    ),
}


def module_mask(kind: str | None, batched: bool, n_q: int, n_k: int) -> dict[str, Any]:
    if kind is None:
        return {}
    if kind.startswith("causal"):
        mask = torch.ones(n_q, n_k, dtype=torch.bool).triu(1)
        if "float" in kind:
            mask = torch.zeros(n_q, n_k, dtype=torch.float64).masked_fill(mask, -torch.inf)
        return {"attn_mask": mask, "is_causal": "hint" in kind}
    size = ((B * H if batched else H), n_q, n_k) if "heads" in kind else (n_q, n_k)
    mask = torch.randn(size, dtype=torch.float64)
    if "boolean" in kind:
        mask = mask > 1
        mask[..., 0] = False
    return {"attn_mask": mask}


def padding_mask(kind: str | None, batched: bool, n_k: int) -> dict[str, Any]:
    if kind is None:
        return {}
    mask = torch.arange(n_k) >= torch.tensor([[3], [n_k]])
    if kind == "float":
        mask = torch.randn(B, n_k, dtype=torch.float64)
    return {"key_padding_mask": mask if batched else mask[0]}


def module_both(module, inputs, call, train: bool) -> list[Tensor | None]:
    """Output, weights and, in training, every gradient."""
    if not train:
        with torch.no_grad():
            return list(module(*inputs, **call))
    out, weights = module(*inputs, **call)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(-1, 1, weights.numel()).view(weights.shape)).sum()
    leaves = list(dict.fromkeys((*inputs, *module.parameters())))
    return [out, weights, *torch.autograd.grad(loss, leaves, allow_unused=True)]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("constructor", list(combinations(CONSTRUCTOR)), ids=str)
def test_multihead_attention(constructor, kind, train):
    sizes, n_q, n_k = INPUTS[kind]
    free = constructor["add_bias_kv"] or constructor["add_zero_attn"]
    calls, hidden = 0, 0
    for case in combinations(MODULE):
        batched, batch_first = case["batched"], case["batch_first"]
        options = {**constructor, **sizes, "batch_first": batch_first, "dtype": torch.float64}
        exact = nn.MultiheadAttention(E, H, **options).train(train)
        for parameter in exact.parameters():  # biases start at 0
            nn.init.normal_(parameter, std=0.5)
        ours = MultiheadAttention(E, H, **options, alpha=1.0).train(train)
        ours.load_state_dict(exact.state_dict(), strict=True)
        lead = {(True, True): (B,), (True, False): ()}.get((batched, batch_first), ())
        tail = (B,) if batched and not batch_first else ()
        widths = (E, sizes.get("kdim", E), sizes.get("vdim", E))
        inputs = [
            torch.randn(*lead, n, *tail, width, dtype=torch.float64).requires_grad_(train)
            for n, width in zip((n_q, n_k, n_k), widths, strict=True)
        ]
        if kind == "self":
            inputs = inputs[:1] * 3
        call = module_mask(case["attn_mask"], batched, n_q, n_k)
        call |= padding_mask(case["padding"], batched, n_k) | WEIGHTS[case["weights"]]
        found = module_both(ours, inputs, call, train)
        asked = dict(call)
        if free and call.get("is_causal") and case["weights"] == "none" and not case["padding"]:
            # PyTorch hides the keys that it adds: the same mask without the hint shows them.
            hidden, asked["is_causal"] = hidden + 1, False
        wanted = module_both(exact, inputs, asked, train)
        try:
            for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
                if b is None:
                    assert a is None
                else:
                    assert_close(a, b, "forward" if i < 2 else "gradient")
        except AssertionError as error:
            raise AssertionError(f"{constructor}, {kind}, train={train}, {case}") from error
        calls += 1
    assert calls * 2 * len(INPUTS) * 2 ** len(CONSTRUCTOR) == 15552
    assert hidden == (8 if free else 0)

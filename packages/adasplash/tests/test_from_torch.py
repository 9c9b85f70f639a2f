"""``MultiheadAttention.from_torch`` computes what a forward pass of the original would use."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from adasplash import AlphaParameter, LazyAttention, MultiheadAttention
from shared_kernels.testing import assert_close


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, "in_proj_weight")


MADE = {
    "plain": lambda m: None,
    "weight norm": lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
    "weight norm by a hook": old_weight_norm,
    "spectral norm": lambda m: parametrizations.spectral_norm(m, "in_proj_weight"),
    "spectral norm by a hook": lambda m: nn.utils.spectral_norm(m, "in_proj_weight"),
    "own parametrization": lambda m: parametrize.register_parametrization(
        m, "in_proj_weight", Halved()
    ),
    "two parametrizations": lambda m: [
        parametrize.register_parametrization(m, name, Halved())
        for name in ("in_proj_weight", "in_proj_weight", "in_proj_bias")
    ],
    "pruned": lambda m: prune.l1_unstructured(m, "in_proj_weight", 0.5),
    "pruned twice": lambda m: [
        prune.random_unstructured(m, name, 0.5) for name in ("in_proj_weight", "in_proj_bias")
    ],
    "out_proj": lambda m: parametrizations.weight_norm(m.out_proj, "weight"),
}


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_what_makes_a_weight_goes_with_it(kind, learn_alpha):
    torch.manual_seed(0)
    exact = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64).eval()
    for parameter in exact.parameters():
        nn.init.normal_(parameter, std=0.5)
    MADE[kind](exact)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    exact(x, x, x)  # the hooks have run
    ours = MultiheadAttention.from_torch(exact, alpha=1.5, learn_alpha=learn_alpha).eval()
    assert isinstance(ours.alpha, AlphaParameter) == learn_alpha
    del ours.alpha
    ours.alpha = 1.0
    for need_weights in (True, False):
        found, wanted = (m(x, x, x, need_weights=need_weights)[0] for m in (ours, exact))
        assert_close(found, wanted)
    names = {name for name, _ in exact.named_parameters()}
    shared = dict(ours.named_parameters())
    assert set(shared) == names
    assert all(shared[name] is p for name, p in exact.named_parameters())
    with torch.no_grad():  # trained, both are what they were for each other
        for parameter in exact.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert_close(ours(x, x, x)[0], exact(x, x, x)[0])
    grads = []
    for module in (ours, exact):
        module.zero_grad()
        module(x, x, x)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in exact.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, "gradient")
    assert exact.state_dict().keys() == ours.state_dict().keys()


def test_hooks_go_with_it():
    exact, heard = nn.MultiheadAttention(16, 4), []
    exact.register_forward_pre_hook(lambda *_: heard.append("before"))
    after = exact.register_forward_hook(lambda m, i, out: (out[0] * 2, out[1]))
    exact.register_full_backward_hook(lambda *_: heard.append("backward"))
    exact.register_forward_hook(
        lambda m, args, kwargs, out: heard.append(sorted(kwargs)), with_kwargs=True
    )
    ours = MultiheadAttention.from_torch(exact, alpha=1.0)
    x = torch.randn(5, 2, 16)
    doubled = ours(x, x, x, need_weights=False)[0]
    doubled.sum().backward()
    assert heard == ["before", ["need_weights"], "backward"]
    assert_close(doubled, exact(x, x, x)[0])
    after.remove()
    assert_close(ours(x, x, x)[0] * 2, doubled)


def test_a_forward_pass_of_its_own_is_refused():
    class Other(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(TypeError, match="`module` must have the forward pass of nn.Multi"):
        MultiheadAttention.from_torch(Other(16, 4))
    patched = nn.MultiheadAttention(16, 4)
    patched.forward = lambda *args: args
    with pytest.raises(TypeError, match="`module` must have the forward pass"):
        MultiheadAttention.from_torch(patched)
    again = MultiheadAttention.from_torch(MultiheadAttention(16, 4, learn_alpha=True), alpha=1.2)
    assert again.alpha == 1.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device_are_those_that_were_asked_for(dtype):
    torch.set_default_dtype(torch.float64)
    try:
        module = MultiheadAttention(16, 4, dtype=dtype, learn_alpha=True)
        assert {p.dtype for p in module.parameters()} == {dtype}
        exact = nn.MultiheadAttention(16, 4, dtype=dtype)
        ours = MultiheadAttention.from_torch(exact, learn_alpha=True)
        assert {p.dtype for p in ours.parameters()} == {dtype}
    finally:
        torch.set_default_dtype(torch.float32)
    meta = MultiheadAttention(16, 4, device="meta", learn_alpha=True)
    assert all(p.is_meta for p in meta.parameters())
    assert AlphaParameter(3, device="meta").raw.is_meta


RESET = {
    "AlphaParameter": lambda: AlphaParameter(3, init=1.3),
    "AlphaParameter, one": lambda: AlphaParameter(init=1.7, low=1.2),
    "LazyAttention": lambda: LazyAttention(16, 2, 5),
    "MultiheadAttention": lambda: MultiheadAttention(16, 4, learn_alpha=True, add_bias_kv=True),
    "MultiheadAttention, sizes": lambda: MultiheadAttention(16, 4, kdim=6, vdim=7),
}


@pytest.mark.parametrize("name", RESET)
def test_every_parameter_can_be_reset(name):
    """Meta device, then memory of whatever, then reset: as deferred initialisation does it."""
    with torch.device("meta"):
        module = RESET[name]()
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, torch.nan)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    fresh = RESET[name]()
    for (key, a), b in zip(module.named_parameters(), fresh.parameters(), strict=True):
        if key.endswith(("raw", "tau", "attention_biases")):
            assert torch.equal(a, b), key


def test_a_checkpoint_with_a_scalar_alpha_still_loads():
    module = AlphaParameter()
    assert module.raw.shape == (1,) and module().shape == ()
    for state in ({"raw": torch.tensor(0.5)}, {"raw": torch.tensor([0.5])}):
        module.load_state_dict(state)
        assert module.raw.shape == (1,) and float(module.raw.detach()) == 0.5
    outer = nn.ModuleDict({"alpha": module})
    outer.load_state_dict({"alpha.raw": torch.tensor(0.25)})
    assert float(module.raw.detach()) == 0.25
    with pytest.raises(RuntimeError, match="size mismatch"):
        AlphaParameter(2).load_state_dict({"raw": torch.tensor(0.5)})


def test_numbers_of_numpy_build_and_call_what_numbers_do():
    import numpy as np

    from adasplash import (
        EntmaxAttention,
        adasplash,
        lazy_attention_triton,
        scaled_dot_product_attention,
        triton_entmax,
    )

    module = MultiheadAttention(
        np.int8(64),
        np.int32(4),
        np.float32(0.0),
        np.bool_(True),
        batch_first=np.bool_(True),
        alpha=np.float64(1.5),
    )
    x = torch.randn(2, 5, 64)
    module(x, x, x, need_weights=np.bool_(False), is_causal=np.bool_(True))
    x = x[..., :16]
    EntmaxAttention(
        np.int64(16), np.int64(4), causal=np.bool_(True), alpha=np.float32(1.5), window=np.int64(3)
    )(x)
    LazyAttention(np.int64(16), np.int64(4), np.int64(3), np.float64(100))(x)
    AlphaParameter(np.int64(3), np.float32(1.5), np.float64(1.1), np.float64(1.9))()
    q = torch.randn(1, 2, 5, 8)
    adasplash(
        q,
        q,
        q,
        np.float32(1.5),
        np.bool_(True),
        None,
        np.int64(10),
        scale=np.float32(0.3),
        window=np.int64(2),
    )
    lazy_attention_triton(q, q, q, torch.zeros(2, 4), torch.zeros(2), np.int64(3))
    scaled_dot_product_attention(q, q, q, dropout_p=np.float32(0.5), is_causal=np.bool_(True))
    triton_entmax(q, np.float64(1.5), np.int64(3), np.bool_(True), dim=np.int64(-1))

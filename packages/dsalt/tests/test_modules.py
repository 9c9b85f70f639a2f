"""The layers: causality, prefixes, caches, packing, masks; every option."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsalt.modules import (
    DSALTAttention,
    DSALTBlock,
    DSALTTransformer,
    HybridEnergyScorer,
    SwiGLU,
    WindowSizePredictor,
    window_regulariser,
)
from shared_kernels.testing import assert_close
from shared_kernels.testing.tolerances import tolerance

from .cases import SIZES

BOUND = tolerance(torch.float32) / 2


def perturbed(module: nn.Module, size: float = 0.2) -> nn.Module:
    """The module with every parameter moved, so that nothing holds by initialisation alone."""
    for p in module.parameters():
        p.data += size * torch.randn_like(p)
    return module


def stack(**options) -> DSALTTransformer:
    return perturbed(DSALTTransformer(**{**SIZES, **options}))


VARIANTS = {
    "plain": {},
    "grouped": {"n_kv_heads": 2, "bias": True},
    "sinks": {"n_sink": 2, "window_ramp": 2.0},
    "block-32": {"landmark_block": 32, "rope_base": None},
    "normalizer": {"normalizer": torch.softmax},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@variants
@pytest.mark.parametrize("training", [True, False])
def test_a_token_changes_nothing_before_it(options, training):
    model = stack(**options).train(training)
    x = torch.randn(2, 70, 32)
    before = model(x)
    for t in (1, 8, 33, 69):
        other = x.clone()
        other[:, t:] = 3 * torch.randn(2, 70 - t, 32)
        after = model(other)
        assert (after[:, :t] - before[:, :t]).abs().max() <= BOUND
        assert (after[:, t:] - before[:, t:]).abs().max() > 0.1


@variants
@pytest.mark.parametrize("training", [True, False])
def test_prefixes_agree(options, training):
    model = stack(**options).train(training)
    x = torch.randn(2, 70, 32)
    whole = model(x)
    for t in (1, 7, 8, 9, 40, 64):
        assert (model(x[:, :t]) - whole[:, :t]).abs().max() <= BOUND


def test_the_gradient_of_a_token_stops_there():
    model = stack()
    x = torch.randn(1, 50, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x)[0, 20].sum(), x)
    assert bool((grad[0, 21:] == 0).all()) and bool((grad[0, 20] != 0).all())


def test_global_landmarks_do_look_ahead():
    """The mode that the documentation calls not causal, so that the tests above can fail."""
    model = stack(landmark_mode="global", k_lmk=8).eval()
    x = torch.randn(1, 70, 32)
    other = x.clone()
    other[:, 60:] *= 30
    assert (model(other)[:, :60] - model(x)[:, :60]).abs().max() > 1e-3


@variants
def test_cache_is_the_full_forward(options):
    if "normalizer" in options:
        options = {"normalizer": lambda s, dim: torch.softmax(s, dim)}
    model = stack(**options).eval()
    x = torch.randn(2, 60, 32)
    whole, past, parts = model(x), None, []
    for a, b in [(0, 13), (13, 14), (14, 31), (31, 32), *((t, t + 1) for t in range(32, 60))]:
        step = model(x[:, a:b], past_key_values=past, use_cache=True)
        parts.append(step.hidden)
        past = step.past_key_values
    assert (torch.cat(parts, 1) - whole).abs().max() <= BOUND
    assert past[0].length == 60 and past[0].landmark_idx.shape == (2, 4, 4)
    tail = model(x[:, :5], past_key_values=past)  # reading a cache without keeping one
    assert isinstance(tail, torch.Tensor) and past[0].length == 60


@variants
def test_packed_sequences_are_separate(options):
    model = stack(**options)
    x = torch.randn(1, 60, 32)
    packed = model(x, cu_seqlens=torch.tensor([0, 9, 9, 33, 60], dtype=torch.int32))
    for a, b in ((0, 9), (9, 33), (33, 60)):
        assert (packed[:, a:b] - model(x[:, a:b])).abs().max() <= BOUND


@pytest.mark.parametrize("mode", ["block_causal", "global"])
def test_padding_is_as_if_it_were_not_there(mode):
    model = stack(landmark_mode=mode)
    x = torch.randn(3, 40, 32)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[0, 30:] = 0  # right
    mask[1, :11] = 0  # left
    mask[2, 10:20] = 0  # a hole
    out = model(x, attention_mask=mask, return_windows=True)
    for b in range(3):
        tokens = mask[b] != 0
        alone = model(x[b : b + 1, tokens], return_windows=True)
        assert (out.hidden[b, tokens] - alone.hidden[0]).abs().max() <= BOUND
        assert_close(out.windows[1][b, :, tokens], alone.windows[1][0])
    attended, _ = model.blocks[0].attention(x, attention_mask=mask.bool())
    assert bool((attended[mask == 0] == 0).all())


def test_every_parameter_has_a_gradient_and_windows_move():
    model = DSALTTransformer(**SIZES)
    x = torch.randn(2, 50, 32)
    before = [b.attention.window.proj.weight.detach().clone() for b in model.blocks]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()  # the task's loss alone, no regulariser
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name
    optimizer.step()
    for block, weight in zip(model.blocks, before, strict=True):
        assert not torch.equal(block.attention.window.proj.weight, weight)


def test_short_input_leaves_no_parameter_unused():
    """Data-parallel training needs a gradient, if zero, for every parameter."""
    model = DSALTTransformer(**SIZES)
    model(torch.randn(1, 5, 32)).sum().backward()  # no landmark yet
    assert all(p.grad is not None for p in model.parameters())
    model = DSALTTransformer(**{**SIZES, "k_lmk": 0})
    model(torch.randn(1, 50, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_checkpointing_changes_nothing():
    x = torch.randn(2, 50, 32)
    model = stack(dropout=0.2).train()
    grads = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        torch.manual_seed(1)
        out = model(x, return_windows=True)
        (out.hidden.square().sum() + window_regulariser(out.windows, 3, 14)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, "gradient")


def test_attention_signature():
    torch.manual_seed(0)
    layer = perturbed(DSALTAttention(32, 4, 3, 14, 4, 0.0, True, landmark_block=8))
    x = torch.randn(2, 30, 32, requires_grad=True)
    out, none = layer(x)
    assert out.shape == x.shape and none is None
    out, windows = layer(x, x_prev=None, return_window=True)
    assert windows.shape == (2, 4, 30) and windows.requires_grad
    assert bool((windows >= 3).all()) and bool((windows <= 14).all())
    same, _ = layer(x, x_prev=x)
    assert_close(same, out)
    other, moved = layer(x, x_prev=torch.randn(2, 30, 32), return_window=True)
    assert not torch.allclose(moved, windows) and not torch.allclose(other, out)
    dropped, _ = perturbed(DSALTAttention(32, 4, 3, 14, 4, dropout=0.5))(x)
    assert 0.3 < float((dropped == 0).float().mean()) < 0.7


def test_rotary_positions_are_relative():
    layer = perturbed(DSALTAttention(16, 2, 40, 40, 0, rope_base=100.0))
    x = torch.randn(1, 1, 16).expand(1, 30, 16)
    out, _ = layer(x)  # equal tokens: only distances differ, and values are equal
    assert_close(out, out[:, :1].expand_as(out))
    plain = perturbed(DSALTAttention(16, 2, 40, 40, 0, rope_base=None))
    y = torch.randn(1, 30, 16)
    assert_close(plain(y)[0][:, -1], plain(y[:, torch.tensor([*range(28, -1, -1), 29])])[0][:, -1])


def test_predictor_formula():
    predictor = perturbed(WindowSizePredictor(8, 3, 4, 10))
    x = torch.randn(2, 20, 8)
    sigma = torch.sigmoid(x @ predictor.proj.weight.T + predictor.proj.bias)
    for i in (0, 3, 4, 7, 10, 19):
        exact = 4 + sigma[:, i] * (min(10, max(i, 4)) - 4)
        assert_close(predictor(x)[:, :, i], exact)
    assert_close(predictor(x[:, 5:6], torch.tensor([5])), predictor(x)[:, :, 5:6])
    fresh = WindowSizePredictor(8, 3, 4, 10)
    assert 0 < fresh.proj.weight.detach().std() < 0.1
    assert fresh(x.bfloat16().float()).dtype == torch.float32


def test_regulariser():
    windows = torch.tensor([[[4.0, 7.0, 10.0]]])
    u = torch.tensor([0.0, 0.5, 1.0])
    assert_close(window_regulariser(windows, 4, 10, "length"), u.mean())
    entropy = window_regulariser(windows, 4, 10, "entropy")
    assert abs(float(entropy) - math.log(2) / 3) < 10 * BOUND
    assert_close(window_regulariser([windows, windows], 4, 10), entropy)
    assert float(window_regulariser(windows, 4, 4)) == 0
    with pytest.raises(ValueError, match="`kind` must be one of 'entropy', 'length'"):
        window_regulariser(windows, 4, 10, "variance")


def test_block_formula_and_replaced_attention():
    block = perturbed(DSALTBlock(32, 4, 3, 14, 4))
    x = torch.randn(2, 30, 32)
    attended, _ = block.attention(block.attention_norm(x))
    h = x + attended
    out, window, cache = block(x)
    assert_close(out, h + block.mlp(block.mlp_norm(h)))
    assert window is None and cache is None
    mlp = SwiGLU(32)
    assert mlp.gate.out_features == 256 and SwiGLU(768).gate.out_features == 2048
    y = torch.nn.functional.silu(mlp.gate(x)) * mlp.up(x)
    assert_close(mlp(x), mlp.down(y))

    class Mine(nn.Module):
        def forward(self, x, **options):
            assert not options
            return torch.zeros_like(x)

    model = stack()
    model.blocks[1].attention = Mine()
    assert model(x).shape == x.shape
    block.attention = Mine()
    assert_close(block(x)[0], x + block.mlp(block.mlp_norm(x)))


def test_scorer_modes():
    x, values = torch.randn(2, 20, 8), torch.randn(2, 2, 20, 4)
    windows = torch.full((2, 4, 20), 6.0)
    scorer = HybridEnergyScorer(4, 3, landmark_mode="global")
    found = scorer(x, values, windows)
    assert found.idx.shape == (2, 4, 3) and int(found.idx.max()) < 14
    assert_close(found.bias, nn.functional.logsigmoid(found.scores.gather(-1, found.idx.long())))
    causal = HybridEnergyScorer(4, 3, landmark_block=8)(x, values)
    assert causal.idx.shape == (2, 4, 3, 3) and bool((causal.idx[:, :, 0] == -1).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 30}, "`d_model` must be divisible by n_heads"),
        ({"n_kv_heads": 3}, "`n_heads` must be divisible by n_kv_heads"),
        ({"n_min": 20}, "must satisfy 0 <= n_min <= n_max"),
        ({"n_max": math.inf}, "must satisfy 0 <= n_min <= n_max"),
        ({"window_ramp": 0}, "`window_ramp` must be a finite number > 0"),
        ({"landmark_mode": "future"}, "`landmark_mode` must be one of"),
        ({"landmark_block": 0}, "`landmark_block` must be at least 1"),
        ({"k_lmk": -1}, "`k` must be >= 0, got -1"),
        ({"d_model": 1028}, r"`d_model` must be at most 256 \* n_heads"),
        ({"rope_base": 0.0}, "`rope_base` must be > 0, or None, got 0.0"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        DSALTTransformer(**{**SIZES, **options})


def test_bad_calls():
    model = stack().eval()
    x = torch.randn(1, 20, 32)
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`attention_mask` must have shape"):
        model(x, attention_mask=torch.ones(1, 19))
    with pytest.raises(TypeError, match="`past_key_value` must be an AttentionCache, got tuple"):
        model.blocks[0].attention(x, past_key_value=(x, x))
    with pytest.raises(ValueError, match="must hold a tensor and n_min <= n_max"):
        window_regulariser([], 3, 14)
    with pytest.raises(ValueError, match="`past_key_values` must hold 2 caches"):
        model(x, past_key_values=cache[:1])
    with pytest.raises(ValueError, match="`cu_seqlens` must .* end at N=20"):
        model(x, cu_seqlens=torch.tensor([0, 19]))
    with pytest.raises(ValueError, match="`x_prev` must have shape x's"):
        model.blocks[0].attention(x, x_prev=x[:, :3])
    with pytest.raises(TypeError, match="`x_prev` must be a torch.Tensor, got list"):
        model.blocks[0].attention(x, x_prev=[1.0])
    with pytest.raises(ValueError, match="`n_layers` must be at least 1, got 0"):
        DSALTTransformer(32, 4, 0, n_min=3, n_max=12, k_lmk=4)


LAYERS = {
    "attention": lambda: DSALTAttention(32, 4, 3, 14, 4),
    "block": lambda: DSALTBlock(32, 4, 3, 14, 4),
    "transformer": lambda: DSALTTransformer(**SIZES),
    "windows": lambda: WindowSizePredictor(32, 4, 3, 14),
    "feed-forward": lambda: SwiGLU(32),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_hidden_states_that_do_not_fit_the_weights(layer):
    layer, x = layer(), torch.randn(1, 20, 32)
    for wrong in (x[..., :31], torch.randn(1, 20, 33)):
        width = rf"d_model=32\), got \(1, 20, {wrong.shape[-1]}\)"
        with pytest.raises(ValueError, match=width):
            layer(wrong)
    for weights, given in (("float16", "float32"), ("float32", "float64"), ("float64", "bfloat16")):
        layer.to(getattr(torch, weights))
        with pytest.raises(TypeError, match=f"weights, torch.{weights}, got torch.{given}"):
            layer(x.to(getattr(torch, given)))
    layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # casts by itself
        layer(x)


class Packed(torch.nn.Module):
    """A linear layer as torch's quantised ones are: ``weight()`` and ``bias()``."""

    def __init__(self, linear):
        super().__init__()
        self.packed = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def weight(self):
        return self.packed.weight

    def bias(self):
        return self.packed.bias

    def forward(self, x):
        return self.packed(x)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_whose_weight_is_a_method(bias):
    layer, x = DSALTAttention(32, 4, 3, 14, 4), torch.randn(1, 20, 32)
    if bias:
        layer.v_proj = torch.nn.Linear(32, layer.v_proj.out_features)
    exact = layer(x)[0]
    for name, linear in list(layer.named_modules()):
        if type(linear) is torch.nn.Linear:
            layer.set_submodule(name, Packed(linear))
    assert torch.equal(layer(x)[0], exact)


def test_a_second_source_of_another_dtype():
    layer, x = DSALTAttention(32, 4, 3, 14, 4), torch.randn(1, 20, 32)
    with pytest.raises(TypeError, match="`x_prev` must have the dtype of the layer's weights"):
        layer(x, x_prev=x.double())


def test_half_precision_layers():
    model = stack().bfloat16()
    x = torch.randn(1, 40, 32)
    out = model(x.bfloat16())
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())
    single = stack()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = single(x)
        layer = next(m for m in single.modules() if isinstance(m, DSALTAttention))
        weights, _ = layer.weights(x)
    assert (mixed.float() - single(x)).abs().mean() < 0.05
    assert (weights.float() - layer.weights(x)[0]).abs().mean() < tolerance(
        torch.bfloat16, "rounding"
    )

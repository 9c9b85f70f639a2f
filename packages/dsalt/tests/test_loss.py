"""The loss in chunks of tokens is the loss of all logits, and never holds them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsalt import _loss, _ops
from dsalt._call import LinearCrossEntropy
from dsalt.model import DSALTLMHeadModel
from shared_kernels.testing import assert_close, measure_memory


def reference(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).double(), labels, ignore_index=-100)


def inputs(T=50, d=8, V=37, dtype=torch.float32, gain=1.0):
    hidden = (gain * torch.randn(T, d)).to(dtype).requires_grad_()
    head = nn.Linear(d, V, bias=False).to(dtype)
    labels = torch.randint(0, V, (T,))
    labels[::7] = -100
    return hidden, head, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [1.0, 100.0])
def test_value_and_gradients(monkeypatch, dtype, gain):
    monkeypatch.setattr(_loss, "CHUNK", 1)  # chunks of 64 tokens
    hidden, head, labels = inputs(T=150, dtype=dtype, gain=gain)
    ours = _loss.linear_cross_entropy(hidden, head, labels, 37)
    exact = reference(hidden.double(), head.weight.double(), labels)
    assert_close(ours.to(dtype), exact.to(dtype))
    wanted = torch.autograd.grad(exact, (hidden, head.weight))
    for a, b in zip(torch.autograd.grad(ours, (hidden, head.weight)), wanted, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, "gradient")


def test_gradcheck():
    hidden, head, labels = inputs(T=9, dtype=torch.float64)

    def summed(hidden, weight):
        return _ops.linear_cross_entropy(LinearCrossEntropy(hidden, weight, labels, 4, True, True))

    assert torch.autograd.gradcheck(summed, (hidden, head.weight))


@pytest.mark.parametrize("which", ["hidden", "weight", "none"])
def test_only_what_is_asked_for(which):
    hidden, head, labels = inputs()
    hidden.requires_grad_(which == "hidden")
    head.weight.requires_grad_(which == "weight")
    loss = _loss.linear_cross_entropy(hidden, head, labels, 37)
    assert_close(loss, reference(hidden.double(), head.weight.double(), labels).float())
    assert loss.requires_grad == (which != "none")
    if which != "none":
        loss.backward()
        assert (hidden.grad is None) == (which == "weight")


def test_nothing_to_score_is_zero():
    for T in (0, 5):
        hidden, head, labels = inputs(T=T)
        loss = _loss.linear_cross_entropy(hidden, head, torch.full_like(labels, -100), 37)
        loss.backward()
        assert float(loss.detach()) == 0 and not hidden.grad.any() and not head.weight.grad.any()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["subclass", "hook", "bias", "parametrized"])
def test_a_head_that_is_more_than_a_matrix_is_called(kind):
    torch.manual_seed(0)
    model = DSALTLMHeadModel(37, 8, 1, 2, n_min=2, n_max=4, k_lmk=2, dropout=0.0)
    if kind == "subclass":
        model.lm_head = Doubled(8, 37, bias=False)
    elif kind == "hook":
        model.lm_head.register_forward_hook(lambda module, given, out: 2 * out)
    elif kind == "bias":
        model.lm_head = nn.Linear(8, 37)
    else:
        nn.utils.parametrizations.weight_norm(model.lm_head)
    ids, labels = torch.randint(0, 37, (2, 2, 20))
    grads = []
    for return_logits in (True, False):
        model.zero_grad()
        loss = model(ids, labels=labels, return_logits=return_logits).loss
        loss.backward()
        grads.append((loss, *[p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, "gradient")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_return_logits_changes_no_loss(tied, shift, masked):
    model = DSALTLMHeadModel(
        37, 8, 1, 2, n_min=2, n_max=4, k_lmk=2, dropout=0.0, tie_embeddings=tied
    )
    ids, labels = torch.randint(0, 37, (2, 2, 20))
    labels = ids if shift else labels
    mask = torch.ones(2, 20)
    mask[0, :5] = 0
    options = {"shift_labels": shift, "attention_mask": mask if masked else None}
    found = []
    for return_logits in (True, False):
        model.zero_grad()
        out = model(ids, labels=labels, return_logits=return_logits, **options)
        out.loss.backward()
        found.append(
            (out.loss, *[p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    assert out.logits is None and out.window_reg is not None
    for a, b in zip(*found, strict=True):
        assert_close(a, b, "gradient")
    with pytest.raises(ValueError, match="labels"):
        model(ids, return_logits=False)


def test_under_autocast():
    model = DSALTLMHeadModel(37, 8, 1, 2, n_min=2, n_max=4, k_lmk=2, dropout=0.0)
    ids, labels = torch.randint(0, 37, (2, 2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(ids, labels=labels, return_logits=False).loss
        exact = model(ids, labels=labels).loss
    assert ours.dtype == torch.float32
    assert_close(ours.bfloat16(), exact.bfloat16())
    ours.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_a_loss_of_your_own_gets_hidden_weight_and_labels():
    seen = []

    def loss(hidden, weight, labels):
        seen.append((hidden.shape, weight.shape, labels))
        return F.cross_entropy(hidden @ weight.T, labels) + 1

    model = DSALTLMHeadModel(37, 8, 1, 2, n_min=2, n_max=4, k_lmk=2, dropout=0.0, loss=loss)
    ids = torch.randint(0, 37, (2, 20))
    ours = model(ids, labels=ids, shift_labels=True, return_logits=False).loss
    model.loss = None
    assert_close(ours, model(ids, labels=ids, shift_labels=True).loss + 1)
    ((hidden, weight, labels),) = seen
    assert hidden == (40, 8) and weight == (37, 8)
    assert torch.equal(labels.view(2, 20)[:, :-1], ids[:, 1:])
    assert bool((labels.view(2, 20)[:, -1] == -100).all())
    with pytest.raises(TypeError, match="loss"):
        DSALTLMHeadModel(37, 8, 1, 2, loss="mean")


def test_memory_of_a_large_vocabulary():
    hidden, labels = torch.randn(1024, 16, requires_grad=True), torch.randint(0, 30000, (1024,))
    head = nn.Linear(16, 30000, bias=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_loss, "CHUNK", 64 * 30000)
        ours = measure_memory(
            lambda: _loss.linear_cross_entropy(hidden, head, labels, 30000).backward()
        ).peak
    whole = measure_memory(lambda: F.cross_entropy(head(hidden), labels).backward()).peak
    assert ours < whole / 10

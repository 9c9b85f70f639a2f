"""Names, signatures and docstrings that a user may rely on."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsalt
from dsalt import _choice, _rotary, kernels, modules, published
from dsalt.modules import attention, scorer, transformer, windows
from shared_kernels.testing import assert_close

from . import typed


@pytest.mark.parametrize(
    "module",
    [kernels, _choice, scorer, attention, transformer, windows, published],
    ids=lambda module: module.__name__,
)
def test_examples_in_docstrings(module):
    torch.manual_seed(0)
    failed, tried = doctest.testmod(
        module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS
    )
    assert tried > 1 and not failed


def test_signatures():
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(kernels.dsalt_attention)[:5] == ["Q", "K", "V", "window_sizes", "landmark_idx"]
    energy = ["X", "WV", "window_sizes", "k", "alpha"]
    assert names(kernels.compute_hybrid_energy_scores) == energy
    layer = ["d_model", "n_heads", "n_min", "n_max", "k_lmk", "dropout", "gradient_checkpointing"]
    assert names(modules.DSALTAttention)[:7] == layer
    body = ["d_model", "n_heads", "n_layers", "n_min", "n_max", "k_lmk"]
    assert names(modules.DSALTTransformer)[:6] == body
    assert names(modules.WindowSizePredictor) == ["d_model", "n_heads", "n_min", "n_max"]
    assert kernels.HybridEnergyScorer is modules.HybridEnergyScorer


def test_every_public_name_is_documented_and_exported():
    for module in (kernels, modules, published):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name
    assert set(kernels.__all__) | set(modules.__all__) | set(published.__all__) <= set(
        dsalt.__all__
    )


@pytest.mark.thorough  # the tools' test_isolation.py holds every package to it
def test_import_is_light():
    code = (
        "import sys, dsalt\n"
        "unwanted = ('matplotlib', 'swanlab', 'tensorboard', 'dsalt._torch', 'dsalt._reference')\n"
        "heavy = [m for m in unwanted if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PUBLISHED = {
    "0.1.10": "DSALTAttention DSALTTransformer DSALTBlock RMSNorm SwiGLUFFN DSALTLMHeadModel "
    "dsalt_attention compute_hybrid_energy_scores select_landmarks compute_landmark_idx "
    "WindowSizePredictor DSALTTrainer get_cosine_schedule_with_warmup",
    "1.0.0": "LigerFusedLinearCrossEntropyFunction DSALTTrainer dsalt_triton_attention RMSENorm "
    "compute_window_sizes build_local_window_mask build_local_window_mask_packed apply_rotary_emb "
    "build_rope_cache hybrid_scores_per_head compute_hybrid_scores select_landmarks "
    "soft_landmark_weights HybridEnergyLandmarkSelector sparse_attention_forward "
    "sparse_attention_forward_packed DSALTAttention DSALTTransformerBlock SwiGLUFFN DSALTConfig "
    "DSALTLMHeadModel",
}


@pytest.mark.parametrize("version", PUBLISHED)
def test_the_page_tells_of_every_published_name(version):
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = page.split("## Differences from the published package")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    for name in PUBLISHED[version].split():
        here = hasattr(dsalt, name) if name != "DSALTConfig" else name in dsalt._LAZY
        if version == "0.1.10":
            assert here and f"`{name}`" in section, name
        else:
            (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
            assert here == ("the same name" in row or name == "DSALTConfig"), name


def test_published_calls():
    model = dsalt.DSALTLMHeadModel(
        vocab_size=20,
        d_model=32,
        n_layers=1,
        n_heads=2,
        n_min=2,
        n_max=8,
        k_lmk=2,
        alpha=0.6,
        d_ff=None,
        max_seq_len=64,
        dropout=0.0,
        use_fa2=False,
        tie_weights=True,
    )
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    x = torch.randn(3, 8)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(dsalt.RMSNorm(8)(x), exact)
    assert_close(dsalt.RMSENorm(8, eps=1e-6)(x), exact)
    ffn = dsalt.SwiGLUFFN(8, 16)
    w1, w2, w3 = ffn.up, ffn.gate, ffn.down
    assert_close(ffn(x), w3(w1(x) * torch.nn.functional.silu(w2(x))))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = dsalt.get_cosine_schedule_with_warmup(optimizer, 4, 12, min_lr_ratio=0.25)
    rates = []
    for _ in range(14):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0] and rates[12] == rates[13] == 0.5
    q, k = torch.randn(2, 1, 2, 9, 8)
    turned = dsalt.apply_rotary_emb(q, k, *dsalt.build_rope_cache(9, 8))
    assert_close(turned[1], _rotary.rotate(k, torch.arange(9), 10000.0))


def test_names_are_listed_and_lazy_ones_are_found():
    assert set(dsalt.__all__) <= set(dir(dsalt))
    assert dsalt.DSALTTrainer.__name__ in dir(dsalt)
    with pytest.raises(AttributeError, match="DSALTTrainr"):
        dsalt.DSALTTrainr  # noqa: B018


def test_the_typed_program_runs():
    assert typed.main()[1] == 9 * 16 + 2 * 12 + 2 * 9 * 8

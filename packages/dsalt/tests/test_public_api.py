"""Names, signatures and docstrings that a user may rely on."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys

import pytest
import torch

import dsalt
from dsalt import kernels, modules


@pytest.mark.parametrize("module", [kernels, modules], ids=["kernels", "modules"])
def test_examples_in_docstrings(module):
    torch.manual_seed(0)
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert tried > 3 and not failed


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
    for module in (kernels, modules):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name
    assert set(kernels.__all__) | set(modules.__all__) <= set(dsalt.__all__)


def test_import_is_light():
    code = (
        "import sys, dsalt\n"
        "unwanted = ('matplotlib', 'swanlab', 'tensorboard', 'dsalt._cpu', 'dsalt._reference')\n"
        "heavy = [m for m in unwanted if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

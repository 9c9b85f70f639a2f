import doctest
from pathlib import Path

import numpy as np
import torch

import flashdiffusion
from shared_kernels.testing import contracts


class TestPackage(contracts.PackageContract):
    package = "flashdiffusion"
    root = Path(__file__).parents[1]


def test_public_modules():
    from flashdiffusion import cdc, dmap, eigensolver, kernel, utils

    assert kernel.FlashDiffusion is flashdiffusion.FlashDiffusion
    assert dmap.DiffusionMap is flashdiffusion.DiffusionMap
    assert cdc.carre_du_champ is flashdiffusion.carre_du_champ
    assert utils.nystrom_extension is flashdiffusion.nystrom_extension
    assert callable(eigensolver.block_krylov)


def test_examples_in_docstrings_run():
    found = 0
    for name in flashdiffusion.__all__:
        thing = getattr(flashdiffusion, name)
        if not callable(thing):
            continue
        names = {"np": np, "torch": torch, **vars(flashdiffusion)}
        for test in doctest.DocTestFinder(recurse=False).find(thing, name, globs=names):
            found += bool(test.examples)
            result = doctest.DocTestRunner(verbose=False).run(test)
            assert result.failed == 0, name
    assert found >= 7

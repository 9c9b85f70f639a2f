from pathlib import Path

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

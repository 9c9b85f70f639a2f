"""The page with every family of transformers' models says what happens."""

from __future__ import annotations

import pytest

from adasplash import register_transformers

from . import transformers_matrix as matrix

SAMPLE = (
    "bart",
    "bert",
    "blip_2",
    "blt",
    "canary",
    "deepseek_v4",
    "detr",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "informer",
    "inkling2",
    "llama4",
    "mistral",
    "modernbert",
    "muse_glimmer_assistant",
    "nllb_moe",
    "qwen2_vl",
    "sam2_video",
    "seamless_m4t_v2",
    "t5",
    "vit",
    "whisper",
    "zamba2",
)


@pytest.fixture(scope="module")
def _registered():
    pytest.importorskip("transformers", reason="needs the optional transformers")
    register_transformers(matrix.NAME, alpha=1.0)


def check(folder):
    cells, found = matrix.read()[folder], matrix.row(folder)
    expected = [found["model"], *(found.get(x, "") for x in matrix.COLUMNS)]
    assert cells[1:6] == expected, found
    reason = found["reason"].replace("|", "/").replace("`", "'")
    assert "".join(cells[6:]).split(":")[0] == reason.split(":")[0]


@pytest.mark.extras
def test_every_folder_has_a_row_and_no_row_a_difference(_registered):
    from transformers import __version__

    if f"transformers {__version__} " not in matrix.TABLE.read_text(encoding="utf-8"):
        pytest.skip(f"the page lists the folders of another transformers than {__version__}")
    table = matrix.read()
    assert sorted(table) == matrix.folders() and set(matrix.FAMILIES) <= set(table)
    passed = {folder for folder, cells in table.items() if cells[2] == "yes"}
    assert len(passed) > 340 and passed >= set(SAMPLE) - {"inkling2"}
    for folder, cells in table.items():
        assert set(cells[2:6]) <= (matrix.SOUND if folder in passed else {""}), folder
        has_reason = "".join(cells[6:]) != ""
        family = matrix.FAMILIES.get(folder, matrix.Family())
        assert has_reason == (folder not in passed or family.why != ""), folder


@pytest.mark.extras
@pytest.mark.parametrize("folder", SAMPLE)
def test_a_sample_of_families(_registered, folder):
    check(folder)


@pytest.mark.extras
@pytest.mark.slow
def test_every_family(_registered):
    for folder in matrix.folders():
        check(folder)

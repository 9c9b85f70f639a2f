"""mypy --strict and pyright accept the typed example program of each package and find wrong names.

The programs themselves are run by the tests of their packages.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .rules import PACKAGES

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {path.parts[-3]: path for path in ROOT.glob("packages/*/tests/typed*.py")}

# The first lines of a program, and wrong lines, each with a word of the error that it must get.
WRONG = {
    "adasplash": (
        "from adasplash import EntmaxAttention, LazyAttention, adasplash, attention_stats\n"
        "from adasplash import check_transformers\n"
        "from torch import ones\n"
        "q = ones(1, 1, 2, 8)\n",
        {
            "from adasplash import adasplsh": "adasplsh",
            "adasplash(q, q, q, alfa=1.5)": "alfa",
            "adasplash(q, q, q, niter='many')": "niter",
            "x: str = adasplash(q, q, q)": "Incompatible types",
            "EntmaxAttention(16, 2, casual=True)": "casual",
            "x: str = EntmaxAttention(16, 2)(q)": "Incompatible types",
            "x: str = LazyAttention(16, 2)(q, use_cache=True)": "Incompatible types",
            "x: str = attention_stats(q, q).tile": "Incompatible types",
            "x: str = check_transformers(EntmaxAttention(16, 2)).called": "Incompatible types",
        },
    ),
    "difflayers": (
        "from difflayers import DiffusedHopfield, Hopfield, HopfieldLayer, HopfieldPooling\n",
        {
            "HopfieldPooling(8, quantitty=2)": "quantitty",
            "HopfieldLayer(8, num_head=2)": "num_head",
            "DiffusedHopfield(8, seperation='softmax')": "seperation",
            "hidden: str = Hopfield(8).hidden_size": "Incompatible types",
            "x: str = HopfieldPooling(8).batch_first": "Incompatible types",
            "x: str = DiffusedHopfield(8).config.eta": "Incompatible types",
            "from difflayers import Hopfeld": "Hopfeld",
        },
    ),
    "diffmax": (
        "from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect, diffmax_loss\n"
        "from diffmax import sparsity_stats\n"
        "from torch import ones\n"
        "x = ones(1, 8)\n",
        {
            "from diffmax import difmax_bisect": "difmax_bisect",
            "diffmax_bisect(x, alfa=0.5)": "alfa",
            "diffmax_bisect(x, alpha='half')": "alpha",
            "y: str = diffmax_bisect(x)": "Incompatible types",
            "y: str = diffmax_loss(x, x)": "Incompatible types",
            "y: str = sparsity_stats(x)['sparsity']": "Incompatible types",
            "DiffmaxBisectModule(0.5, alpha_map=HillMap)": "alpha_map",
            "y: str = DiffmaxBisectModule(0.5)(x)": "Incompatible types",
        },
    ),
    "dsalt": (
        "from dsalt import DSALTAttention, DSALTLMHeadModel\nfrom torch import zeros\n",
        {
            "from dsalt import DSALTTrainr": "DSALTTrainr",
            "n: int = DSALTLMHeadModel(30, 16, 1, 2)(zeros(1, 3), return_dict=False)": "type",
            "a, b, c = DSALTAttention(8, 2, 2, 4, 2)(zeros(1, 3, 8))": "unpack",
        },
    ),
    "flashdiffusion": (
        "from flashdiffusion import stationary_distribution\nfrom torch import ones\n",
        {
            "from flashdiffusion import DifusionMap": "DifusionMap",
            "x: str = stationary_distribution(ones(3, 3))": "Incompatible types",
        },
    ),
}


def mypy(folder: Path, files: list[Path]) -> str:
    """What mypy --strict says of the files, as if a user had written them."""
    api = pytest.importorskip("mypy.api", reason="needs mypy")
    options = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={folder}"]
    output, errors, _ = api.run([*options, *map(str, files)])
    assert not errors, errors
    return output


@pytest.mark.thorough  # reading torch alone takes 45 s; pyright reads the same programs every time
def test_mypy_accepts_the_program_of_each_package_and_finds_wrong_lines(tmp_path):
    assert set(PROGRAMS) == set(WRONG) == set(PACKAGES)
    accepted, refused = [], []
    for package, (head, lines) in WRONG.items():
        accepted.append(tmp_path / f"{package}_program.py")
        shutil.copy(PROGRAMS[package], accepted[-1])
        refused.append(tmp_path / f"{package}_wrong.py")
        body = "".join(f"def f{i}() -> None:\n    {line}\n" for i, line in enumerate(lines))
        refused[-1].write_text(head + body, encoding="utf-8")
    assert mypy(tmp_path, accepted).startswith("Success")
    errors = [line for line in mypy(tmp_path, refused).splitlines() if ": error:" in line]
    for package, (head, lines) in WRONG.items():
        for i, (line, word) in enumerate(lines.items()):
            place = f"{package}_wrong.py:{head.count(chr(10)) + 2 * i + 2}:"
            assert any(place in error and word in error for error in errors), (line, errors)


def pyright(project: Path) -> dict:
    """What pyright says of a project that has the configuration of this repository."""
    pytest.importorskip("basedpyright", reason="needs basedpyright")
    run = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*run, "--project", str(project)], capture_output=True, text=True, check=False, cwd=project
    )
    return json.loads(done.stdout)


def test_pyright_accepts_the_program_of_each_package():
    output = pyright(ROOT)
    assert output["summary"]["filesAnalyzed"] == len(PACKAGES)
    assert output["generalDiagnostics"] == []


def test_pyright_finds_a_wrong_name_of_each_package(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in (ROOT / "shared-kernels", *(ROOT / "packages" / name for name in PACKAGES)):
        place = tmp_path / folder.relative_to(ROOT)
        place.mkdir(parents=True)
        (place / "src").symlink_to(folder / "src")
    wanted = set()
    for package in PACKAGES:
        names = [n for n in importlib.import_module(package).__all__ if not n.startswith("__")]
        program = tmp_path / "packages" / package / "tests" / "typed.py"
        program.parent.mkdir()
        lines = [f"from {package} import {name}, {name}_misspelled" for name in names]
        program.write_text("\n".join(lines) + "\n", encoding="utf-8")
        wanted |= {(package, i) for i in range(len(names))}
    output = pyright(tmp_path)
    found = {
        (Path(error["file"]).parts[-3], error["range"]["start"]["line"])
        for error in output["generalDiagnostics"]
        if "_misspelled" in error["message"] and "unknown import symbol" in error["message"]
    }
    assert len(wanted) > 60 and found == wanted

"""The README runs, and names every public module."""

import re
from pathlib import Path

import torch

import shared_kernels
from shared_kernels.testing import assert_close, readme

README = Path(__file__).parents[1] / "README.md"


def test_readme_blocks_run():
    weights = readme.run_blocks(README)["weights"]
    assert_close(weights.sum(-1), torch.ones(4))


def test_readme_names_every_module():
    source = Path(shared_kernels.__file__).parent
    modules = {p.stem for p in source.iterdir() if not p.name.startswith(("_", "py.typed"))}
    table = "\n".join(line for line in README.read_text().splitlines() if line.startswith("| `"))
    rows = [line.split("|")[1] for line in table.splitlines()]
    assert modules == {name for row in rows for name in re.findall(r"`(\w+)`", row)}

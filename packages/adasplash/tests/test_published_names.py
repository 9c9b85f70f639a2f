"""What the page says of adasplash 0.2.2: its names and calls, from a table of its signatures."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import adasplash
from shared_kernels.testing import assert_close

HERE = Path(__file__).parent
TABLE = json.loads((HERE / "published.json").read_text())["signatures"]
README = HERE.parent / "README.md"
# Where a default or the place of an argument is not theirs; the page names each of them.
DIFFERENT = {
    "adasplash": {"is_causal", "niter"},
    "triton_entmax": {"n_iter", "use_histogram", "fast_math"},
}


def arguments(name: str, text: str) -> dict[str, inspect.Parameter]:
    scope: dict[str, object] = {}
    exec(f"def function{text}: ...", scope)
    return dict(inspect.signature(scope["function"]).parameters)


@pytest.mark.parametrize("name", TABLE)
def test_every_name_takes_every_argument(name):
    theirs, ours = arguments(name, TABLE[name]), inspect.signature(getattr(adasplash, name))
    named = {key: p for key, p in theirs.items() if p.kind is not p.VAR_KEYWORD}
    if len(named) != len(theirs):  # its own take those of triton_entmax, but for alpha
        more = arguments("", TABLE["triton_entmax"])
        theirs = named | {key: p for key, p in more.items() if key not in ("x", "alpha")}
    assert set(theirs) <= set(ours.parameters)
    differing = {
        key
        for at, (key, p) in enumerate(named.items())
        if p.default != ours.parameters[key].default or list(ours.parameters)[at] != key
    }
    assert differing == DIFFERENT.get(name, set())
    page = README.read_text().split("## Differences from the published")[1].split("\n## ")[0]
    for argument in differing:
        assert f"`{argument}" in page, f"{name}: the page does not say that {argument} differs"
    assert name in page or name in README.read_text()
    assert name in adasplash.__all__


def test_their_calls_give_converged_weights():
    x = torch.randn(4, 50)
    exact = adasplash.triton_entmax(x, 1.5)
    for found in (
        adasplash.triton_entmax(x, 1.5, 10, True, False),
        adasplash.triton_entmax(x, 1.5, 2, True, False),
        adasplash.triton_entmax(x, alpha=1.5, n_iter=2, use_histogram=True),
        adasplash.triton_entmax_v1(x, 1.5, 10, False),
        adasplash.triton_entmax_v2(x, 1.5, 1, False, True),
        adasplash.triton_entmax15(x, n_iter=2, use_histogram=False, fast_math=False),
    ):
        assert torch.equal(found, exact)
    sparse = adasplash.triton_sparsemax(x, n_iter=2)
    assert torch.equal(sparse, adasplash.triton_entmax(x, 2.0))
    q, k, v = torch.randn(3, 2, 2, 9, 8)
    lengths = torch.tensor([9, 4])
    causal = adasplash.adasplash(q, k, v, 1.5, True, lengths, None)
    for found in (
        adasplash.adasplash_v1(q, k, v, 1.5, True, lengths, 10),
        adasplash.adasplash_v2(q, k, v, 1, lengths),
        adasplash.adasplash2(q, k, v, varlen=lengths),
    ):
        assert torch.equal(found, causal)
    assert_close(causal, adasplash.adasplash(q, k, v, 1.5, True, lengths, backend="reference"))
    for bad in ({"n_iter": 0}, {"use_histogram": 3}):
        with pytest.raises((TypeError, ValueError), match=f"`{next(iter(bad))}` must be"):
            adasplash.triton_entmax_v2(x, **bad)


def test_the_table_is_that_of_the_package():
    """Where the published package lies beside ours: ADASPLASH_PUBLISHED is its folder."""
    folder = os.environ.get("ADASPLASH_PUBLISHED")
    if folder is None:
        pytest.skip("ADASPLASH_PUBLISHED does not say where adasplash 0.2.2 lies")
    spec = importlib.util.spec_from_file_location("published", Path(folder, "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    public = [name for name in module.__all__ if not name.startswith("__")]
    found = {name: str(inspect.signature(getattr(module, name))) for name in public}
    assert {name: re.sub(r": [^,=)]+|->.*", "", text) for name, text in found.items()} == TABLE

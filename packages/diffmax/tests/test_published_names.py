"""What the published diffmax 0.1.0 documents: its names and calls, from a table, against ours.

Its page is all there is to compare with: it says one signature in full, the others by the
arguments that its examples pass.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import diffmax
from shared_kernels.testing import assert_close

HERE = Path(__file__).parent
TABLE = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
README = (HERE.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def logged(monkeypatch):
    """The keys that reach a stand-in for swanlab.log."""
    keys: list[str] = []
    swanlab = types.ModuleType("swanlab")
    swanlab.log = lambda data, step=None: keys.extend(data)
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    return keys


@pytest.mark.parametrize("name", TABLE["calls"])
def test_every_name_takes_every_argument(name):
    ours = inspect.signature(getattr(diffmax, name)).parameters
    scope: dict[str, object] = {}
    exec(f"def theirs{TABLE['calls'][name]}: ...", scope)
    theirs = inspect.signature(scope["theirs"]).parameters
    assert set(theirs) <= set(ours)
    for argument, p in theirs.items():
        if p.default is not p.empty:
            assert ours[argument].default == p.default
            assert ours[argument].kind is p.kind
    if name == "diffmax_bisect":  # the one that is said in full: the places count, too
        assert [*ours][: len(theirs)] == [*theirs]
        assert set(ours) - set(theirs) == {"dtype", "backend"}
    assert f"`{name}(" in README
    public = {*diffmax.__all__, "diffmax_bisect_monitored"}  # which needs the extra
    assert name in public and name in dir(diffmax)


def test_their_examples_make_our_calls(logged):
    scores = torch.randn(2, 3, 8, 8)
    weights = diffmax.diffmax_bisect(scores, alpha=0.85, dim=-1)
    assert_close(weights.sum(-1), torch.ones(2, 3, 8))
    assert torch.equal(diffmax.diffmax_bisect(scores, 0.85, -1, 200, True), weights)
    for alpha in (torch.tensor(0.85), torch.full((3, 1, 1), 0.85), lambda: 0.85):
        assert_close(diffmax.diffmax_bisect(scores, alpha), weights)
    layer = diffmax.DiffmaxBisectModule(alpha=0.85, dim=-1, alpha_map=diffmax.HillMap(c=0.3))
    assert [name for name, _ in layer.named_parameters()] == TABLE["parameters"]
    for kind in (diffmax.HillMap, diffmax.TanhMap, diffmax.ExpMap):
        layer = diffmax.DiffmaxBisectModule(0.85, -1, alpha_map=kind(c=0.3, beta0=2.0))
        assert_close(layer(scores), weights)
    X = scores.requires_grad_()
    diffmax.diffmax_bisect_monitored(
        X, alpha=0.85, dim=-1, name_prefix="diffmax/encoder_0", step=3
    ).square().sum().backward()
    families = {re.fullmatch(r"diffmax/encoder_0/(\w+)/\w+", key)[1] for key in logged}
    assert families == {*TABLE["logged"], "meta"}


def test_the_ops_and_extras_carry_their_names():
    for op in TABLE["ops"]:
        assert hasattr(torch.ops.diffmax, op)
        assert f"torch.ops.diffmax.{op}(" in README
    project = (HERE.parent / "pyproject.toml").read_text(encoding="utf-8")
    for extra in TABLE["extras"]:
        assert re.search(rf"^{extra} = \[", project, re.M), extra


def test_the_page_says_what_is_new():
    page = README.split("## Differences from the published package")[1].split("\n## ")[0]
    new = set(diffmax.__all__) - set(TABLE["calls"]) - {"__version__"}
    for name in (*new, "backend=", "`n_iter` is a cap"):
        assert name in page, name

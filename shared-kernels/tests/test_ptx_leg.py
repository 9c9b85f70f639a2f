"""What the compiled leg leaves out, and what it complains of."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from shared_kernels.offline.ptx.leg import Leg

pytestmark = pytest.mark.tools
KERNEL = "shared_kernels.triton.dot:dot"


def report(**told):
    names = ("folder", "forms", "functions", "unfenced")
    given = {"folder": "/p/tests", "forms": {}, "functions": [], "unfenced": [], **told}
    properties = [("compiled", tuple(given[name] for name in names))]
    return SimpleNamespace(user_properties=properties, when="call", passed=True, nodeid="t")


def test_a_key_follows_the_tests_the_kernel_and_the_target(tmp_path):
    (tmp_path / "test_a.py").write_text("x = 1\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test_a.py").write_text("x = 1  # a comment\n")
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "test_a.py").write_text("x = 2\n")
    leg = Leg("sm_80", None, tmp_path / "forms.json")
    key = leg.key(tmp_path, [KERNEL])
    assert key == leg.key(tmp_path / "other", [KERNEL])
    assert key != leg.key(tmp_path / "third", [KERNEL])
    assert key != leg.key(tmp_path, ["shared_kernels.triton.dot:dot_acc"])
    assert key != Leg("sm_90", None, tmp_path / "forms.json").key(tmp_path, [KERNEL])
    assert leg.key(tmp_path, ["shared_kernels.triton.dot:nothing"]) == ""
    assert leg.key(tmp_path, ["a_module_that_is_gone:kernel"]) == ""


def test_unchanged_tests_are_left_out(tmp_path):
    leg = Leg("sm_80", None, tmp_path / "forms.json")
    key = leg.key(tmp_path, [KERNEL])
    known = {"same": (key, [KERNEL]), "changed": ("0", [KERNEL])}
    dropped = []
    config = SimpleNamespace(
        cache=SimpleNamespace(get=lambda name, default: known),
        hook=SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items)),
    )
    path = tmp_path / "test_a.py"
    items = [SimpleNamespace(nodeid=name, path=path) for name in ("same", "changed", "new")]
    leg.pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == ["changed", "new"]
    assert [item.nodeid for item in dropped] == ["same"]


def test_what_a_leg_complains_of(tmp_path):
    forms, kernels = tmp_path / "forms.json", tmp_path / "report.json"
    kernels.write_text(json.dumps({"kernels": [{"kernel": "k"}, {"kernel": "absent"}]}))
    writing = Leg("sm_80", str(kernels), forms, writes_forms=True)
    writing.pytest_runtest_logreport(report(forms={"k": ["add.f32"], "absent": ["ret"]}))
    assert writing._complaints() == []
    leg = Leg("sm_80", str(kernels), forms)
    leg.pytest_runtest_logreport(report(forms={"k": ["add.f32", "sub.f32"]}, unfenced=["k"]))
    missing, changed = leg._complaints()
    assert missing == "these tests ran no absent"
    assert changed.startswith("forms.json is not what ran for sm_80")
    assert leg.unfenced == {"p k"}
    assert Leg("sm_80", None, forms)._complaints() == []

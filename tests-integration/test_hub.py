"""`.ci/hub.py`: a package moves into a folder that Python does not search; it computes the same."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import torch

from shared_kernels import native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import hub

    yield hub
    for name in ("hub", "wheels", "projects"):
        sys.modules.pop(name, None)


MODULE = '''"""A module; "toy._torch:run" in a sentence stays."""
from shared_kernels import ops, rows as r
from toy import api
from .near import x
import torch


def f():
    from toy.deep.er import (
        y,  # why
        z as w,
    )
    return y("é"), define_op("toy::f", {"torch": Backend("toy._torch:run", why_not="other:it")})


def g(call):
    return ops.explain_call("toy", call), r.last("shared_kernels::knn"), named("toy"), "toy"
'''


@pytest.mark.parametrize(
    ("path", "dots", "root"),
    [
        ("a.py", ".", "__package__"),
        ("a/b.py", "..", "__package__.rsplit('.', 1)[0]"),
        ("a/b/c.py", "...", "__package__.rsplit('.', 2)[0]"),
    ],
)
def test_what_moves_is_written_anew_and_nothing_else(hub, path, dots, root):
    new = hub.Moved("toy", "_toy_1", PurePosixPath(path)).text(MODULE)
    expected = (
        MODULE.replace("from shared_kernels import", f"from {dots}shared_kernels import")
        .replace("from toy import", f"from {dots} import")
        .replace(
            "from toy.deep.er import (\n        y,  # why\n        z as w,\n    )",
            f"from {dots}deep.er import y, z as w",
        )
        .replace('"toy._torch:run", ', f"({root} + '._torch:run'), ")
        .replace('"toy::f"', "'_toy_1_toy::f'")
        .replace('explain_call("toy"', "explain_call('_toy_1_toy'")
        .replace('"shared_kernels::knn"', "'_toy_1_shared_kernels::knn'")
    )
    assert new == expected
    ast.parse(new)


def test_what_cannot_move_is_refused(hub):
    moved = hub.Moved("toy", "_toy_1", PurePosixPath("a.py"))
    with pytest.raises(SystemExit, match="a.py, line 1: `import shared_kernels.rows` has no"):
        moved.text("import shared_kernels.rows\n")


def test_a_package_with_more_dependencies_is_refused(hub):
    reasons = {project.name: hub.why_not(project) for project in hub.select([])}
    assert {name for name, reason in reasons.items() if reason is None} == {
        "adasplash",
        "difflayers",
        "diffmax",
    }
    assert "safetensors" in reasons["dsalt"] and "scikit-learn" in reasons["flashdiffusion"]
    assert "inside each of the others" in reasons["shared-kernels"]


# A call of each package: `package` is the loaded one, or that of the checkout.
CALLS = {
    "adasplash": "package.adasplash(q, k, v, alpha=1.5, is_causal=True, backend=backend)",
    "difflayers": "package.apply_diffusion(q[0, 0], W, eta=0.1, steps=2)",
    "diffmax": "package.diffmax_bisect(q, alpha=0.3, backend=backend)",
}
COMPUTE = """
import torch

def compute(package, backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 37, 16, requires_grad=True) for _ in range(3))
    W = torch.eye(37).roll(1, 0)
    out = CALL
    gradients = torch.autograd.grad((out * out.detach().sin()).sum(), (q, k, v), allow_unused=True)
    return [out.detach(), *(x for x in gradients if x is not None)]
"""
LOAD = """
import sys
from pathlib import Path
from kernels import get_local_kernel

to, *folders = sys.argv[1:]
found = []
for folder in folders:
    package = get_local_kernel(Path(folder))
    found.append((package.__version__, Path(package.__file__).parent.name))
    found.append(compute(package, "auto"))
ours = {"adasplash", "difflayers", "diffmax", "shared_kernels"}
assert not [name for name in sys.modules if name.split(".")[0] in ours]
torch.save(found, to)
"""


@pytest.mark.extras
@pytest.mark.parametrize("name", CALLS)
def test_two_versions_of_a_kernel_in_one_process(hub, tmp_path, name, monkeypatch):
    """Forward and backward have the bits of the checkout; none of the checkout is imported."""
    (project,) = hub.select([name])
    files = hub.sources(project)
    hub.lay_out(tmp_path / "one", project, "0.1.0", files)
    files[PurePosixPath("_version.py")] = b'__version__ = "7.0.0"\n'
    hub.lay_out(tmp_path / "two", project, "7.0.0", files)
    described = json.loads(next(tmp_path.glob("two/build/*/metadata.json")).read_text("utf-8"))
    assert described["name"] == name and described["version"] == 7

    program = COMPUTE.replace("CALL", CALLS[name])
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", program + LOAD, tmp_path / "found.pt"]
    subprocess.run(
        [*command, tmp_path / "one", tmp_path / "two"],
        check=True,
        cwd=tmp_path,
        env={**clean, "HF_HUB_OFFLINE": "1"},
    )
    (one, first, two, second) = torch.load(tmp_path / "found.pt")
    assert (one[0], two[0]) == (hub.version_of(project), "7.0.0")
    # a build of PyTorch for a card takes the variant for every device, which has no library
    is_for_cpu = torch.version.cuda is None and torch.version.hip is None
    has_library = is_for_cpu and native.why_not() is None
    assert one[1] == two[1] and one[1].startswith("torch-stable-abi27-cpu") == has_library
    space = {}
    exec(program, space)
    expected = space["compute"](importlib.import_module(name), "auto" if has_library else "torch")
    assert len(expected) > 1
    for found in (first, second):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

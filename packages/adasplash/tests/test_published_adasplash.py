"""The published adasplash's own tests, with our functions in place of its own.

ADASPLASH_TESTS is the folder of its unpacked source distribution (`pip download --no-deps
--no-binary :all: adasplash==0.2.2`), ENTMAX_PUBLISHED that of entmax 1.3, which the tests compare
with. The tests ask for a CUDA device; where there is none, they get the CPU, and eight minutes.
What has no counterpart here is left out by name: test_public_api.py (lists of its files and exact
signatures; our test_published_names.py compares those), test_attention.py (examples that are not
in the distribution), and lengths from 4096 on (their dense reference takes several GB).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = os.environ.get("ADASPLASH_TESTS")
ENTMAX = os.environ.get("ENTMAX_PUBLISHED")
CALLED = [
    "adasplash_no_block_mask",
    "adasplash_v1",
    "adasplash_v2",
    "triton_entmax",
    "triton_entmax15",
    "triton_entmax_v1",
    "triton_entmax_v2",
    "triton_sparsemax",
]
# A plugin of pytest: "cuda" becomes the CPU where there is no GPU, and our calls are counted.
ADAPTER = """
from pathlib import Path
from types import SimpleNamespace
import torch
from torch.overrides import TorchFunctionMode
import adasplash

CALLS = []

class OnTheCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

def counted(name):
    ours = getattr(adasplash, name)
    def call(*args, **kwargs):
        CALLS.append(name)
        return ours(*args, **kwargs)
    return call

for name in adasplash.__all__:
    if name.startswith(("adasplash", "triton_")):
        setattr(adasplash, name, counted(name))

if not torch.cuda.is_available():
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda i: SimpleNamespace(shared_memory_per_block=1 << 20)
    OnTheCpu().__enter__()

def pytest_sessionfinish():
    print(f"calls of ours: {len(CALLS)}, of {sorted(set(CALLS))}")
    print(f"ours lies in {Path(adasplash.__file__).parent}")
"""


@pytest.mark.slow
def test_their_tests_pass_with_our_functions(tmp_path):
    if TESTS is None or ENTMAX is None:
        pytest.skip("ADASPLASH_TESTS and ENTMAX_PUBLISHED do not say where both packages lie")
    import adasplash

    (tmp_path / "adapter.py").write_text(ADAPTER, encoding="utf-8")
    paths = [str(tmp_path), str(Path(adasplash.__file__).parents[1]), *sys.path, ENTMAX]
    names = ("adasplash", "adasplash_no_block_mask", "adasplash_v2", "triton_entmax")
    tests = [str(Path(TESTS, "tests", f"test_{name}.py")) for name in names]
    run = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "adapter", "-p", "no:cacheprovider"]
    run += ["-p", "no:warnings"]
    run += ["--rootdir", str(tmp_path), "-c", os.devnull, "--import-mode=importlib"]
    run += ["-m", "not stress", "-k", "not 4096", *tests]
    found = subprocess.run(
        run,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr
    passed = re.search(r"(\d+) passed", found.stdout)
    assert passed and int(passed[1]) >= 600, found.stdout
    assert str(CALLED) in found.stdout, found.stdout
    assert f"ours lies in {Path(adasplash.__file__).parent}" in found.stdout, found.stdout

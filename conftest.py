"""What holds for every test of the house: threads, seeds, the interpreter leg, the gpu marker.

Triton decides when a kernel is decorated whether it interprets or compiles, so one process does one
or the other. `pytest` alone is the CPU leg. `pytest --interpret` is the interpreter leg: it sets
TRITON_INTERPRET=1 before anything imports Triton and collects the test_triton*.py files only.
On a GPU, `pytest -m gpu` (or `pytest` as it is) runs the same files compiled.
`pytest --thorough` runs what a newcomer's `pytest` leaves out of large grids, `pytest --tools` the
tests of our own tools, pages, lessons and sources, `pytest --system` those of torch's compiler and
exporter, of several processes and of memory; `--thorough` goes with these two and `--interpret`.
`pytest --compiled sm_80` (sm_90, sm_120) runs the kernel tests as the PTX that Triton made for it,
executed on the CPU under a sanitizer, whose findings fail the test; what passed and did not change
is left out.
`pytest --extras` runs the tests of what works with optional packages; a missing one fails there.
`--extras --thorough` runs those of them that repeat a proof or take minutes.
A native library that is older than its sources is compiled before the tests, where a compiler is.
"""

import os
import runpy
import sys
from pathlib import Path

import pytest

# Many small operators on several threads wait for each other; tests are made of small operators.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Pictures are written to files, never to a screen.
os.environ.setdefault("MPLBACKEND", "Agg")
# The contract tests assert inside the library: show their operands when they fail.
pytest.register_assert_rewrite("shared_kernels.testing")


# The forms of instructions that compiled kernels use, by target, package and kernel.
FORMS = Path(__file__).parent / "benchmarks" / "results" / "forms.json"


def pytest_addoption(parser):
    parser.addoption(
        "--interpret",
        action="store_true",
        help="run test_triton*.py, and nothing else, on the CPU under Triton's interpreter",
    )
    parser.addoption(
        "--thorough",
        action="store_true",
        help="run the tests of large grids, and nothing else",
    )
    parser.addoption(
        "--tools",
        action="store_true",
        help="run the tests of our own tools, pages, lessons and sources, and nothing else",
    )
    parser.addoption(
        "--system",
        action="store_true",
        help="run the tests of torch's compiler and exporter, of several processes and of memory, "
        "and nothing else (with --tools: both)",
    )
    parser.addoption(
        "--compiled",
        metavar="TARGET",
        help="run test_triton*.py alone, as the PTX compiled for sm_80, sm_90 or sm_120",
    )
    parser.addoption(
        "--target", metavar="TARGET", help="with --compiled: for this target, not for its own"
    )
    parser.addoption(
        "--every-kernel",
        metavar="FILE.json",
        help="with --compiled: fail if a kernel of this offline report did not run, or other forms",
    )
    parser.addoption(
        "--write-forms",
        action="store_true",
        help=f"with --every-kernel: write the forms of instructions that ran to {FORMS.name}",
    )
    parser.addoption(
        "--err-as-allowed",
        action="store_true",
        help="with --compiled: approximate instructions err by as much as the PTX ISA allows",
    )
    parser.addoption(
        "--extras",
        action="store_true",
        help="run the tests that need optional packages, and nothing else; a missing package fails",
    )


def pytest_configure(config):
    thorough = config.getoption("--thorough")
    legs = [mark for mark in ("tools", "system") if config.getoption(f"--{mark}")]
    if legs:
        also = "thorough" if thorough else "not thorough"
        config.option.markexpr = f"({' or '.join(legs)}) and {also} and not slow and not extras"
    elif config.getoption("--extras"):
        also = "(thorough or slow)" if thorough else "not thorough and not slow"
        config.option.markexpr = f"extras and {also}"
    elif thorough:
        config.option.markexpr = "thorough and not slow and not extras and not tools and not system"
    if config.getoption("--interpret"):
        if "triton" in sys.modules:
            raise pytest.UsageError("--interpret: Triton was imported before the option was read")
        os.environ["TRITON_INTERPRET"] = "1"
        from shared_kernels.testing.interpreter import hasten_interpreter

        hasten_interpreter()
    if config.getoption("--compiled"):
        import shared_kernels.triton  # noqa: F401  (decides now that nothing is interpreted)
        from shared_kernels import device
        from shared_kernels.offline.ptx import Approximations
        from shared_kernels.offline.ptx.leg import Leg

        # The test files ask whether there is something to run kernels on.
        device.interpreting = lambda: True
        Approximations.errs_as_allowed = config.getoption("--err-as-allowed")
        target = config.getoption("--target") or config.getoption("--compiled")
        report, writes = config.getoption("--every-kernel"), config.getoption("--write-forms")
        leg = Leg(target, report, FORMS, writes)
        config.pluginmanager.register(leg, "compiled")
    if not hasattr(config, "workerinput"):  # once, before xdist starts its workers
        _compile_native_library()
    _configure_hypothesis()


def _compile_native_library():
    project = Path(__file__).parent / "shared-kernels"
    script, folder = project / "native" / "build.py", project / "src" / "shared_kernels" / "native"
    is_elsewhere = "SHARED_KERNELS_LIBRARY" in os.environ
    if is_elsewhere or os.environ.get("SHARED_KERNELS_NATIVE") == "0" or not script.exists():
        return
    build = runpy.run_path(str(script))
    if build["is_current"](folder / build["NAME"]):
        return
    try:
        build["build"](folder)
    except build["BuildError"] as problem:
        sys.stderr.write(f"the tests run without the native library: {problem}\n")


def _configure_hypothesis():
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:
        return
    # No deadline: the first call of an operator compiles or imports. Same examples on every CI run.
    settings.register_profile(
        "house",
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("house")


def pytest_ignore_collect(collection_path, config):
    kernels_only = config.getoption("--interpret") or config.getoption("--compiled")
    if kernels_only and collection_path.is_file():
        name = collection_path.name
        if name.startswith("test_") and not name.startswith("test_triton"):
            return True
    # A file without the mark need not be imported; the contracts of the house have some, too.
    legs = [mark for mark in ("tools", "system", "extras") if config.getoption(f"--{mark}")]
    if legs and collection_path.suffix == ".py":
        text = collection_path.read_text(encoding="utf-8")
        words = [f"mark.{mark}" for mark in legs] + ["contracts"] * ("system" in legs)
        return not any(word in text for word in words) or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    for item in items:
        if item.path.name.startswith("test_triton"):
            item.add_marker("gpu")  # interpreted without a GPU, so not skipped here
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped and item.config.getoption("--extras"):
        report.outcome, report.longrepr = "failed", f"must not be skipped: {report.longrepr[-1]}"
    return report


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """Every test starts from the same random state, whichever tests ran before it."""
    import random

    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)

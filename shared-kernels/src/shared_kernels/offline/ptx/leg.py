"""A leg of pytest: kernel tests run as compiled for a target, and what did not change is left out.

A test that passed is run again when its key changes: the sources of the kernels that it launched,
with all that they call, the code beside them, the code of its folder, what executes them here, the
target and the versions. The keys lie in pytest's cache; ``--cache-clear`` forgets them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .launcher import executing
from .sanitizer import COPIED, UNFENCED, Sanitizer
from .semantics import Approximations

# What Triton leaves out is no fault of a kernel: its fence for a copy may stand before the wait for
# it, where a branch parts the two products of a loop (findings/triton_proxy_fence_...).
TRITONS = ("missing proxy fence", UNFENCED[COPIED])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _code(folder: Path) -> str:
    """A digest of the Python files of a folder, without their comments."""
    files = sorted(folder.glob("*.py"))
    return _digest("\n".join(ast.dump(ast.parse(f.read_text("utf-8"))) for f in files))


@functools.cache
def _function(name: str) -> str:
    """A digest of a kernel ``module:function`` and of the code beside it; empty if it is gone."""
    from ..keys import sources

    module, _, function = name.partition(":")
    try:
        found = sys.modules.get(module) or importlib.import_module(module)
        kernel = getattr(found, function)
    except (ImportError, AttributeError):
        return ""
    return sources(kernel) + _code(Path(str(found.__file__)).parent)


_NAME = "compiled/{}"  # of a target, in pytest's cache


def _known(config: Any, target: str) -> dict[str, Any]:
    """What an earlier run noted; nothing where pytest has no cache (`-p no:cacheprovider`)."""
    return config.cache.get(_NAME.format(target), {}) if hasattr(config, "cache") else {}


class Leg:
    """The hooks of ``pytest --compiled TARGET``.

    Args:
        target: "sm_80", "sm_90" or "sm_120".
        report: An offline report; a kernel of it that did not run fails the leg, and so do forms
            of instructions that are not those of `forms`.
        forms: The file of the forms that kernels use, by target, package and kernel.
        writes_forms: Write what ran to that file instead.
    """

    def __init__(
        self, target: str, report: str | None, forms: Path, writes_forms: bool = False
    ) -> None:
        import triton

        self.target, self.report, self.forms, self.writes = target, report, forms, writes_forms
        # Without fusion the kernels have other instructions than the committed ones.
        self.is_fused = os.environ.get("TRITON_DEFAULT_FP_FUSION", "1") != "0"
        parts = (target, Approximations.errs_as_allowed, self.is_fused, triton.__version__)
        versions = (torch.__version__, np.__version__, sys.version_info[:2])
        self.base = _digest(repr((parts, versions, _code(Path(__file__).parent))))
        self.ran: dict[str, dict[str, set[str]]] = {}  # package -> kernel -> forms
        self.passed: dict[str, tuple[Path, list[str]]] = {}  # test -> its folder, what it launched
        self.unchanged = 0
        self.unfenced: set[str] = set()

    def key(self, folder: Path, functions: list[str]) -> str:
        """What a test of that folder depends on, that launched these kernels."""
        parts = [_function(name) for name in functions]
        return _digest(repr((self.base, _code(folder), parts))) if all(parts) else ""

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        if self.report is not None:
            return
        known = _known(config, self.target)
        kept: list[Any] = []
        left: list[Any] = []
        for item in items:
            key, functions = known.get(item.nodeid, ("", []))
            same = key and key == self.key(item.path.parent, functions)
            (left if same else kept).append(item)
        items[:] = kept
        self.unchanged = len(left)
        config.hook.pytest_deselected(items=left)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        sanitizer = Sanitizer()
        with executing(self.target, sanitizer):
            result = yield
        forms = {kernel: sorted(forms) for kernel, forms in sanitizer.forms.items()}
        functions = sorted(sanitizer.functions)
        unfenced = {kernel for kind, kernel, _, text in sanitizer.found if (kind, text) == TRITONS}
        for finding in [f for f in sanitizer.found if (f[0], f[3]) == TRITONS]:
            del sanitizer.found[finding]
        record = (str(item.path.parent), forms, functions, sorted(unfenced))
        item.user_properties.append(("compiled", record))
        if sanitizer.found:
            pytest.fail(
                f"the sanitizer found, on {self.target}:\n{sanitizer.text()}", pytrace=False
            )
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        record = dict(report.user_properties).get("compiled")
        if report.when != "call" or record is None:
            return
        name, forms, functions, unfenced = record
        folder = Path(name)
        package = folder.parent.name
        for kernel, names in forms.items():
            self.ran.setdefault(package, {}).setdefault(kernel, set()).update(names)
        self.unfenced.update(f"{package} {kernel}" for kernel in unfenced)
        if report.passed and functions:
            self.passed[report.nodeid] = (folder, functions)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        if hasattr(session.config, "workerinput"):
            return
        # Only now: while a test runs, it may have put something else in a kernel's place.
        new = {test: (self.key(*what), what[1]) for test, what in self.passed.items()}
        known = _known(session.config, self.target)
        if hasattr(session.config, "cache"):
            session.config.cache.set(_NAME.format(self.target), {**known, **new})
        # Workers do not say what they left out.
        is_parted = bool(session.config.getoption("numprocesses", None))
        left_out = self.unchanged or (is_parted and known)
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and left_out:
            session.exitstatus = pytest.ExitCode.OK
        if exitstatus:
            return
        complaints = self._complaints()
        if complaints:
            sys.stdout.write("\n" + "\n".join(f"FAILED {text}" for text in complaints) + "\n")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _complaints(self) -> list[str]:
        if self.report is None:
            return []
        rows = json.loads(Path(self.report).read_text("utf-8"))["kernels"]
        ran = {kernel for kernels in self.ran.values() for kernel in kernels}
        missing = sorted({row["kernel"] for row in rows} - ran)
        out = [f"these tests ran no {', '.join(missing)}"] if missing else []
        used = {p: {k: sorted(f) for k, f in kernels.items()} for p, kernels in self.ran.items()}
        is_listed = self.forms.exists()
        committed = json.loads(self.forms.read_text("utf-8")) if is_listed else {}
        if self.writes:
            text = json.dumps({**committed, self.target: used}, indent=1, sort_keys=True)
            self.forms.write_text(text + "\n", encoding="utf-8")
        elif is_listed and self.is_fused and committed.get(self.target) != used:
            out.append(f"{self.forms.name} is not what ran for {self.target}; see --write-forms")
        return out

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.unchanged:
            words = f"{self.unchanged} tests passed before, and nothing of them has changed"
            terminalreporter.write_line(words)
        if self.unfenced:
            words = "a fence that Triton puts too early for its copy: "
            terminalreporter.write_line(words + ", ".join(sorted(self.unfenced)))

"""Break the library on purpose, one line at a time, and see that a test notices.

    hatch run mutate            # works in a copy; rewrites the table of tests-integration/README.md

A mutation is (what, file, line as it is, line as it becomes, tests that should fail). It survives
if they pass all the same; then the tests are not worth what they claim.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "tests-integration" / "README.md"
HEAD = "| what was broken | where | noticed by |\n|---|---|---|\n"


class Mutation(NamedTuple):
    what: str
    file: str
    before: str
    after: str
    tests: str


IDENTITIES = "tests-integration/test_identities.py"
MUTATIONS = [
    Mutation(
        "a 2 % error in the scale of the scores",
        "packages/adasplash/src/adasplash/_checks.py",
        "        return float(max(q.shape[-1] if q.dim() else 1, 1) ** -0.5)",
        "        return float(1.02 * max(q.shape[-1] if q.dim() else 1, 1) ** -0.5)",
        IDENTITIES,
    ),
    Mutation(
        "a 2 % error in the scale of the scores",
        "packages/dsalt/src/dsalt/_call.py",
        "        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale",
        "        return 1.02 * self.q.shape[-1] ** -0.5 if self.scale is None else self.scale",
        IDENTITIES,
    ),
    Mutation(
        "the causal mask dropped at the edge of a tile",
        "packages/adasplash/src/adasplash/_tiles.py",
        "            yield columns, signed_distance(rows, edge, offset, device) < -ahead",
        "            yield columns, signed_distance(rows, edge, offset, device) < -ahead - 1",
        IDENTITIES,
    ),
    Mutation(
        "a wrong exponent",
        "shared-kernels/src/shared_kernels/qexp.py",
        "    torch.threshold_(w.div_(s).exp_(), 3 * math.exp(floor), 0.0)",
        "    torch.threshold_(w.div_(s).mul_(1.02).exp_(), 3 * math.exp(floor), 0.0)",
        "packages/diffmax/tests/test_backends.py",
    ),
    Mutation(
        "landmarks transposed: the lists of one head for another",
        "packages/dsalt/src/dsalt/_torch.py",
        "        l = landmarks.reshape(self.rows, self.G, n_lists, self.K).to(torch.int64)",
        "        l = landmarks.flip(1).reshape(self.rows, self.G, n_lists, self.K).to(torch.int64)",
        "packages/dsalt/tests/test_torch.py",
    ),
    Mutation(
        "a landmark inside the window counted in full",
        "packages/dsalt/src/dsalt/_torch.py",
        "        u = (place - l).sub_(w).clamp_(0, self.ramp).view(-1, each, self.K)",
        "        u = (place - l + 1).sub_(w).clamp_(0, self.ramp).view(-1, each, self.K)",
        "packages/dsalt/tests/test_torch.py",
    ),
    Mutation(
        "the threshold of lazy attention off by one position",
        "packages/adasplash/src/adasplash/_torch_lazy.py",
        "    first, behind = rows.start + 1, rows.stop + 1",
        "    first, behind = rows.start + 2, rows.stop + 2",
        "packages/adasplash/tests/test_lazy.py",
    ),
    Mutation(
        "a 2 % error in the step of a diffusion",
        "packages/difflayers/src/difflayers/diffusion.py",
        "                out = out - eta * graph.laplacian(out)",
        "                out = out - 1.02 * eta * graph.laplacian(out)",
        "packages/difflayers/tests/test_backends.py",
    ),
    Mutation(
        "padding of stored patterns ignored",
        "packages/difflayers/src/difflayers/_association.py",
        "    mask = association_scores(padding, mask, q, k)",
        "    mask = association_scores(None, mask, q, k)",
        "packages/difflayers/tests/test_modules.py",
    ),
    Mutation(
        "a 2 % error in the bandwidth",
        "packages/flashdiffusion/src/flashdiffusion/_checks.py",
        '    beta = positive("beta", beta)',
        '    beta = 1.02 * positive("beta", beta)',
        IDENTITIES,
    ),
]


def misplaced(root: Path) -> list[str]:
    """The mutations whose line does not stand once in its file, or whose tests are absent."""
    wrong = []
    for mutation in MUTATIONS:
        path = root / mutation.file
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines.count(mutation.before) != 1:
            wrong.append(f"{mutation.file} has not one line {mutation.before.strip()!r}")
        if not (root / mutation.tests).is_file():
            wrong.append(f"there is no {mutation.tests}")
    return wrong


def noticed_by(copy: Path, mutation: Mutation) -> str | None:
    """The first test that fails with the mutation in the copy; None if it survives."""
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.before + "\n", mutation.after + "\n"), encoding="utf-8")
    sources = [copy / "shared-kernels" / "src", *(copy / "packages").glob("*/src")]
    clean = {"PYTHONPATH": os.pathsep.join(map(str, sources)), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        output = subprocess.run(
            [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", mutation.tests],
            cwd=copy,
            env={**os.environ, "CI": "1", **clean},
            capture_output=True,
            text=True,
        ).stdout
    finally:
        path.write_text(text, encoding="utf-8")
    failed = re.search(r"^FAILED \S*/(test_\w+\.py::\w+)", output, re.M)
    return failed and failed.group(1)


def main() -> int:
    if wrong := misplaced(ROOT):
        raise SystemExit("\n".join(wrong))
    lines, survivors = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("packages", "shared-kernels", "tests-integration", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("conftest.py", "pytest.ini"):
            shutil.copy(ROOT / name, copy)
        for mutation in MUTATIONS:
            test = noticed_by(copy, mutation)
            survivors += test is None
            where = "/".join(Path(mutation.file).parts[-2:])
            lines.append(f"| {mutation.what} | `{where}` | {f'`{test}`' if test else 'nobody'} |\n")
            sys.stdout.write(lines[-1])
            sys.stdout.flush()
    page = PAGE.read_text(encoding="utf-8")
    before = page.partition(HEAD)[0]
    PAGE.write_text(before + HEAD + "".join(lines), encoding="utf-8")
    return survivors


if __name__ == "__main__":
    sys.exit(main())

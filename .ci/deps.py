"""Does each distribution declare what it imports, and import what it declares? (deptry, one by one)

    python .ci/deps.py [NAME ...]

One environment holds every package, so an undeclared import works here and fails at a user's.
"""

from __future__ import annotations

import subprocess
import sys

from projects import ROOT, metadata, select

# Extras for tools and lessons: nothing under src/ need import them.
TOOLS = {"all", "dev", "docs", "examples"}
# The name that is imported, where it is not that of the distribution.
IMPORTED_AS = ["faiss-cpu=faiss", "MDAnalysis=MDAnalysis"]
IGNORED = [
    # Declared once, by shared-kernels, which every package requires; its import is guarded.
    "DEP003=triton",
    # numpy: torch and Triton's interpreter import it and torch does not require it.
    # hypothesis, tensorboard: the extras' users import them, or torch.utils.tensorboard does.
    # anndata, torchdata: what the user makes with them is passed. swanlab, wandb: imported by name.
    "DEP002=numpy|hypothesis|tensorboard|anndata|torchdata|swanlab|wandb",
    # The extra `examples` brings them to a package's lessons, which import them when they run.
    "DEP004=matplotlib|sklearn",
]


def main() -> int:
    worst = 0
    for project in select(sys.argv[1:]):
        folder = ROOT / project.path
        groups = sorted(TOOLS & set(metadata(folder)["project"].get("optional-dependencies", {})))
        command = [sys.executable, "-m", "deptry", "--no-ansi", "src"]
        command += [f"--known-first-party={project.module}"]
        command += [f"--package-module-name-map={','.join(IMPORTED_AS)}"]
        command += [f"--per-rule-ignores={','.join(IGNORED)}"]
        command += [f"--optional-dependencies-dev-groups={','.join(groups)}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        print(f"deptry {project.name}: {'undeclared or unused' if done.returncode else 'ok'}")
        if done.returncode:
            print(done.stdout + done.stderr, flush=True)
        worst |= done.returncode
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())

"""The house's rules about one distribution as a whole, and about every text that somebody wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .rules import PACKAGES

LICENCES = {
    "MIT": "MIT License",
    "Apache-2.0": "Apache License",
    "BSD-3-Clause": "BSD 3-Clause License",
}
RUN_TIME = {
    "shared-kernels": {"torch", "numpy", "scipy", "triton"},
    "adasplash": set(),
    "difflayers": set(),
    "diffmax": set(),
    "dsalt": {"safetensors", "tqdm"},
    "flashdiffusion": {"scikit-learn", "tqdm"},
}
_EVERYBODY = {"torch", "numpy", "scipy", "shared-kernels"}


def requirement_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def distribution(pyproject: dict, licence_text: str, files: set[str]) -> list[str]:
    """What a distribution's pyproject.toml, licence and file list must say."""
    project = pyproject["project"]
    name = project["name"]
    module = name.replace("-", "_")
    dependencies = {requirement_name(r): r for r in project["dependencies"]}
    extras = project.get("optional-dependencies", {})
    wrong = []

    def want(holds: object, message: str) -> None:
        if not holds:
            wrong.append(f"{name}: {message}")

    licence = project.get("license")
    want(licence in LICENCES, f"licence {licence!r} is not one of {sorted(LICENCES)}")
    title = LICENCES.get(licence, "?")
    want(title.lower() in licence_text[:400].lower(), f"LICENSE is not the {title}")

    want(pyproject["build-system"]["build-backend"] == "hatchling.build", "not built by hatchling")
    version = pyproject.get("tool", {}).get("hatch", {}).get("version", {}).get("path")
    want(version == f"src/{module}/_version.py", "the version does not come from _version.py")
    want("version" in project.get("dynamic", []), "the version is not dynamic")
    required = (f"src/{module}/_version.py", f"src/{module}/py.typed", "README.md", "CHANGELOG.md")
    for file in required:
        want(file in files, f"{file} is missing")

    want(project.get("requires-python") == ">=3.10", "requires-python is not >=3.10")
    want(dependencies.get("torch") == "torch>=2.7", "torch>=2.7 is not required")
    if name != "shared-kernels":
        shared = dependencies.get("shared-kernels", "")
        want(shared.startswith("shared-kernels>=0."), "shared-kernels has no floor")
        want(",<" in shared, "shared-kernels has no ceiling")
    extra = set(dependencies) - _EVERYBODY - RUN_TIME[name]
    want(not extra, f"requires {sorted(extra)} at run time")
    want(
        "platform_system == 'Linux'" in dependencies.get("triton", "platform_system == 'Linux'"),
        "triton is required where it has no wheels",
    )
    siblings = {requirement_name(r) for group in extras.values() for r in group} | set(dependencies)
    want(not (siblings & set(PACKAGES)) - {name}, f"requires {sorted(siblings & set(PACKAGES))}")
    return wrong


def machine_paths(path: str, text: str) -> list[str]:
    """Nothing names a folder of somebody's machine."""
    homes = "|".join(("home", "root", "Users", "work", "mnt", "opt"))
    pattern = re.compile(rf"(?<![\w.:/}}\])])/(?:{homes})/[\w.-]+")
    return [
        f"{path}:{number}: {found.group()} is a path of one machine"
        for number, line in enumerate(text.splitlines(), 1)
        for found in pattern.finditer(line)
    ]


# What tools leave behind; git ignores it.
GENERATED = {"__pycache__", "build", "demo-report", "dist", "htmlcov", "site"}


def texts(root: Path) -> Iterator[Path]:
    """Every text file below `root` that somebody wrote."""
    kinds = {".cfg", ".css", ".html", ".ini", ".json", ".md", ".py", ".toml", ".txt", ".yaml"}
    for path in sorted(root.rglob("*")):
        folders = path.relative_to(root).parts[:-1]
        hidden = any(part.startswith(".") and part not in (".ci", ".github") for part in folders)
        told = path.suffix in {*kinds, ".yml", ""} and not path.name.startswith(".coverage")
        if told and path.is_file() and not hidden and not GENERATED & set(folders):
            yield path

"""A package in the layout of Hugging Face's kernels: `python .ci/hub.py NAME [--to FOLDER]`.

It builds the wheels of the package and of shared-kernels and writes, below the folder,

    build/torch-universal/                       Python and Triton alone, for every device
    build/torch-stable-abi27-cpu-x86_64-linux/   the same, with the native CPU library as it was
                                                 built on this machine

each with a `metadata.json`, so that `kernels.get_local_kernel(FOLDER)` imports it. Such a package
is loaded under a name of its own, beside others, from a folder that Python does not search:
shared-kernels lies inside it, imports are relative, an op's implementations are named from
`__package__`, and the namespace of its ops holds a digest of its sources. So two versions live in
one process.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import release
import wheels
from projects import ROOT, Project, metadata, requirement_name, select

SHARED = "shared_kernels"
# What a kernel may count on; a dependency beyond these is refused by the loader.
PROVIDED = {"torch", "numpy", "triton", "shared-kernels"}
LIBRARIES = (".so", ".dylib", ".dll")
Files = dict[PurePosixPath, bytes]
# Functions whose first argument is an op's namespace, and those where it is "namespace::op".
NAMESPACES = {"define_entmax", "explain_call"}
OPS = {"define_op", "register_op", "choose", "last"}


class Moved:
    """The new text of one module that moves into a package without a fixed name.

    Args:
        package: the package's old name, which becomes the root of all.
        namespace: the new namespace of its ops.
        path: the module's new path below the root.
    """

    def __init__(self, package: str, namespace: str, path: PurePosixPath) -> None:
        self.package, self.namespace, self.path = package, namespace, path
        self.depth = len(path.parts) - 1

    def name(self, old: str) -> str | None:
        """Where a module of ours lies below the root, "" for the root; None for anybody else's."""
        head, _, tail = old.partition(".")
        if head == self.package:
            return tail
        return old if head == SHARED else None

    def replacements(self, tree: ast.AST) -> list[tuple[ast.expr | ast.ImportFrom, str]]:
        """Nodes and their new text."""
        found: list[tuple[ast.expr | ast.ImportFrom, str]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.refuse_names(node)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                inside = self.name(node.module or "")
                if inside is not None:
                    found.append((node, self.imported(node, inside)))
            elif isinstance(node, ast.Call):
                found += self.namespaced(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += self.anchored(node, node.value)
        return found

    def refuse_names(self, node: ast.Import) -> None:
        for alias in node.names:
            if self.name(alias.name) is not None:
                raise SystemExit(
                    f"{self.path}, line {node.lineno}: `import {alias.name}` has no relative form; "
                    f"write `from PACKAGE import NAME`"
                )

    def imported(self, node: ast.ImportFrom, inside: str) -> str:
        names = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in node.names)
        return f"from {'.' * (self.depth + 1)}{inside} import {names}"

    def anchored(self, node: ast.expr, text: str) -> list[tuple[ast.expr, str]]:
        """ "adasplash._torch:forward" becomes an expression that begins with the root's name."""
        module, colon, function = text.partition(":")
        inside = self.name(module) if colon and function.isidentifier() else None
        if inside is None:
            return []
        root = f"__package__.rsplit('.', {self.depth})[0]" if self.depth else "__package__"
        return [(node, f"({root} + {'.' + inside + ':' + function!r})")]

    def namespaced(self, node: ast.Call) -> list[tuple[ast.expr, str]]:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else None
        called = node.func.id if isinstance(node.func, ast.Name) else called
        first = node.args[0] if node.args else None
        if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
            return []
        head, colons, op = first.value.partition("::")
        if called not in (OPS if colons else NAMESPACES) or self.name(head) is None:
            return []
        return [(first, repr(f"{self.namespace}_{head}{colons}{op}"))]

    def text(self, old: str) -> str:
        """The module's text with what must change, changed; everything else as it was."""
        lines = old.encode().splitlines(keepends=True)  # ast counts bytes
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        new = old.encode()
        places = [
            (
                starts[node.lineno - 1] + node.col_offset,
                starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0),
                text,
            )
            for node, text in self.replacements(ast.parse(old))
        ]
        for start, end, text in sorted(places, reverse=True):
            new = new[:start] + text.encode() + new[end:]
        return new.decode()


def why_not(project: Project) -> str | None:
    """Why a package cannot be a kernel, or None."""
    if project.module == SHARED:
        return "shared-kernels lies inside each of the others"
    wanted = map(requirement_name, metadata(ROOT / project.path)["project"]["dependencies"])
    beyond = sorted(set(wanted) - PROVIDED)
    if beyond:
        return (
            f"it needs {', '.join(beyond)}, and a kernel may need PyTorch, NumPy and Triton alone"
        )
    return None


def sources(project: Project) -> Files:
    """Every file of the package and of shared-kernels, by its path in the new package."""
    found: Files = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in (project, *select([SHARED.replace("_", "-")])):
            with zipfile.ZipFile(wheels.build(part, Path(scratch))) as wheel:
                for name in wheel.namelist():
                    head, *rest = PurePosixPath(name).parts
                    if head == part.module and rest:
                        inside = rest if part is project else [SHARED, *rest]
                        found[PurePosixPath(*inside)] = wheel.read(name)
    return found


def version_of(project: Project) -> str:
    """What the package's `_version.py` says."""
    return release.version_of(ROOT / project.path, project.module)


def variant(
    folder: Path, project: Project, version: str, files: dict[PurePosixPath, bytes]
) -> None:
    """Write one variant of the package."""
    digest = hashlib.sha256()
    for path, data in sorted(files.items()):
        digest.update(f"{path}\0{len(data)}\0".encode() + data)
    namespace = f"_{project.module}_{digest.hexdigest()[:12]}"
    for path, data in files.items():
        if path.suffix == ".py":
            data = Moved(project.module, namespace, path).text(data.decode()).encode()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    described = {
        "id": namespace,
        "name": project.name,
        "version": int(version.split(".")[0]),
        "license": metadata(ROOT / project.path)["project"]["license"],
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    text = json.dumps(described, indent=2) + "\n"
    (folder / "metadata.json").write_text(text, encoding="utf-8")


def lay_out(to: Path, project: Project, version: str, files: Files) -> None:
    """Write every variant below `to`, in place of those that are there."""
    build = to / "build"
    shutil.rmtree(build, ignore_errors=True)
    plain = {path: data for path, data in files.items() if path.suffix not in LIBRARIES}
    variant(build / "torch-universal", project, version, plain)
    if len(plain) < len(files):  # a compiler was here
        machine, system = platform.machine().lower(), platform.system().lower()
        machine = {"amd64": "x86_64"}.get(machine, machine)
        # the library knows nothing of PyTorch: any version of its stable interface is right
        name = f"torch-stable-abi27-cpu-{machine}-{system}"
        variant(build / name, project, version, files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="the distribution")
    parser.add_argument("--to", type=Path, help="the folder (dist/hub/NAME)")
    options = parser.parse_args()
    (project,) = select([options.name])
    reason = why_not(project)
    if reason is not None:
        raise SystemExit(f"{project.name} cannot be laid out as a kernel: {reason}")
    to = options.to or ROOT / "dist" / "hub" / project.name
    lay_out(to, project, version_of(project), sources(project))
    for folder in sorted(to.glob("build/*")):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

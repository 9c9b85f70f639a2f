"""Bring the pages that live beside docs/ into the site, and make one API page for each package.

A page of the repository links to files by their place in the repository, so that it also reads
well there. Here each such link becomes the file's place in the site; a file that is no page (a
picture, a script, a result) is copied to files/.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("diffmax", "adasplash", "dsalt", "flashdiffusion", "difflayers")
# repository → site
PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/NOTES.md": "benchmark-notes.md",
    "findings/README.md": "findings.md",
    "shared-kernels/README.md": "shared-kernels.md",
    "packages/difflayers/docs/migration.md": "difflayers/migration.md",
    **{f"packages/{name}/README.md": f"{name}/index.md" for name in PACKAGES},
    **{f"packages/{name}/CHANGELOG.md": f"{name}/changelog.md" for name in PACKAGES},
}
LINK = re.compile(r"(\]\()([^)\s]+)((?: \"[^\"]*\")?\))")
SYMBOL = re.compile(r"^\|\s*`([A-Za-z_]\w*)", re.M)
FENCE = re.compile(r"^```.*?^```[^\n]*\n", re.M | re.S)


def _site(target: str) -> str:
    """Where the file at `target` in the repository lies in the site."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"files/{target}"


def _targets(text: str, source: str) -> set[str]:
    """The repository's files that a page links to."""
    found = (match.group(2) for match in LINK.finditer(FENCE.sub("", text)))
    paths = (link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link))
    return {posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) for path in paths}


def _relinked(text: str, source: str) -> str:
    """`text` with every relative link turned into the site's."""
    folder, here = posixpath.dirname(source), posixpath.dirname(_site(source))

    def relink(match: re.Match) -> str:
        path, mark, anchor = match.group(2).partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match.group()
        target = _site(posixpath.normpath(posixpath.join(folder, path)))
        return (
            match.group(1) + posixpath.relpath(target, here or ".") + mark + anchor + match.group(3)
        )

    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(relink, text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*pieces, LINK.sub(relink, text[end:])])


def _names(tree: ast.Module) -> list[str]:
    """A module's ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError("a package without __all__")


def _api(name: str) -> str:
    """A page with the docstring of each public name of a package, from its home.

    They come in the order of the README's table, which begins with the main function. A second name
    of something (``b = a``) is left out: the README names it.
    """
    src = ROOT / "packages" / name / "src"
    homes, aliases = {}, set()
    for path in sorted((src / name).rglob("*.py")):
        module = ".".join(path.relative_to(src).with_suffix("").parts)
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and "_reference" not in module:
                homes.setdefault(node.name, f"{module}.{node.name}")
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
                aliases.update(getattr(target, "id", "") for target in node.targets)
    public = set(_names(ast.parse((src / name / "__init__.py").read_text("utf-8"))))
    table = SYMBOL.findall((ROOT / "packages" / name / "README.md").read_text("utf-8"))
    names = [each for each in table if each in public and not each.startswith("__")]
    shown = [homes[each] for each in names if each in homes or each not in aliases]
    return f"# {name}: API\n\n" + "\n\n".join(f"::: {each}" for each in shown) + "\n"


def on_files(files, config):
    sources = {f"docs/{file.src_uri}": file for file in files if file.src_uri.endswith(".md")}
    texts = {source: file.content_string for source, file in sources.items()}
    for source, page in PAGES.items():
        if f"docs/{page}" not in sources:
            texts[source] = (ROOT / source).read_text("utf-8")
            files.append(File.generated(config, page, content=_relinked(texts[source], source)))
    for name in PACKAGES:
        files.append(File.generated(config, f"{name}/api.md", content=_api(name)))
    linked = {target for source, text in texts.items() for target in _targets(text, source)}
    for target in sorted(linked):
        if _site(target).startswith("files/") and (ROOT / target).is_file():
            files.append(File.generated(config, _site(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.generated_by:
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}")

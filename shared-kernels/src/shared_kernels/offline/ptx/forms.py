"""The page of the forms of instructions that compiled kernels use, from the committed file."""

from __future__ import annotations

from collections import defaultdict

# target -> package -> kernel -> forms
Used = dict[str, dict[str, dict[str, list[str]]]]

_HEAD = """# Forms of instructions

What the compiled kernels are made of, by target: every form of PTX, its opcode with all modifiers,
and the kernels whose text has it. `TARGET=sm_90 hatch run test-kernels` runs each kernel on its
compiled code and fails if a form comes or goes; with `--write-forms` it writes the file that this
page is made of, `benchmarks/results/forms.json`, and `python -m shared_kernels.offline.ptx forms
FILE` prints the page. Each form has a test against a model of one lane: those of arithmetic in
`test_ptx_semantics.py`, the others in `test_ptx_forms.py`.
"""


def page(used: Used) -> str:
    """Markdown: for each target the forms that all kernels share, then who uses each other form."""
    parts = [_HEAD]
    for target in sorted(used, key=lambda name: int(name.partition("_")[2])):
        users: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for package, kernels in sorted(used[target].items()):
            for kernel, forms in sorted(kernels.items()):
                for form in forms:
                    users[form][package].append(f"`{kernel}`")
        n = {form: sum(map(len, by_package.values())) for form, by_package in users.items()}
        total = sum(map(len, used[target].values()))
        everywhere = sorted(form for form in users if n[form] == total)
        parts.append(f"## {target}: {len(users)} forms in {total} kernels\n")
        shared = ", ".join(f"`{form}`" for form in everywhere)
        parts.append(f"In every kernel: {shared}.\n" if shared else "No form is in every kernel.\n")
        parts.append("| form | kernels | used by |\n|---|--:|---|")
        for form in sorted(set(users) - set(everywhere)):
            groups = (f"{package}: {', '.join(names)}" for package, names in users[form].items())
            parts.append(f"| `{form}` | {n[form]} | {'; '.join(groups)} |")
        parts.append("")
    return "\n".join(parts)

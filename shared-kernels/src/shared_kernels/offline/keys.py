"""What names a compiled kernel from one run to the next: a report need not compile it again.

Triton's own key will not do. It holds the line where each function begins, its docstring and its
comments; and the constants of a called function are in it only where that function was hashed
before its caller, so that the order of the launches changes it. For AMD it also holds the folder in
which Triton is installed, where the device libraries lie.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import model, resources


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _description() -> str:
    """A digest of the code that describes a compiled kernel: what it wrote before may be old."""
    files = [Path(resources.__file__), Path(model.__file__)]
    return _digest("".join(file.read_text("utf-8") for file in files))


def _code(function: ast.FunctionDef) -> str:
    """The text of a function without its comments and its docstring."""
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:] or [ast.Pass()]
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(function)), "body": body})
    return ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, function)))


@functools.cache
def sources(function: Any) -> str:
    """A digest of a jitted function and of all that it calls: their code and their constants."""
    from triton.runtime.jit import DependenciesFinder

    called: list[Any] = []

    class Calls(DependenciesFinder):
        """Triton's reading of a function's text, which notes what is called."""

        def _update_hash(self, func: Any) -> None:
            called.append(func)

    parts: dict[Any, str] = {}
    left = [function]
    while left:
        one = left.pop()
        if one in parts:
            continue
        called.clear()
        nonlocals = inspect.getclosurevars(one.fn).nonlocals
        found = Calls(one._fn_name, one.__globals__, nonlocals, one.src)
        tree = one.parse()
        found.visit(tree)
        constants = sorted(
            (k, repr(value)) for (k, _), (value, _) in found.used_global_vals.items()
        )
        names = [other._fn_name for other in called]
        inlined = not getattr(one, "noinline", False)
        parts[one] = repr((one._fn_name, _code(tree.body[0]), inlined, names, constants))
        left += called
    return _digest("\n".join(sorted(parts.values())))


@functools.cache
def _content(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _options(options: Any) -> str:
    """A digest of a backend's options, with the device libraries by what they hold."""
    found = dict(vars(options))
    found["extern_libs"] = [(name, _content(path)) for name, path in found["extern_libs"]]
    return _digest(repr(sorted(found.items())))


def key(source: Any, compiler: Any, options: Any) -> str:
    """What a report keeps of a kernel.

    A digest of the kernel's sources, its arguments' types and constants, its options, the target,
    Triton with its assembler, and the code that describes it.

    Args:
        source: Triton's ``ASTSource`` of the kernel.
        compiler: Triton's backend for the target.
        options: The backend's options: warps, stages and so on.
    """
    from triton.runtime.jit import get_cache_invalidating_env_vars, get_cache_key

    constants = [
        sources(value) if hasattr(value, "cache_key") else str(value)
        for _, value in sorted(source.constants.items())
    ]
    types = [kind for _, kind in sorted(source.signature.items())]
    text = repr((sources(source.fn), str(source.attrs), types, constants))
    hashed = SimpleNamespace(hash=lambda: _digest(text))
    chosen = SimpleNamespace(hash=lambda: _options(options))
    whole = get_cache_key(hashed, compiler, chosen, get_cache_invalidating_env_vars())
    return _digest(whole + _description())[:16]

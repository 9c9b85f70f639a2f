"""Triton's interpreter, without work that it repeats at every call of a device function."""

from types import FunctionType, ModuleType
from typing import Any


def patch_language_once_per_launch() -> None:
    """Let Triton's interpreter replace the functions of `triton.language` once for each launch.

    The interpreter runs a kernel's Python with the language's functions replaced by its own. Triton
    3.7.1 and 3.9.0 search the whole language for what is to be replaced at every call of a device
    function (`tl.sum` is one, too), although the launch has replaced it already. What a kernel
    computes stays the same. A Triton without that search, or with another, is left as it is.
    """
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)  # not in Triton 3.3
    if isinstance(patch, FunctionType) and scope is not None:
        interpreter._patch_lang = _OncePerLaunch(patch, scope)


class _OncePerLaunch:
    """`_patch_lang(function)`: does nothing for modules that the running launch has patched."""

    def __init__(self, patch: Any, no_change: Any) -> None:
        self.patch = patch
        self.no_change = no_change
        self.patched: set[str] = set()
        self.modules_of: dict[FunctionType, frozenset[str]] = {}

    def __call__(self, function: FunctionType) -> Any:
        modules = self.modules_of.get(function)
        if modules is None:
            modules = self.modules_of[function] = _language_modules(function)
        if modules <= self.patched:
            return self.no_change()
        scope = self.patch(function)
        self.patched |= modules
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            self.patched.clear()

        scope.restore = restore_and_forget
        return scope


def _language_modules(function: FunctionType) -> frozenset[str]:
    """The modules of `triton.language` that a function reads from its globals."""
    values = function.__globals__.values()
    names = (value.__name__ for value in values if isinstance(value, ModuleType))
    return frozenset(name for name in names if name.startswith("triton.language"))

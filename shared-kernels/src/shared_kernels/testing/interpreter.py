"""Triton's interpreter, without work that it repeats or throws away."""

import functools
import math
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

# The releases of Triton whose interpreter was read for `keep_types` and `check_overflow`.
READ = ("3.7.",)


def hasten_interpreter() -> None:
    """Replace what Triton's interpreter repeats or throws away; what a kernel computes stays.

    `patch_language_once_per_launch`, and for the releases in READ `keep_types`, `check_overflow`.
    """
    import triton

    patch_language_once_per_launch()
    if triton.__version__.startswith(READ):
        keep_types()
        check_overflow()


def keep_types() -> None:
    """Let the interpreter make the type of a block, and the shape of a value, once.

    It makes them anew for every value, and a table of all NumPy types for every load and cast.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    core, block_type, of_numpy = tl.core, tl.block_type, functools.cache(interpreter._get_np_dtype)

    @functools.cache
    def sizes_of_tensor(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes_of_tensor(tuple(type.shape) if type.is_block() else ())

    make_once = block_type.__init__

    @functools.cache
    def sizes_of_type(shape: tuple[int, ...]) -> tuple[Any, int, str]:
        kind = object.__new__(block_type)
        make_once(kind, tl.int1, list(shape))
        return kind.shape, kind.numel, str(kind.shape)

    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        self.shape, self.numel, text = sizes_of_type(sizes)
        self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"

    def equal(self: Any, other: Any) -> bool:
        if isinstance(other, tl.constexpr):
            other = other.value
        return isinstance(other, tl.dtype) and self.name == other.name

    def numpy_type(type: Any) -> Any:
        return np.dtype(np.uint64) if type.scalar.is_ptr() else of_numpy(type.scalar)

    interpreter._get_np_dtype = numpy_type
    core.tensor.__init__ = make_tensor
    block_type.__init__ = make_type
    tl.dtype.__eq__ = equal


def check_overflow() -> None:
    """Let integers that overflow stop a kernel.

    Triton works out, with interpreted operations on 64-bit integers, whether a sum, difference or
    product of narrower ones overflows: a third of an attention kernel's time. The answer is thrown
    away unless the interpreter's option `debug` is set, which nothing sets. Here NumPy finds it.
    """
    from triton.runtime import interpreter

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        wide = (value.handle.data.astype(np.int64) for value in (lhs, rhs))
        exact = operations[binary_op.__name__](*wide)
        least, most = kind.get_int_min_value(), kind.get_int_max_value()
        if exact.size and not least <= exact.min() <= exact.max() <= most:
            raise OverflowError(f"{binary_op.__name__} of {kind} does not fit into {kind}")

    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = check


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

"""The house's rules about source files: each is a function that reads one file and lists faults.

A rule takes a `Source` and returns messages; an empty list means that the file obeys. The rules
read syntax trees and import nothing, so they hold for code that this machine cannot run. What each
file name means is written in ARCHITECTURE.md; `test_rules.py` shows every rule a file that breaks
it.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

PACKAGES = ("adasplash", "difflayers", "diffmax", "dsalt", "flashdiffusion")


@dataclass(frozen=True)
class Source:
    """One python file of a distribution: its path below `src/` (or below the root) and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def parts(self) -> tuple[str, ...]:
        return PurePosixPath(self.path).parts

    @property
    def package(self) -> str:
        """`diffmax` for diffmax/_triton/forward.py."""
        return self.parts[0]

    @property
    def module(self) -> str:
        """`diffmax._triton.forward` for diffmax/_triton/forward.py."""
        return ".".join(self.parts)[: -len(".py")].removesuffix(".__init__")

    @property
    def is_init(self) -> bool:
        return self.parts[-1] == "__init__.py"

    @property
    def room(self) -> str:
        """The floor-plan name the file stands under: `_triton` for diffmax/_triton/forward.py."""
        return self.parts[1].removesuffix(".py") if len(self.parts) > 1 else ""

    def imports(self) -> Iterator[tuple[str, int]]:
        """(absolute dotted name, line) of everything imported, wherever the statement stands.

        `from .a import b` gives `NAME.a` and `NAME.a.b`: b may be a module. Names that are given as
        strings to import_module count too.
        """
        here = self.module.split(".")
        base = here if self.is_init else here[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = base[: len(base) - node.level + 1] if node.level else []
                origin = ".".join([*above, *filter(None, [node.module])])
                yield origin, node.lineno
                yield from ((f"{origin}.{alias.name}", node.lineno) for alias in node.names)
            elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
                for argument in node.args[:1]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield argument.value, node.lineno

    def at(self, line: int, message: str) -> str:
        return f"{self.path}:{line}: {message}"


Rule = Callable[[Source], list[str]]


def dotted(node: ast.AST) -> str:
    """`tl.dot` for the expression tl.dot; "" for what is not a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def under(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


def is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


# ------------------------------------------------------------------------------- who imports whom
# What follows from one import after another, import-linter finds: pyproject.toml.


def no_sibling(source: Source) -> list[str]:
    """A package imports itself and shared_kernels, never another package of the house."""
    return [
        source.at(line, f"imports its sibling {name}")
        for name, line in source.imports()
        for sibling in PACKAGES
        if sibling != source.package and under(name, sibling)
    ]


# room -> rooms it must not look into. Data flows api -> _call -> _ops -> a fast room; _reference
# stands beside, the measure of them all, and rests on nothing that it measures.
_ABOVE = ("_ops", "_autograd", "api", "modules")
_FAST_ROOMS = ("_torch", "_cpu", "_native", "_triton")
FORBIDDEN = {
    "_call": (*_ABOVE, *_FAST_ROOMS, "_reference"),
    "_checks": (*_ABOVE, *_FAST_ROOMS, "_reference"),
    "_reference": (*_ABOVE, *_FAST_ROOMS),
    "_torch": (*_ABOVE, "_native", "_triton", "_reference"),
    "_cpu": (*_ABOVE, "_native", "_triton", "_reference"),  # the older name of _torch
    "_native": (*_ABOVE, "_torch", "_triton", "_reference"),
    "_triton": (*_ABOVE, "_torch", "_native", "_reference"),
    "_ops": ("api", "modules"),
    "_autograd": ("api", "modules"),
    "api": ("modules",),
}
_OPTIMISED = ("dispatch", "native", "offline", "ops", "pairwise", "qexp", "triton")
_FAST = tuple(f"shared_kernels.{name}" for name in _OPTIMISED)


def plan_room(source: Source) -> str:
    """The floor-plan name whose promise a file keeps: `_torch` for _torch_lazy.py too."""
    known = [room for room in FORBIDDEN if f"{source.room}_".startswith(f"{room}_")]
    return known[0] if known else source.room


def one_way(source: Source) -> list[str]:
    """Data flows one way; no fast room imports `_reference`, nor it anything fast."""
    room = plan_room(source)
    closed = [f"{source.package}.{other}" for other in FORBIDDEN.get(room, ())]
    if room == "_reference":
        closed += [*_FAST, "triton"]
    if room in ("_torch", "_cpu"):
        closed += ["triton", "shared_kernels.triton"]
    return [
        source.at(line, f"{source.room} imports {name}")
        for name, line in source.imports()
        if any(under(name, other) for other in closed)
    ]


# ----------------------------------------------------------------------- what a file name promises


def init_reexports_only(source: Source) -> list[str]:
    """`__init__.py`: a docstring, imports, `__all__`; a lazy `__getattr__` re-exports as well.

    One call may stand there: the question whether the installed distribution is this one.
    """
    if not source.is_init:
        return []

    def allowed(node: ast.stmt) -> bool:
        if is_docstring(node) or isinstance(node, ast.Import | ast.ImportFrom):
            return True
        if isinstance(node, ast.Assign):  # _LAZY: name -> module, for __getattr__
            return [dotted(target) for target in node.targets] in (["__all__"], ["_LAZY"])
        if isinstance(node, ast.If):
            asked = node.test.operand if isinstance(node.test, ast.UnaryOp) else node.test
            branches = [*node.body, *node.orelse]
            return dotted(asked).endswith("TYPE_CHECKING") and all(map(allowed, branches))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return dotted(node.value.func) == "warn_of_another_project"
        return isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")

    return [
        source.at(node.lineno, "__init__.py re-exports, it defines nothing")
        for node in source.tree.body
        if not allowed(node)
    ]


def public_names(source: Source) -> list[str] | None:
    """The literal `__all__` of a file; None where there is none."""
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def all_is_bound(source: Source) -> list[str]:
    """The `__all__` of an `__init__.py` is a literal without doubles, every name imported."""
    if not source.is_init:
        return []
    try:
        names = public_names(source)
    except ValueError:
        return [source.at(1, "__all__ must be a literal list of strings")]
    if names is None:
        return [source.at(1, "no __all__")] if len(source.parts) == 2 else []
    bound = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    lazy = any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in source.tree.body)
    missing = [] if lazy else sorted(set(names) - bound)
    wrong = [source.at(1, f"__all__ names {name}, which nothing binds") for name in missing]
    if len(set(names)) != len(names):
        wrong.append(source.at(1, "__all__ names something twice"))
    return wrong


def configs_are_data(source: Source) -> list[str]:
    """`_triton/configs.py` is a table: literals, Config and Table, no function, no torch."""
    if source.parts[-1] != "configs.py" or source.package == "shared_kernels":
        return []
    wrong = []
    for node in source.tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [n for n, line in source.imports() if line == node.lineno]
            if not all(under(n, "__future__") or n.startswith("shared_kernels") for n in names):
                wrong.append(source.at(node.lineno, "configs.py imports shared_kernels only"))
        elif not (is_docstring(node) or isinstance(node, ast.Assign | ast.AnnAssign)):
            wrong.append(source.at(node.lineno, "configs.py holds data only"))
    calls = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))
    for call in calls:
        if dotted(call.func).split(".")[-1] not in ("Config", "Table"):
            wrong.append(source.at(call.lineno, "configs.py calls nothing but Config and Table"))
    return wrong


def version_file_is_a_version(source: Source) -> list[str]:
    """`_version.py` is one assignment of a literal X.Y.Z."""
    if source.parts[-1] != "_version.py":
        return []
    body = [node for node in source.tree.body if not is_docstring(node)]
    good = (
        len(body) == 1
        and isinstance(body[0], ast.Assign)
        and dotted(body[0].targets[0]) == "__version__"
        and isinstance(body[0].value, ast.Constant)
        and re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", str(body[0].value.value))
    )
    return [] if good else [source.at(1, '_version.py is `__version__ = "X.Y.Z"` and nothing else')]


_NO_CLASSES = ("_checks", "_reference", "_ops", "api", "_torch", "_cpu")


def rooms_hold_what_they_say(source: Source) -> list[str]:
    """nn.Modules live in modules.py; modules.py holds at least one class; api.py has functions."""
    wrong = []
    classes = [node for node in source.tree.body if isinstance(node, ast.ClassDef)]
    bases = {node.name: [dotted(base) for base in node.bases] for node in classes}
    if source.room in _NO_CLASSES:
        for node in classes:
            if any(base.endswith("Module") for base in bases[node.name]):
                wrong.append(source.at(node.lineno, f"{source.room} holds no nn.Module"))
    if source.parts[1:] == ("modules.py",) and not classes:
        wrong.append(source.at(1, "modules.py holds no class"))
    if source.parts[1:] == ("api.py",):
        functions = [node for node in source.tree.body if isinstance(node, ast.FunctionDef)]
        if not functions:
            wrong.append(source.at(1, "api.py holds no public function"))
    return wrong


def no_shim(source: Source) -> list[str]:
    """A file defines something: no empty placeholder, no module that only re-exports another."""
    if source.is_init or source.parts[-1] == "__main__.py":
        return []
    defines = (
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.Expr,
    )
    body = [
        node
        for node in source.tree.body
        if not is_docstring(node)
        and not (isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__")
    ]
    if any(isinstance(node, defines) for node in body):
        return []
    return [source.at(1, "defines nothing: an empty placeholder or a mere re-export")]


BANNED_NAMES = re.compile(r"(common|helpers|misc|utils|.*_v\d+|.*_(old|new|copy|backup))\.py")


def telling_file_name(source: Source) -> list[str]:
    """No common.py, helpers.py, x_v2.py; utils.py is flashdiffusion's public module only."""
    if source.path.endswith("flashdiffusion/utils.py"):
        return []
    if BANNED_NAMES.fullmatch(source.parts[-1]):
        return [source.at(1, "a file name that says nothing about its content")]
    return []


# --------------------------------------------------------------------------- what no library does


def _in_testing(source: Source) -> bool:
    return source.parts[:2] == ("shared_kernels", "testing")


def no_assert(source: Source) -> list[str]:
    """User input is checked by raising; an assert disappears under python -O."""
    if _in_testing(source):
        return []
    return [
        source.at(node.lineno, "assert in a library")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assert)
    ]


def no_print(source: Source) -> list[str]:
    """A library logs; its command lines write to sys.stdout or through tqdm."""
    return [
        source.at(node.lineno, "print in a library")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and dotted(node.func) in ("print", "builtins.print")
    ]


def no_silent_except(source: Source) -> list[str]:
    """No bare except, no handler of every exception that does nothing: failures are told."""
    wrong = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            wrong.append(source.at(node.lineno, "bare except"))
        elif dotted(node.type) in ("Exception", "BaseException"):
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if all(isinstance(s, ast.Pass | ast.Continue) for s in node.body) and not raises:
                wrong.append(
                    source.at(node.lineno, f"except {dotted(node.type)} that says nothing")
                )
    return wrong


def nothing_probed_at_import(source: Source) -> list[str]:
    """Importing asks no device anything: no torch.cuda call outside a function."""
    wrong = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                # Decorators and defaults run at import, the body does not.
                outside = [*getattr(child, "decorator_list", []), child.args]
                for part in outside:
                    visit(part)
                continue
            if isinstance(child, ast.Call) and dotted(child.func).startswith("torch.cuda."):
                wrong.append(source.at(child.lineno, f"{dotted(child.func)} at import"))
            visit(child)

    visit(source.tree)
    return wrong


def version_from_file(source: Source) -> list[str]:
    """`__version__` comes from _version.py: a checkout on PYTHONPATH has no metadata.

    One module asks what is installed beside the checkout that runs, which is no version of ours.
    """
    if source.module == "shared_kernels.installed":
        return []
    return [
        source.at(line, "importlib.metadata: a checkout on PYTHONPATH has none")
        for name, line in source.imports()
        if under(name, "importlib.metadata") or under(name, "pkg_resources")
    ]


def is_cuda_unasked(source: Source) -> list[str]:
    """`device.target()` decides, not `.is_cuda`: kernels compile for GPUs that are not there."""
    return [
        source.at(node.lineno, ".is_cuda: ask shared_kernels.device")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr == "is_cuda"
    ]


# ---------------------------------------------------------------------------------- triton kernels

_KERNEL_BANS = {
    "inline_asm_elementwise": "inline assembly fails in the interpreter",
    "autotune": "autotune needs a GPU: sizes come from configs.py",
    "atomic_add": "atomics make sums depend on the order",
}


def kernels_stay_portable(source: Source) -> list[str]:
    """No inline asm, autotune or atomic sums; tl.dot and libdevice only in the shared wrappers."""
    wrong = []
    may_dot = source.path == "shared_kernels/triton/dot.py"
    for node in ast.walk(source.tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        last = name.split(".")[-1]
        if last in _KERNEL_BANS and name.split(".")[0] in ("tl", "triton"):
            wrong.append(source.at(node.lineno, f"{name}: {_KERNEL_BANS[last]}"))
        if name in ("tl.dot", "triton.language.dot") and not may_dot:
            wrong.append(source.at(node.lineno, "tl.dot: use shared_kernels.triton.dot"))
    if source.path != "shared_kernels/triton/math.py":
        wrong += [
            source.at(line, "libdevice fails in the interpreter: use shared_kernels.triton.math")
            for name, line in source.imports()
            if "libdevice" in name.split(".")
        ]
    return wrong


def kernels_are_named(source: Source) -> list[str]:
    """Kernels are `_<op>_..._kernel`; what torch calls is `launch_<op>_...`."""
    if source.room != "_triton":
        return []
    wrong = []
    for node in source.tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        jitted = any("jit" in dotted(d).split(".") for d in node.decorator_list)
        if jitted and node.name.endswith("_kernel"):
            wrong.append(source.at(node.lineno, f"{node.name}: a kernel's name starts with _"))
        launches = any(
            isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)
            for call in ast.walk(node)  # kernel[grid](...)
        )
        if launches and not node.name.startswith("launch_"):
            wrong.append(source.at(node.lineno, f"{node.name}: a launcher is launch_<op>_..."))
    return wrong


# Names under which the arguments of an op travel: their fields have names.
_CALLS = ("call", "options")


def _is_integer(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def calls_are_read_by_name(source: Source) -> list[str]:
    """The fields of a call have names: no `call[3]`, `call[:6]`, `options[11]`."""
    return [
        source.at(node.lineno, f"{node.value.id} is read by position")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id in _CALLS
        and (isinstance(node.slice, ast.Slice) or _is_integer(node.slice))
    ]


def fields_are_replaced_by_one_function(source: Source) -> list[str]:
    """Named tuples change by `shared_kernels.calls.replaced`, which torch 2.7 can trace."""
    return [
        source.at(node.lineno, "`._replace(...)` is not traced by torch 2.7: replaced(call, ...)")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr == "_replace"
    ]


MOST_PARAMETERS = 40


def _is_jit(decorator: ast.AST) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return dotted(called) in ("jit", "triton.jit")


def kernels_have_few_parameters(source: Source) -> list[str]:
    """A kernel with more parameters than this is several kernels, or lacks a structure."""
    return [
        source.at(node.lineno, f"{node.name} has {len(node.args.args)} parameters")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef)
        and any(_is_jit(decorator) for decorator in node.decorator_list)
        and len(node.args.args) > MOST_PARAMETERS
    ]


# ------------------------------------------------------------------------------ bounds of the tests

_BOUNDS = ("abs", "atol", "rel", "rtol")
SMALL = 0.01  # as the upper bound of an assertion, a number up to this one says how wrong it may be


def _bounds(tree: ast.Module) -> Iterator[tuple[ast.expr, float]]:
    """(expression, largest number that counts) of what says how wrong a result may be."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((word.value, math.inf) for word in node.keywords if word.arg in _BOUNDS)
        elif isinstance(node, ast.Assert):
            for inner in ast.walk(node.test):
                if isinstance(inner, ast.Compare):
                    sides = [inner.left, *inner.comparators]
                    for operator, left, right in zip(inner.ops, sides, sides[1:], strict=False):
                        if isinstance(operator, ast.Lt | ast.LtE):
                            yield right, SMALL
                        elif isinstance(operator, ast.Gt | ast.GtE):
                            yield left, SMALL


def _is_constant(name: str) -> bool:
    return name.isupper() and len(name) > 2  # X, V and dX are tensors


def bounds_have_names(source: Source) -> list[str]:
    """How wrong a result may be stands in `shared_kernels.testing.tolerances`, not in a test.

    Refused are numbers in `atol=`, `rtol=`, `abs=`, `rel=` and small numbers as the upper bound of
    an assertion; zero, a variable and a multiple of a named bound may stand. What one algorithm or
    one sample decides is a constant of the test's module; a comment says what it bounds.
    """
    wrong, constants = [], set()
    for bound, largest in _bounds(source.tree):
        names = {dotted(node).split(".")[-1] for node in ast.walk(bound)} - {""}
        numbers = [node.value for node in ast.walk(bound) if isinstance(node, ast.Constant)]
        sizes = [abs(x) for x in numbers if isinstance(x, int | float) and x not in (0, 1)]
        constants |= set(filter(_is_constant, names))
        if "tolerance" in names or any(map(_is_constant, names)):
            continue
        factor = bool(names) and largest == math.inf  # 100 * tol
        if any(size <= (min(largest, 0.999) if factor else largest) for size in sizes):
            wrong.append(source.at(bound.lineno, f"a bound without a name: {ast.unparse(bound)}"))
    lines = ["", *source.text.splitlines()]
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            named = {dotted(target) for target in node.targets} & constants
            above = lines[node.lineno - 1].startswith("#")
            if named and not (above or "  # " in lines[node.lineno]):
                wrong.append(
                    source.at(node.lineno, f"{named.pop()}: a comment says what it bounds")
                )
    return wrong


SOURCE_RULES: tuple[Rule, ...] = (
    no_sibling,
    one_way,
    init_reexports_only,
    all_is_bound,
    configs_are_data,
    version_file_is_a_version,
    rooms_hold_what_they_say,
    no_shim,
    telling_file_name,
    no_assert,
    no_print,
    no_silent_except,
    nothing_probed_at_import,
    version_from_file,
    is_cuda_unasked,
    kernels_stay_portable,
    kernels_are_named,
    calls_are_read_by_name,
    fields_are_replaced_by_one_function,
    kernels_have_few_parameters,
)

# What holds for tests, examples and tools as well.
ANY_FILE_RULES: tuple[Rule, ...] = (
    telling_file_name,
    no_silent_except,
    bounds_have_names,
)


def sources(folder: Path) -> Iterator[Source]:
    """Every python file below `folder`, paths relative to it."""
    for path in sorted(folder.rglob("*.py")):
        yield Source(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8"))

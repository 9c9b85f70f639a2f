"""Register one op with PyTorch: schema, fake, autograd, vmap and lazily imported backends.

``torch.library``'s define/impl/register_* are used directly: an op costs 2-3 plain calls on CPU and
passes ``opcheck`` and ``torch.compile(fullgraph=True)``. The kernel is registered for every device;
it chooses the backend by :mod:`shared_kernels.dispatch` and imports it on first use, so that
importing a package costs nothing beyond torch.

Derivatives: ``backward`` also serves ``torch.func.grad``, ``vjp`` and ``jacrev``, nested or under
``vmap``. An op without ``backward`` (as a rule the backward of another op) refuses its derivative
by name, and every op refuses forward mode: torch itself would answer both with zeros. A reference
of differentiable PyTorch code has derivatives of any order in both modes.

:func:`shared_kernels.ops.define_op` derives all of this from the fields of a call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from . import device, dispatch
from .direct import Signatures, any_requires_grad, is_plain

_libraries: dict[str, torch.library.Library] = {}
_reasons_of: dict[str, Callable[..., Mapping[str, str | None]]] = {}
registered_decompositions: dict[Any, Callable[..., Any]] = {}
# Of each overload: the same function of all its arguments, quicker where `direct.is_plain`.
calls_directly: dict[Any, Callable[..., Any]] = {}


def register_op(
    qualname: str,
    schema: str,
    *,
    implementations: Mapping[str, str | Callable[..., Any]],
    fake: Callable[..., Any],
    why_not: Mapping[str, Callable[..., str | None]] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: torch.dtype | None = None,
    vmap: Callable[..., Any] | None = None,
    keys: Sequence[str] = (),
    decomposition: Callable[..., Any] | None = None,
    is_reference_differentiable: bool = False,
) -> Any:
    """Define ``torch.ops.<namespace>.<name>`` and return its overload.

    Args:
        qualname: ``"namespace::name"``.
        schema: arguments and results; the last argument is ``str backend='auto'``.
        implementations: backend -> ``"module:function"``, in order of preference on a GPU (for
            tensors elsewhere ``"triton"`` comes last), or the function itself. The function takes
            every argument but ``backend``, returns new tensors, and is imported on first use.
            ``"reference"`` runs only where it is asked for.
        fake: shapes and dtypes of the results, for ``torch.compile`` and friends.
        why_not: backend -> function of the same arguments that says why it cannot run, or None.
            For ``"triton"`` the device is asked first.
        setup_context, backward: as for ``torch.library.register_autograd``. Without them the op has
            no derivative, and says so when one is asked for.
        autocast: dtype that floating-point inputs (fp64 excepted) take under autocast.
        vmap: as for ``torch.library.register_vmap``.
        keys: dispatch keys under which the kernel is registered by name as well, for a device that
            takes no kernel made for every device.
        decomposition: the same function of the same arguments, made of PyTorch's own operators
            alone and without a look at values, for :func:`decompositions`.
        is_reference_differentiable: whether PyTorch differentiates ``"reference"`` itself.
    """
    namespace, name = qualname.split("::")
    if "str backend='auto'" not in schema.split("->")[0]:
        raise ValueError(f"the schema of {qualname} must end its arguments with str backend='auto'")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _libraries[namespace]
    conditions = dict(why_not or {})
    on_others = sorted(implementations, key=lambda backend: backend == "triton")
    orders = {True: list(implementations), False: on_others}

    def reason(backend: str, args: Sequence[Any]) -> str | None:
        found = None
        if backend == "triton":
            found = device.triton_why_not(*(a for a in args if isinstance(a, torch.Tensor)))
        if found is None and backend in conditions:
            found = conditions[backend](*args)
        return found

    def reasons(*args: Any) -> Mapping[str, str | None]:
        first = None
        for argument in args:
            if isinstance(argument, torch.Tensor):
                first = argument
                break
        return _Reasons(orders[device.is_gpu(first)], reason, args)

    def run(inputs: Sequence[Any], backend: str) -> Any:
        chosen = dispatch.choose(qualname, backend, reasons(*inputs))
        result = function_of(implementations[chosen])(*inputs)
        if is_reference_differentiable and chosen == "reference":
            return result
        return _without_tangents(qualname, result)

    def kernel(*args: Any, backend: str = "auto") -> Any:
        if len(args) > n_inputs:
            *inputs, backend = args
        else:
            inputs = [*args, *defaults[len(args) : -1]]
        kind = next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # An op's dtypes are its own: no matmul inside is lowered behind its back.
            with torch.autocast(kind, enabled=False):
                return run(inputs, backend)
        return run(inputs, backend)

    library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    overload = getattr(getattr(torch.ops, namespace), name).default
    defaults = [a.default_value for a in overload._schema.arguments]
    n_inputs = len(defaults) - 1
    for key in ("CompositeExplicitAutograd", *keys):
        library.impl(name, kernel, key)
    torch.library.register_fake(qualname, fake, lib=library)
    composite = kernel if is_reference_differentiable else None
    autograd, calls_directly[overload] = _autograd(
        overload, setup_context, backward, composite, lambda *args: run(args[:-1], args[-1])
    )
    library.impl(name, autograd, "Autograd", with_keyset=True)
    if autocast is not None:
        for device_type in ("cpu", "cuda"):
            torch.library.register_autocast(qualname, device_type, autocast, lib=library)
    if vmap is not None:
        torch.library.register_vmap(qualname, vmap, lib=library)
    _reasons_of[qualname] = reasons
    if decomposition is not None:
        registered_decompositions[overload] = decomposition
    return overload


class _Reasons(Mapping[str, "str | None"]):
    """Why each backend cannot run, asked for only as far as the choice needs it."""

    def __init__(
        self,
        order: list[str],
        reason: Callable[[str, Sequence[Any]], str | None],
        args: Sequence[Any],
    ) -> None:
        self.order, self.reason, self.args = order, reason, args

    def __getitem__(self, backend: str) -> str | None:
        if backend not in self.order:
            raise KeyError(backend)
        return self.reason(backend, self.args)

    def __contains__(self, backend: object) -> bool:
        return backend in self.order

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def _without_tangents(qualname: str, result: Any) -> Any:
    """The result; refused inside forward mode, where torch would drop the tangents: zeros."""
    if forward_ad._current_level < 0:
        return result
    results = result if isinstance(result, tuple) else (result,)
    if any(r.is_floating_point() for r in results):
        raise NotImplementedError(
            f"{qualname} has no forward-mode derivative; use reverse mode (torch.autograd.grad, "
            "torch.func.jacrev), or call it outside of jvp, jacfwd, hessian and dual levels"
        )
    return result


def _autograd(
    overload: Any,
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
    composite: Callable[..., Any] | None,
    run: Callable[..., Any],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The op's kernel for the Autograd keys, and the call that goes around the dispatcher.

    ``torch.library.register_autograd`` makes the same, but for two things: its node cannot be made
    inside torch.func's transforms, and an op without a formula is not differentiated at all.
    """
    schema = overload._schema
    defaults = [a.default_value for a in schema.arguments]
    n_arguments = len(defaults)
    signatures = Signatures(schema)

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def at_once(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    # the keys come last: ctx.needs_input_grad then counts as the schema does
    def forward(ctx: Any, *inputs: Any) -> Any:
        *args, keyset = inputs
        if keyset is None:
            result = at_once(*args)
        elif torch._C._are_functorch_transforms_active():
            # autograd.Function turned gradients off: the transforms below this one want theirs
            with torch.enable_grad():
                result = below(keyset, *args)
        else:
            result = below(keyset, *args)
        if setup_context is not None:
            setup_context(ctx=ctx, inputs=tuple(args), output=result)
        return result

    def gradients(ctx: Any, *grads: Any) -> Any:
        if backward is None:
            raise NotImplementedError(
                f"{schema.name} has no derivative. If it is the backward pass of another op, that "
                "op has no second derivative (create_graph=True, hessian, gradgradcheck): take "
                'first derivatives only, or ask for backend="reference" where a function has it'
            )
        # after set_materialize_grads(False) there may be none
        if all(g is None for g in grads):
            return (None,) * (n_arguments + 1)
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = needs[:-1]
        try:
            found = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needs
        return (*found, None) if isinstance(found, tuple) else (found, None)

    name = f"BackwardOf_{schema.name.replace('::', '_')}"
    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    node = type(name, (torch.autograd.Function,), members)
    # The same inside of a transform: torch's own class for a node of one level.
    node_of_level = type(name, (torch.autograd.function._SingleLevelFunction,), members)

    def apply(keyset: Any, *args: Any) -> Any:
        is_reference = len(args) == n_arguments and args[-1] == "reference"
        if composite is not None and is_reference and not _Explained.is_active:
            return composite(*args)
        if not torch.is_grad_enabled() or not any_requires_grad(*args):
            return below(keyset, *args)
        # the dispatcher leaves out what equals its default
        args = (*args, *defaults[len(args) :])
        if not torch._C._are_functorch_transforms_active():
            return node.apply(*args, keyset)  # type: ignore[attr-defined]
        # The dispatcher has entered the transform: what is made here is a node of its level.
        with enable_single_level_autograd_function():
            return node_of_level.apply(*args, keyset)  # type: ignore[attr-defined]

    def directly(*args: Any) -> Any:
        # the dispatcher knows a reference that PyTorch differentiates, and converts arguments
        if (
            torch.compiler.is_compiling()
            or args[-1] == "reference"
            or not is_plain(signatures, args)
        ):
            return overload(*args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return node.apply(*args, None)  # type: ignore[attr-defined]
        return at_once(*args)

    return apply, directly


def backend_of(overload: Any, args: Sequence[Any], backend: str) -> str:
    """The backend that would run the op on its arguments: as `dispatch` decides, not recorded."""
    qualname = overload._schema.name
    return dispatch.decide(qualname, backend, _reasons_of[qualname](*args))


def explain(qualname: str, *args: Any) -> str:
    """Which backend would run ``qualname`` on these arguments (without ``backend``), and why."""
    return dispatch.explain(qualname, _reasons_of[qualname](*args))


def explain_call(namespace: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Make a call and :func:`explain` each op of ``namespace`` in it; "" if it runs none.

    A backend that the call asks for is not asked: what would run is the best that can.
    """
    with torch.no_grad(), _Explained(namespace) as explained:
        function(*args, **kwargs)
    return "\n".join(explained.texts)


class _Explained(TorchDispatchMode):
    is_active = False  # the reference, too, must pass through the mode as an op

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.texts: dict[str, None] = {}  # in the order of the calls, each once

    def __enter__(self) -> _Explained:
        _Explained.is_active = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _Explained.is_active = False
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != self.namespace:
            return func(*args, **(kwargs or {}))
        inputs = args[: len(func._schema.arguments) - 1]  # all but the backend
        self.texts[explain(func._schema.name, *inputs)] = None
        return func(*inputs)


def function_of(implementation: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function, imported where ``"module:function"`` names it."""
    return _imported(implementation) if isinstance(implementation, str) else implementation


@functools.cache
def _imported(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found

"""Register an op once: schema, fake, autograd, autocast, vmap and lazily imported backends.

``torch.library``'s define/impl/register_* are used directly: an op costs 2-3 plain calls on CPU and
passes ``opcheck`` and ``torch.compile(fullgraph=True)``. The kernel is registered for every device;
it chooses the backend by :mod:`shared_kernels.dispatch` and imports it on first use, so that
importing a package costs nothing beyond torch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from . import device, dispatch

_libraries: dict[str, torch.library.Library] = {}
_explainers: dict[str, Callable[..., dict[str, str | None]]] = {}


def define_op(
    qualname: str,
    schema: str,
    *,
    implementations: Mapping[str, str],
    fake: Callable[..., Any],
    why_not: Mapping[str, Callable[..., str | None]] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: torch.dtype | None = None,
    vmap: Callable[..., Any] | None = None,
    keys: Sequence[str] = (),
) -> Any:
    """Define ``torch.ops.<namespace>.<name>`` and return its overload.

    Args:
        qualname: ``"namespace::name"``.
        schema: arguments and results; the last argument is ``str backend='auto'``.
        implementations: backend -> ``"module:function"``, in order of preference on a GPU (for
            tensors elsewhere ``"triton"`` comes last). The function takes every argument but
            ``backend``, returns new tensors, and is imported on first use.
        fake: shapes and dtypes of the results, for ``torch.compile`` and friends.
        why_not: backend -> function of the same arguments that says why it cannot run, or None.
            For ``"triton"`` the device is asked first.
        setup_context, backward: as for ``torch.library.register_autograd``.
        autocast: dtype that floating-point inputs (fp64 excepted) take under autocast.
        vmap: as for ``torch.library.register_vmap``.
        keys: dispatch keys under which the kernel is registered by name as well, for a device that
            takes no kernel made for every device.
    """
    namespace, name = qualname.split("::")
    if "str backend='auto'" not in schema.split("->")[0]:
        raise ValueError(f"the schema of {qualname} must end its arguments with str backend='auto'")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _libraries[namespace]
    conditions = dict(why_not or {})

    def reasons(*args: Any) -> dict[str, str | None]:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        order = list(implementations)
        if not device.target(tensors[0] if tensors else None).is_gpu:
            order.sort(key=lambda backend: backend == "triton")
        found: dict[str, str | None] = {}
        for backend in order:
            reason = device.triton_why_not(*tensors) if backend == "triton" else None
            if reason is None and backend in conditions:
                reason = conditions[backend](*args)
            found[backend] = reason
        return found

    def kernel(*args: Any, backend: str = "auto") -> Any:
        # torch would drop the tangents and answer with zeros
        if backward is not None and forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{qualname} has no forward-mode derivative; use reverse mode "
                "(torch.autograd.grad), or call it outside of jvp and dual levels"
            )
        n_inputs = len(overload._schema.arguments) - 1
        if len(args) > n_inputs:
            *inputs, backend = args
        else:
            inputs = [*args, *(a.default_value for a in overload._schema.arguments[len(args) : -1])]
        chosen = dispatch.choose(qualname, backend, reasons(*inputs))
        run = _load(implementations[chosen])
        kind = next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return run(*inputs)
        # An op's dtypes are its own: no matmul inside is lowered behind its back.
        with torch.autocast(kind, enabled=False):
            return run(*inputs)

    def gradients(ctx: Any, *grads: Any) -> Any:
        # after set_materialize_grads(False) there may be none
        if backward is None or all(g is None for g in grads):
            return (None,) * len(overload._schema.arguments)
        return backward(ctx, *grads)

    library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    overload = getattr(getattr(torch.ops, namespace), name).default
    for key in ("CompositeExplicitAutograd", *keys):
        library.impl(name, kernel, key)
    torch.library.register_fake(qualname, fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(
            qualname, gradients, setup_context=setup_context, lib=library
        )
    if autocast is not None:
        for device_type in ("cpu", "cuda"):
            torch.library.register_autocast(qualname, device_type, autocast, lib=library)
    if vmap is not None:
        torch.library.register_vmap(qualname, vmap, lib=library)
    _explainers[qualname] = reasons
    return overload


def explain(qualname: str, *args: Any) -> str:
    """Which backend would run ``qualname`` on these arguments (without ``backend``), and why."""
    return dispatch.explain(qualname, _explainers[qualname](*args))


def explain_call(namespace: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Make a call and :func:`explain` each op of ``namespace`` in it; "" if it runs none.

    A backend that the call asks for is not asked: what would run is the best that can.
    """
    with torch.no_grad(), _Explained(namespace) as explained:
        function(*args, **kwargs)
    return "\n".join(explained.texts)


class _Explained(TorchDispatchMode):
    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.texts: dict[str, None] = {}  # in the order of the calls, each once

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != self.namespace:
            return func(*args, **(kwargs or {}))
        inputs = args[: len(func._schema.arguments) - 1]  # all but the backend
        self.texts[explain(func._schema.name, *inputs)] = None
        return func(*inputs)


def autocast_lower(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast to autocast's dtype where it is on (fp64 excepted), as SDPA does."""
    first = next(t for t in tensors if t is not None)
    kind = first.device.type
    # torch 2.7's Dynamo does not trace the question whether autocast exists
    exists = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if not exists or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    )


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)

"""An op from its call: schema, fake, autograd and vmap follow from the fields.

A call is a NamedTuple with the arguments of one op. :func:`define_op` derives from its fields
everything that PyTorch wants to know of them:

    op(call, backend) -> forward(call) -> out, saved
    loss.backward()   -> backward(call, saved, d_out, needs) -> {field: gradient}

so that an option is added in one place, the call, and reaches every backend by its name.
"""

from __future__ import annotations

import contextlib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from . import registration
from .calls import replaced
from .registration import explain, explain_call, register_op

__all__ = [
    "Backend",
    "Op",
    "autocast_lower",
    "autocast_on",
    "decompositions",
    "define_op",
    "explain",
    "explain_call",
    "full_precision",
    "register_op",
    "wants_gradient",
]

Out = TypeVar("Out", covariant=True)

_TYPES = {
    Tensor: "Tensor",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    list[int]: "int[]",
}


class Backend(NamedTuple):
    """One implementation of an op.

    Fields:
        forward: ``"module:function"`` of (call), or the function. It returns the output (a tuple of
            several), and beside it ``saved`` where the backend has such a type.
        backward: ``"module:function"`` of (call, saved, d_out, needs), which returns a dictionary
            {field: gradient} for every field named in the frozenset ``needs``. A gradient has the
            shape and the dtype of its field.
        saved: a NamedTuple of the tensors that forward keeps for backward, with a classmethod
            ``fake(call)`` that gives their shapes and dtypes. Its tensors are new ones. A field
            named ``out`` stands for the op's first output.
        why_not: ``"module:function"`` of (call), or the function, that says why the backend cannot
            run it, or None.
    """

    forward: str | Callable[..., Any]
    backward: str | Callable[..., Any] | None = None
    saved: type | None = None
    why_not: str | Callable[[Any], str | None] | None = None


class OpCall(Protocol[Out]):
    """What an op asks of its call: a NamedTuple that knows the shapes and dtypes of the output."""

    def fake(self) -> Out: ...

    def __iter__(self) -> Iterator[Any]: ...


class Op(Generic[Out]):
    """A registered op: ``op(call, backend)`` gives its output; ``overload`` is PyTorch's name."""

    def __init__(self, overload: Any, backward: Any, n_outputs: int, n_results: int) -> None:
        self.overload = overload
        self.run = registration.calls_directly[overload]
        self.backward = backward
        self.n_outputs = n_outputs
        self.n_results = n_results

    def __call__(self, call: OpCall[Out], backend: str = "auto") -> Out:
        found: Any = self.run(*call, backend)
        if self.n_results > 1:
            found = found[0] if self.n_outputs == 1 else found[: self.n_outputs]
        out: Out = found
        return out


def define_op(
    qualname: str,
    Call: type[OpCall[Out]],
    backends: Mapping[str, Backend],
    *,
    n_outputs: int = 1,
    non_differentiable: Sequence[int] = (),
    gradients: Sequence[str] = (),
    drops: Sequence[str] = (),
    second: Callable[..., Any] | None = None,
    autocast: torch.dtype | None = None,
    vmap: Callable[..., Any] | str | None = None,
    backward_vmap: Callable[..., Any] | None = None,
    keys: Sequence[str] = (),
    decomposition: Callable[..., Any] | None = None,
) -> Op[Out]:
    """Define ``torch.ops.NAMESPACE.NAME`` from a call, and NAME_backward where it has gradients.

    Args:
        qualname: ``"namespace::name"``.
        Call: a NamedTuple. Its fields (Tensor, float, int, bool, str, list[int], or one of them or
            None) are the op's arguments in order. ``Call.fake(self)`` gives outputs of the right
            shape and dtype; ``Call.fake_gradients(self, saved, needs)``, where there is one, does
            so for backward. Without it a gradient is contiguous, of its field's shape and dtype.
        backends: in order of preference on a GPU; for tensors elsewhere ``"triton"`` comes last,
            and the device is asked before its ``why_not``. ``"reference"`` runs only where it is
            asked for, and gets tensors of half types in fp32; without a backward of its own it is
            PyTorch code that PyTorch differentiates, to any order and in both modes.
        n_outputs: how many tensors the op returns.
        non_differentiable: indices of outputs that have no derivative.
        gradients: the fields that have a gradient. Without any the op has no derivative, and says
            so when one is asked for.
        drops: fields that backward does not read. They are not kept, and are None in its call;
            the first output is kept in their place.
        second: function of (call, out, d_out, to, backend) for second derivatives, made of
            differentiable operators or other ops. ``to`` is a dictionary {field: what comes from
            above for the field's gradient, or None}; ``out`` the first output where a backend
            saves it, else None. It returns a dictionary of gradients with the keys "d_out",
            "out" and fields. Without it a second derivative is refused by the op's name.
        autocast: dtype that floating-point inputs (fp64 excepted) take under autocast.
        vmap: ``"each"`` makes a call for each element of the batch, forward and backward; or the
            rule as for ``torch.library.register_vmap``.
        backward_vmap: the rule of NAME_backward, where ``vmap`` is a rule.
        keys: dispatch keys under which the kernel is registered by name as well.
        decomposition: function of (call) made of PyTorch's own operators alone, for
            :func:`decompositions`.
    """
    one_way = {n for n, b in backends.items() if b.backward is None}
    if gradients and one_way - {"reference"}:
        missing = ", ".join(sorted(one_way - {"reference"}))
        raise ValueError(f"{qualname} has gradients, but no backward for {missing}")
    spine = _Spine(Call, dict(backends), n_outputs, tuple(gradients), frozenset(drops))
    namespace, name = qualname.split("::")
    overload_backward = None
    if gradients:
        overload_backward = register_op(
            f"{qualname}_backward",
            spine.backward_schema(),
            implementations={
                n: spine.run_backward(n) for n, b in backends.items() if b.backward is not None
            },
            why_not={
                n: spine.why_not_backward(b.why_not) for n, b in backends.items() if b.why_not
            },
            fake=spine.fake_backward,
            setup_context=None if second is None else spine.keep_for_second,
            backward=None if second is None else spine.second(second),
            vmap=backward_vmap
            if not isinstance(vmap, str)
            else spine.each(namespace, f"{name}_backward"),
            keys=keys,
        )
        spine.backward_op = overload_backward
        spine.run_backward_op = registration.calls_directly[overload_backward]
    overload = register_op(
        qualname,
        spine.schema(),
        implementations={n: spine.run(n) for n in backends},
        why_not={n: _of_call(b.why_not, Call) for n, b in backends.items() if b.why_not},
        fake=spine.fake,
        setup_context=spine.keep(non_differentiable) if gradients else None,
        backward=spine.gradients_of if gradients else None,
        autocast=autocast,
        vmap=spine.each(namespace, name) if isinstance(vmap, str) else vmap,
        keys=keys,
        is_reference_differentiable="reference" in one_way,
        decomposition=None
        if decomposition is None
        else lambda *args: spine.pack(decomposition(Call(*args[: len(spine.fields)])), None),
    )
    spine.op = overload
    return Op(overload, overload_backward, n_outputs, n_outputs + spine.n_slots)


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)


class _Spine:
    """How the fields of a call become the flat arguments of PyTorch's ops, and back again.

    Results of the op: its outputs, then slots for the tensors of the largest saved type, the rest
    of them empty. Arguments of its backward: gradients of the outputs, fields, the first output
    where a backend saves it, slots, and the names of the gradients that are needed.
    """

    def __init__(
        self,
        Call: Any,
        backends: dict[str, Backend],
        n_outputs: int,
        gradients: tuple[str, ...],
        drops: frozenset[str],
    ) -> None:
        self.Call, self.backends, self.n_outputs = Call, backends, n_outputs
        self.gradients, self.drops = gradients, drops
        hints = typing.get_type_hints(Call)
        self.fields: tuple[str, ...] = Call._fields
        self.kinds = {field: _kind(Call, field, hints[field]) for field in self.fields}
        unknown = [f for f in (*gradients, *drops) if f not in self.fields]
        if unknown:
            raise ValueError(f"{Call.__name__} has no field {', '.join(unknown)}")
        saved = [b.saved for b in backends.values() if b.saved is not None]
        self.n_slots = max((len(_new(s)) for s in saved), default=0)
        # where a field is dropped, the output carries its graph on to the second derivative
        names_out = any("out" in s._fields for s in saved)  # type: ignore[attr-defined]
        self.keeps_out = names_out or bool(drops)
        self.op: Any = None
        self.backward_op: Any = None
        self.run_backward_op: Any = None

    # --- schemas ---

    def schema(self) -> str:
        defaults = self.Call._field_defaults
        arguments = [
            f"{kind} {field}" + (f"={_literal(defaults[field])}" if field in defaults else "")
            for field, kind in self.kinds.items()
        ]
        results = ["Tensor"] * (self.n_outputs + self.n_slots)
        return _signature((*arguments, "str backend='auto'"), results)

    def backward_schema(self) -> str:
        kinds = {f: "Tensor?" if f in self.drops else kind for f, kind in self.kinds.items()}
        arguments = [
            *(f"Tensor{'?' * (self.n_outputs > 1)} d_out_{i}" for i in range(self.n_outputs)),
            *(f"{kind} {field}" for field, kind in kinds.items()),
            *(["Tensor out"] if self.keeps_out else []),
            *(f"Tensor saved_{i}" for i in range(self.n_slots)),
            "str needs",
            "str backend='auto'",
        ]
        return _signature(arguments, ["Tensor"] * len(self.gradients))

    # --- forward ---

    def run(self, name: str) -> Callable[..., Any]:
        backend, function_of, Call = self.backends[name], registration.function_of, self.Call

        def implementation(*args: Any) -> Any:
            found = function_of(backend.forward)(Call(*args))
            out, saved = (found, None) if backend.saved is None else found
            return self.pack(out, saved)

        def reference(*args: Any) -> Any:
            call = Call(*args)
            wide = {f: x.float() for f, x in zip(self.fields, call, strict=True) if _is_half(x)}
            if not wide:
                return implementation(*args)
            # autocast would make products halves again
            with full_precision(next(iter(wide.values())).device.type):
                out = function_of(backend.forward)(replaced(call, **wide))
            like = call.fake()
            if not isinstance(out, tuple):
                return self.pack(out.to(like.dtype), None)
            return self.pack(tuple(x.to(y.dtype) for x, y in zip(out, like, strict=True)), None)

        if name == "reference" and backend.saved is None:
            return reference

        return implementation

    def pack(self, out: Any, saved: Any) -> Any:
        if not self.n_slots and not isinstance(out, tuple):
            return out
        outputs = out if isinstance(out, tuple) else (out,)
        fresh = [] if saved is None else [getattr(saved, f) for f in _new(saved.__class__)]
        empty = (outputs[0].new_empty(0) for _ in range(self.n_slots - len(fresh)))
        results = (*outputs, *fresh, *empty)
        return results[0] if len(results) == 1 else results

    def fake(self, *args: Any, backend: str = "auto") -> Any:
        *fields, backend = self.all_arguments(self.op, args, backend)
        call = self.Call(*fields)
        # refuses a backend that cannot run, also where nothing is saved
        Saved = self.backends[registration.backend_of(self.op, fields, backend)].saved
        saved = None if Saved is None else Saved.fake(call)  # type: ignore[attr-defined]
        return self.pack(call.fake(), saved)

    @staticmethod
    def all_arguments(op: Any, args: tuple[Any, ...], backend: str) -> list[Any]:
        arguments = op._schema.arguments
        rest = [a.default_value for a in arguments[len(args) : -1]]
        return [*args, *rest, *([backend] if len(args) < len(arguments) else [])]

    # --- first derivative ---

    def keep(self, non_differentiable: Sequence[int]) -> Callable[..., None]:
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            output = output if isinstance(output, tuple) else (output,)
            outputs, slots = output[: self.n_outputs], output[self.n_outputs :]
            ctx.mark_non_differentiable(*(outputs[i] for i in non_differentiable), *slots)
            ctx.set_materialize_grads(False)
            *fields, ctx.backend = inputs
            kept = [
                None if field in self.drops else x
                for field, x in zip(self.fields, fields, strict=True)
            ]
            _keep(ctx, [*kept, *outputs[: int(self.keeps_out)], *slots])

        return setup_context

    def gradients_of(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = dict(zip(self.fields, ctx.needs_input_grad, strict=False))
        needs = ",".join(f for f in self.gradients if wanted[f])
        found = self.run_backward_op(*grads[: self.n_outputs], *_kept(ctx), needs, ctx.backend)
        found = found if isinstance(found, tuple | list) else (found,)
        by_field = dict(zip(self.gradients, found, strict=True))
        return (*(by_field.get(f) if wanted[f] else None for f in self.fields), None)

    def parts(self, args: Sequence[Any]) -> tuple[Any, Any, Tensor | None, Sequence[Tensor], str]:
        """d_out, call, first output, slots and needs of the backward's arguments."""
        n, m = self.n_outputs, self.n_outputs + len(self.fields)
        d_out = args[0] if n == 1 else tuple(args[:n])
        out = args[m] if self.keeps_out else None
        *slots, needs = args[m + int(self.keeps_out) : m + int(self.keeps_out) + self.n_slots + 1]
        return d_out, self.Call(*args[n:m]), out, slots, needs

    def saved(self, name: str, out: Tensor | None, slots: Sequence[Tensor]) -> Any:
        Saved: Any = self.backends[name].saved
        if Saved is None:
            return None
        found = dict(zip(_new(Saved), slots, strict=False))
        return Saved(**found, **({"out": out} if "out" in Saved._fields else {}))

    def run_backward(self, name: str) -> Callable[..., Any]:
        path = self.backends[name].backward

        def implementation(*args: Any) -> Any:
            d_out, call, out, slots, needs = self.parts(args)
            saved = self.saved(name, out, slots)
            run = registration.function_of(typing.cast("str | Callable[..., Any]", path))
            wanted = _names(needs)
            found = run(call, saved, d_out, wanted)
            return self.pack_gradients({f: found[f] for f in wanted}, args)

        return implementation

    def pack_gradients(self, found: Mapping[str, Tensor | None], args: Sequence[Any]) -> Any:
        first = next(x for x in args if isinstance(x, Tensor))
        given = (found.get(f) for f in self.gradients)
        results = tuple(first.new_empty(0) if x is None else x for x in given)
        return results[0] if len(results) == 1 else results

    def fake_backward(self, *args: Any, backend: str = "auto") -> Any:
        *args_, backend = self.all_arguments(self.backward_op, args, backend)
        _, call, out, slots, needs_ = self.parts(args_)
        needs = _names(needs_)
        if hasattr(call, "fake_gradients"):
            name = registration.backend_of(self.backward_op, args_, backend)
            found = call.fake_gradients(self.saved(name, out, slots), needs)
        else:
            found = {
                f: torch.empty_like(getattr(call, f), memory_format=torch.contiguous_format)
                for f in needs
                if getattr(call, f) is not None
            }
        return self.pack_gradients(found, args_)

    def why_not_backward(self, why_not: str | Callable[..., Any]) -> Callable[..., str | None]:
        def reason(*args: Any) -> str | None:
            _, call, out, slots, _ = self.parts(args)
            # what was dropped was refused or taken with the forward pass; a tensor stands for it
            stand_in = next((x for x in (out, *slots) if x is not None), None)
            if self.drops:
                call = replaced(call, **dict.fromkeys(self.drops, stand_in))
            found: str | None = registration.function_of(why_not)(call)
            return found

        return reason

    # --- second derivative ---

    def keep_for_second(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        *args, ctx.backend = inputs
        _keep(ctx, args)

    def second(self, formula: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def backward(ctx: Any, *to: Tensor | None) -> tuple[Any, ...]:
            d_out, call, out, _, needs = self.parts(_kept(ctx))
            above = dict(zip(self.gradients, to, strict=True))
            for field in set(self.gradients) - _names(needs):
                above[field] = None
            found = formula(call, out, d_out, above, ctx.backend)
            d_outs = found.get("d_out")
            d_outs = d_outs if isinstance(d_outs, tuple) else (d_outs,)
            fields = (found.get(f) for f in self.fields)
            kept_out = (found.get("out"),) if self.keeps_out else ()
            made = (*d_outs, *fields, *kept_out, *(None,) * self.n_slots, None, None)
            wanted = ctx.needs_input_grad
            return tuple(g if w else None for g, w in zip(made, wanted, strict=True))

        return backward

    # --- vmap ---

    def each(self, namespace: str, name: str) -> Callable[..., Any]:
        def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
            op = getattr(getattr(torch.ops, namespace), name)

            def call(i: int) -> tuple[Tensor, ...]:
                pairs = zip(args, dims, strict=True)
                found = op(*(x if at is None else x.select(at, i) for x, at in pairs))
                return tuple(found) if isinstance(found, tuple | list) else (found,)

            if info.batch_size:
                results = zip(*map(call, range(info.batch_size)), strict=True)
                made = [torch.stack(x) for x in results]
            else:  # the shapes are those of an element of zeros
                args = tuple(
                    x if at is None else x.new_zeros(x.movedim(at, 0).shape[1:]).unsqueeze(at)
                    for x, at in zip(args, dims, strict=True)
                )
                made = [x.new_empty(0, *x.shape) for x in call(0)]
            if len(made) == 1:
                return made[0], 0
            return tuple(made), (0,) * len(made)

        return rule


def _of_call(why_not: str | Callable[..., Any], Call: Any) -> Callable[..., str | None]:
    return lambda *args: registration.function_of(why_not)(Call(*args))


def _keep(ctx: Any, values: Sequence[Any]) -> None:
    """Tensors go where autograd watches them, everything else beside."""
    ctx.save_for_backward(*(x for x in values if isinstance(x, Tensor)))
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in values]


def _kept(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


@functools.cache
def _names(needs: str) -> frozenset[str]:
    return frozenset(needs.split(",")) if needs else frozenset()


@functools.cache
def _new(Saved: Any) -> list[str]:
    """The fields of a saved type that are tensors of their own."""
    return [field for field in Saved._fields if field != "out"]


def _kind(Call: Any, field: str, hint: Any) -> str:
    """The word of a schema for a field's type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = list(typing.get_args(hint)) if is_union else [hint]
    is_optional = type(None) in choices
    choices = [c for c in choices if c is not type(None)]
    if len(choices) != 1 or choices[0] not in _TYPES:
        raise TypeError(f"{Call.__name__}.{field} has type {hint}, which no schema has a word for")
    return _TYPES[choices[0]] + "?" * is_optional


def _literal(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _signature(arguments: Iterable[str], results: list[str]) -> str:
    made = results[0] if len(results) == 1 else f"({', '.join(results)})"
    return f"({', '.join(arguments)}) -> {made}"


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow: gradients are on, and a tensor wants its own."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def decompositions() -> Any:
    """The table that turns an exported program into PyTorch's own operators, for ONNX and the like.

    It is ``torch.export.default_decompositions()`` with the ops of the packages imported so far
    that have a decomposition: rows have one (diffmax, entmax), fused attention has none.

    Example:
        >>> program = torch.export.export(module, (x,))  # doctest: +SKIP
        >>> program = program.run_decompositions(decompositions())  # doctest: +SKIP
        >>> torch.onnx.export(program, (x,), "module.onnx", dynamo=True)  # doctest: +SKIP
    """
    table = torch.export.default_decompositions()
    table.update(registration.registered_decompositions)
    return table


def autocast_on(kind: str) -> bool:
    """Whether autocast is on for a device type; False where it does not exist ("meta")."""
    # torch 2.7's Dynamo does not trace the question whether autocast exists
    exists = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return exists and torch.is_autocast_enabled(kind)


def full_precision(kind: str) -> contextlib.AbstractContextManager[Any]:
    """A context with autocast off for a device type."""
    return torch.autocast(kind, enabled=False) if autocast_on(kind) else contextlib.nullcontext()


def autocast_lower(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast to autocast's dtype where it is on (fp64 excepted), as SDPA does."""
    first = next(t for t in tensors if t is not None)
    kind = first.device.type
    if not autocast_on(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    )

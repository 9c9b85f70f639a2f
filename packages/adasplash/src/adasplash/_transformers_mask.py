"""The masks of transformers as what they are, a function of two positions, instead of N x N bytes.

A mask that is causal, padded, a sliding window, chunks or packed sequences becomes options of the
attention op. Any other is evaluated for a tile of queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from shared_kernels import checks

_MODULE = "transformers.masking_utils"
# Families whose own code computes with an additive mask: in a boolean one it reads the opposite.
_ADDITIVE = frozenset({"deepseek_v4", "informer", "nllb_moe"})
# Families in which tokens of padding that come first reach the others, with any attention function:
# their "eager" and "sdpa" differ there.
_PADDED_BEHIND = frozenset({"blt"})
# The functions that a mask which is not stored answers: its attributes and sizes.
_PROPERTIES = frozenset(
    {"__get__", "__set__", "__len__", "dim", "size", "numel", "is_floating_point"}
)


class Structure(NamedTuple):
    """Which keys a query sees, as options of the op."""

    is_causal: bool
    window: int | None
    n_keys: int  # those behind are seen by no query
    padding: Tensor | None  # (B, N_k), True at keys that count
    ends: Tensor | None  # offsets of the sequences, batch elements one after the other


class MaskFunction(Tensor):
    """A boolean (B, 1, N_q, N_k) mask that is not stored: any operator but the op's makes it.

    Made of the arguments that transformers gives to a mask interface.
    """

    _arguments: dict[str, Any]
    _structure: Structure | None
    _is_read: bool

    @staticmethod
    def __new__(cls, arguments: dict[str, Any]) -> MaskFunction:
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        device = torch.device(arguments.get("device", "cpu"))
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        made._arguments, made._structure, made._is_read = arguments, None, False
        return made

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"MaskFunction{tuple(self.shape)}"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.__name__ in _PROPERTIES:
            return super().__torch_function__(function, types, args, kwargs or {})
        if function is Tensor.__getitem__ and args[0]._is_all(args[1]):
            return args[0]
        # Here and not below: a mask function may need vmap, which operators cannot call.
        return function(*tree_map(_stored, args), **tree_map(_stored, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return operator(*tree_map(_stored, args), **tree_map(_stored, kwargs or {}))

    def _is_all(self, index: Any) -> bool:
        """Whether an index takes the whole mask, as ``mask[..., :N_k]`` often does."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(x is Ellipsis for x in parts):
            at = next(i for i, x in enumerate(parts) if x is Ellipsis)
            parts = parts[:at] + (slice(None),) * (self.dim() - len(parts) + 1) + parts[at + 1 :]
        return all(
            isinstance(x, slice) and x.indices(n) == (0, n, 1)
            for x, n in zip(parts, self.shape, strict=False)
        )

    def rows(self, first: int, stop: int) -> Tensor:
        """(B, 1, stop - first, N_k) of the mask, stored."""
        given = self._arguments
        return dense(
            {**given, "q_length": stop - first, "q_offset": given["q_offset"] + first}
        ).expand(-1, 1, -1, -1)

    def structure(self) -> Structure | None:
        """The mask as options of the op; None if it has no such form. Read once."""
        if not self._is_read:
            self._structure, self._is_read = _structure(**self._arguments), True
        return self._structure


def _stored(x: Any) -> Any:
    return x.rows(0, x.shape[2]) if isinstance(x, MaskFunction) else x


def dense(arguments: dict[str, Any]) -> Tensor:
    from transformers import masking_utils

    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = masking_utils.sdpa_mask(**{**arguments, **skips})
    if mask is None:
        raise RuntimeError("transformers made no mask although none of it may be left out")
    return mask


def interface(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **more: Any,
) -> Tensor | None:
    """The mask interface: None where every query sees every key.

    A causal mask says so itself: modules do not always know. While a graph is traced a mask is
    stored, but for a causal one, which is None or its (B, N_k) padding.
    """
    from transformers import masking_utils

    refuse_own_attention(config)
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    causal = mask_function is masking_utils.causal_mask_function
    both_ways = mask_function is masking_utils.bidirectional_mask_function
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if attention_mask is not None and not tracing and _family(config) in _PADDED_BEHIND:
        if attention_mask.dim() == 2 and not bool(attention_mask[:, :1].all()):
            checks.fail(
                "attention_mask",
                "have its padding behind the tokens for this family of models",
                f"padding before them for {_family(config)!r}",
                "tokens of padding that come first change the others there, with 'eager', too",
                NotImplementedError,
            )
    if not tracing:  # a static cache counts in tensors
        q_offset, kv_offset = int(q_offset), int(kv_offset)
    ends_together = all(isinstance(x, int) for x in (q_offset, kv_offset)) and (
        q_offset + q_length == kv_offset + kv_length
    )
    if allow_is_bidirectional_skip and attention_mask is None:
        size = more.get("local_size")
        wide = size is not None and kv_length < size and not causal
        if both_ways or (wide and _kinds(mask_function) == {"all", "around"}):
            return None
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **more,
    }
    if _family(config) in _ADDITIVE:
        made: Tensor = masking_utils.eager_mask(**arguments)
        return made
    if tracing:
        if causal and allow_is_causal_skip and ends_together and attention_mask is None:
            return None
        if attention_mask is not None and attention_mask.shape == (batch_size, kv_length):
            if causal and allow_is_causal_skip and ends_together and kv_offset == 0:
                return attention_mask.to(torch.bool)
            if both_ways and allow_is_bidirectional_skip:
                return attention_mask.to(torch.bool)[:, None, None]
        return dense(arguments)
    return MaskFunction(arguments)


# --- families -----------------------------------------------------------------------------------


def refuse_own_attention(config: Any) -> None:
    """Refuse a family of models that asks for a mask and then computes attention of its own."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    families = [_family(x) for x in (config, *parts) if x is not None]
    if families and not any(x is None or calls_the_interface(x) for x in families):
        checks.fail(
            "attn_implementation",
            "be 'eager' or 'sdpa' for this family of models",
            f"a registered attention function for {families[0]!r}",
            "its code computes softmax attention of its own and would misread the mask",
            NotImplementedError,
        )


def _family(config: Any) -> str | None:
    """The folder of transformers' models that a configuration is from; None: of somewhere else."""
    place = type(config).__module__.split(".")
    return place[2] if place[:2] == ["transformers", "models"] else None


@cache
def calls_the_interface(family: str) -> bool:
    """Whether the code of a folder of transformers' models calls its attention interface."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return True
    folder = Path(spec.origin).parent / "models" / family
    files = list(folder.glob("modeling_*.py"))
    return not files or any("ALL_ATTENTION_FUNCTIONS" in x.read_text("utf-8") for x in files)


# --- what a mask function is made of ------------------------------------------------------------


def _structure(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    **more: Any,
) -> Structure | None:
    atoms = _atoms(mask_function)
    if atoms is None:
        return None
    kinds = {kind for kind, _ in atoms}
    # Inside of a packed sequence positions rise by one: those of the tokens say the same.
    if "packed" not in kinds and any("position_ids" in values for _, values in atoms):
        return None
    causal, n_keys, window = "causal" in kinds, kv_length, None
    behind = [values["sliding_window"] for kind, values in atoms if kind == "behind"]
    around = [values["sliding_window"] + 1 for kind, values in atoms if kind == "around"]
    if (behind and not causal) or (around and causal):
        return None
    if behind or around:
        window = min(behind + around)
        if not isinstance(window, int) or window < 1:
            return None
    ahead = kv_offset + kv_length - (q_offset + q_length)  # keys after the last query
    if causal or window is not None:
        if not 0 <= ahead < kv_length or (ahead and not causal):
            return None
        n_keys -= ahead
    marks = [_marks(kind, values, batch_size, q_length) for kind, values in atoms]
    segments = [x for x in marks if x is not None]
    ends = None
    if segments:
        if (q_offset, kv_offset, q_length) != (0, 0, kv_length):
            return None
        starts = torch.zeros_like(segments[0], dtype=torch.bool)
        starts[:, 0] = True
        for x in segments:
            starts[:, 1:] |= x[:, 1:] != x[:, :-1]
        ends = starts.flatten().nonzero().flatten().int()
        ends = torch.cat([ends, ends.new_full((1,), starts.numel())])
    padding = attention_mask
    if padding is not None:
        missing = max(0, kv_length + kv_offset - padding.shape[-1])
        padding = torch.nn.functional.pad(padding.to(torch.bool), (0, missing))
        padding = padding[:, kv_offset : kv_offset + n_keys]
        if padding.device.type == "cpu" and bool(padding.all()):
            padding = None
    return Structure(causal, window, n_keys, padding, ends)


def _atoms(function: Any) -> list[tuple[str, dict[str, Any]]] | None:
    """The mask functions of transformers whose intersection it is; None if it is something else."""
    if getattr(function, "__module__", None) != _MODULE or not hasattr(function, "__code__"):
        return None
    cells = function.__closure__ or ()
    given = dict(zip(function.__code__.co_freevars, (x.cell_contents for x in cells), strict=True))
    kind = function.__qualname__.split(".")[0]
    if kind == "and_masks":
        found: list[tuple[str, dict[str, Any]]] = []
        for part in given["mask_functions"]:
            atoms = _atoms(part)
            if atoms is None:
                return None
            found += atoms
        return found
    if kind == "remap_positions_for_packed_sequence":
        inner = _atoms(given["mask_function"])
        positions = {"position_ids": given["position_ids"]}
        return inner and [(kind, {**values, **positions}) for kind, values in inner]
    simple = {
        "causal_mask_function": "causal",
        "bidirectional_mask_function": "all",
        "sliding_window_overlay": "behind",
        "sliding_window_bidirectional_overlay": "around",
        "chunked_overlay": "chunk",
        "packed_sequence_mask_function": "packed",
    }
    return [(simple[kind], given)] if kind in simple else None


def _kinds(function: Any) -> set[str]:
    return {kind for kind, _ in _atoms(function) or ()}


def _marks(kind: str, values: dict[str, Any], B: int, N: int) -> Tensor | None:
    """(B, N) numbers, equal inside a segment of tokens that see each other alone; or None."""
    if kind == "packed":
        ids: Tensor = values["packed_sequence_mask"]
        return ids.expand(B, -1)
    if kind != "chunk":
        return None
    left: Tensor = values["left_padding"].view(-1, 1)
    positions: Tensor = values.get("position_ids", torch.arange(N, device=left.device)[None])
    size: int = values["chunk_size"]
    return ((positions - left) // size).expand(B, -1)

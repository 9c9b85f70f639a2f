"""alpha-entmax attention for Hugging Face transformers: `pip install adasplash[transformers]`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared_kernels import checks

from . import _checks, _transformers_mask
from ._transformers_mask import MaskFunction
from .api import attention_stats
from .modules import AlphaParameter
from .sdpa import weighted

# What models hand to every attention function and what does not change its result: positions are
# in the mask that they also hand over, the rest is for other parts of the model.
_HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "deterministic",
        "inputs_embeds",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "target_dtype",
        "token_type_ids",
        "use_cache",
    }
)
# Pairs of a mask that are stored at a time: 4 MB.
_TILE_PAIRS = 1 << 22
_ALPHA_FILE = "entmax_alpha.safetensors"
_OWN_NAMES = ("eager", "sdpa", "flex_attention")
# What transformers reads in a name: continuous batching, a repository, flash attention.
_SPECIAL = ("|", "/", "flash")
_registered: set[str] = set()
# Each running `check_transformers` has a list here, of the modules that called the function.
_watching: list[list[nn.Module]] = []
# Each annealing that measures has a list here: of each call the keys with a weight and those seen.
measuring: list[list[tuple[float, float]]] = []


def register_transformers(name: str = "adasplash", alpha: float = 1.5) -> None:
    r"""Make ``attn_implementation=name`` mean attention with alpha-entmax weights.

    o = entmax_alpha(scaling q k^T + mask) v, in every model that goes through transformers'
    attention interface, with its masks, caches, dropout and grouped queries.

    A layer's own alpha goes before the one given here: set ``layer.self_attn.entmax_alpha`` to a
    number, a tensor or an :class:`AlphaParameter`, which is then trained and saved with the model.

    Masks take O(N) memory: padding, causality, sliding windows, chunks, packed sequences and static
    caches are options of the op; any other mask function is evaluated for a tile of queries at a
    time. While a graph is traced (``torch.compile``), masks but causal ones are stored.

    Position biases (T5), attention sinks (GPT-OSS), soft caps (Gemma 2) and the keys that
    DeepSeek V3.2 (``indices``) and MiniMax M3 (``block_indices``) select are honoured. An option
    that is not known and not None is refused by name. Continuous batching is not possible:
    transformers admits its own attention functions alone there, by name.

    **Some models never call the function.** BLOOM, MPT, MPNet and others take their mask from it
    and compute softmax attention of their own: they are refused when they ask for the mask, with
    NotImplementedError. :func:`check_transformers` says in one call whether a model calls it.

    Args:
        name: what to write as ``attn_implementation``.
        alpha: in [1, 2]; 1 is the model's own softmax attention.

    Raises:
        ImportError: transformers is not installed, or older than 5.23.
        ValueError: alpha outside [1, 2], or a name that transformers uses itself: one of its own,
            or one with "flash", "/" or "|" in it.

    Example (needs transformers)::

        register_transformers("entmax", alpha=1.5)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="entmax")

    Source: Goncalves, Treviso and Martins, AdaSplash, 2025 (arXiv 2502.12082).
    """
    if not isinstance(name, str):
        checks.fail("name", "be a str", type(name).__name__, error=TypeError)
    if isinstance(alpha, Tensor):
        checks.fail("alpha", "be a number", "a tensor", "set `entmax_alpha` of a layer", TypeError)
    _checks.alpha(alpha)
    from transformers import AttentionInterface, AttentionMaskInterface

    if not name or name in _OWN_NAMES or any(x in name for x in _SPECIAL):
        checks.fail(
            "name",
            "be a new name without '|', '/' and 'flash'",
            repr(name),
            "transformers has a use of its own for it, and looks for 'flash' on its hub",
        )
    AttentionInterface.register(name, _forward_with(alpha))
    AttentionMaskInterface.register(name, _transformers_mask.interface)
    _registered.add(name)


def _forward_with(default: float) -> Callable[..., tuple[Tensor, None]]:
    def entmax_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, H, N, D) heads -> (B, N, H, D); transformers applies the output projection."""
        for calls in _watching:
            calls.append(module)
        if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
            checks.fail(
                "cache",
                "not be that of continuous batching",
                "one",
                "transformers admits its own attention functions alone there: 'sdpa'",
                NotImplementedError,
            )
        positions = kwargs.get("position_ids")
        kwargs = {
            option: value
            for option, value in kwargs.items()
            if value is not None and value is not False and option not in _HARMLESS
        }
        bias = kwargs.pop("position_bias", None)
        selected = _selected(module, kwargs, query, key)
        options: dict[str, Any] = {
            "scale": scaling,
            "softcap": kwargs.pop("softcap", None),
            "s_aux": _sinks(query, kwargs),
        }
        window = kwargs.pop("sliding_window", None)
        if attention_mask is None or attention_mask.dim() == 2:
            options["window"] = None if _masks_hold_windows(module) else window
        ends = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None)
        for option in kwargs:
            checks.fail(
                option,
                "be None for entmax attention",
                "a value",
                "attn_implementation='eager' has what the model offers, with softmax",
                NotImplementedError,
            )
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        if ends[0] is not None:
            if ends[1] is not None and not torch.equal(ends[0], ends[1]):
                checks.fail("cu_seq_lens_k", "be cu_seq_lens_q without a mask", "other lengths")
            options["cu_seqlens"] = ends[0]
        elif is_causal and positions is not None:
            _refuse_forgotten_packing(positions, attention_mask, key.shape[2])
        alpha = getattr(module, "entmax_alpha", default)
        if isinstance(alpha, nn.Module):
            alpha = alpha()
        out = _masked(
            query, key, value, alpha, is_causal, dropout, attention_mask, selected, bias, options
        )
        return out.transpose(1, 2).contiguous(), None

    return entmax_attention_forward


def _refuse_forgotten_packing(positions: Tensor, mask: Tensor | None, N_k: int) -> None:
    """Positions that begin again where the mask does not: sequences that would see each other.

    transformers 5.24 makes the mask of packed sequences only without a cache and without an
    attention_mask.
    """
    if positions.dim() != 2 or positions.shape[1] < 2 or not checks.reads_values(positions):
        return
    if type(mask) is Tensor and mask.dim() != 2:  # a stored mask says which pairs it means
        return
    begins = positions[:, 1:] == 0
    seen: Tensor | None = mask
    if isinstance(mask, MaskFunction):
        structure = mask.structure() if mask.shape[3] == N_k else None
        if structure is None or not structure.is_causal or structure.ends is not None:
            return
        seen = structure.padding
    if seen is not None:
        seen = seen[:, -positions.shape[1] :].bool()
        if seen.shape[1] != positions.shape[1]:
            return
        begins = begins & seen[:, 1:] & seen[:, :-1]
    if bool(begins.any()):
        checks.fail(
            "position_ids",
            "begin once in each row unless the mask keeps packed sequences apart",
            "0 again behind a token that is seen",
            "call the model with use_cache=False and without an attention_mask, or give "
            "cu_seq_lens_q and cu_seq_lens_k",
        )


def _masks_hold_windows(module: nn.Module) -> bool:
    """Whether the model's masks are those of `register_transformers`, with windows in them.

    A function that comes from transformers' hub of kernels gets the masks of flash attention:
    padding or None, and the window beside them.
    """
    from transformers import AttentionMaskInterface

    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name in _registered:
        return True
    made_by = AttentionMaskInterface().get(name)
    return made_by is None or made_by is _transformers_mask.interface


def _sinks(query: Tensor, options: dict[str, Any]) -> Tensor | None:
    """(H,) scores of the sinks, taken out of the options."""
    names = [x for x in ("s_aux", "sinks") if x in options]
    if len(names) > 1:
        checks.fail("sinks", "not come with `s_aux`", "both")
    for name in names:
        sinks: Tensor = options.pop(name)
        if sinks.numel() != query.shape[1]:
            checks.fail(
                name,
                f"be one number for each of the {query.shape[1]} heads",
                tuple(sinks.shape),
                "attn_implementation='eager' takes others",
                NotImplementedError,
            )
        return sinks.reshape(-1)
    return None


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    is_causal: bool,
    dropout: float,
    mask: Tensor | None,
    selected: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention under a mask of transformers, of a function, stored or None."""
    if isinstance(mask, MaskFunction):
        structure = mask.structure() if mask.shape[3] == k.shape[2] else None
        packed = structure is not None and structure.ends is not None
        if structure is None or (
            packed and q.shape[0] > 1 and (bias is not None or selected is not None)
        ):
            return _by_tiles(q, k, v, alpha, dropout, mask, selected, bias, options)
        is_causal, n_keys = structure.is_causal, structure.n_keys
        options["window"] = structure.window
        k, v = k[:, :, :n_keys], v[:, :, :n_keys]
        bias, selected = (
            x if x is None or x.shape[-1] == 1 else x[..., :n_keys] for x in (bias, selected)
        )
        mask = None if structure.padding is None else structure.padding[:, None, None]
        if structure.ends is not None:
            options["cu_seqlens"] = structure.ends
    elif mask is not None and mask.dim() == 2:  # padding of a causal mask
        mask = mask[:, None, None]
    elif mask is not None:  # (B, 1 or H, N_q, N_k), causality included
        is_causal, mask = False, mask[..., : k.shape[2]]
        if mask.dtype != torch.bool:
            bias, mask = mask if bias is None else bias + mask, None
    if selected is not None:
        mask = selected if mask is None else selected & mask
    (B, _, N, _), packed = q.shape, options.get("cu_seqlens") is not None
    if not packed or B == 1:
        return _weighted(q, k, v, alpha, is_causal, dropout, mask=mask, bias=bias, **options)
    if bias is not None or (mask is not None and mask.shape[1:3] != (1, 1)):
        checks.fail(
            "cu_seq_lens_q",
            "come with batch size 1, where pairs have a mask or a bias",
            f"batch size {B}",
            error=NotImplementedError,
        )
    if mask is not None:
        mask = mask.expand(B, 1, 1, k.shape[2]).reshape(1, 1, 1, -1)
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))
    out = _weighted(q, k, v, alpha, is_causal, dropout, mask=mask, **options)
    sequences: Tensor = out[0].unflatten(1, (B, N))
    return sequences.transpose(0, 1)


def _weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    is_causal: bool,
    dropout: float,
    **options: Any,
) -> Tensor:
    for seen in measuring:
        q_k = q.detach(), k.detach()
        counts = (attention_stats(*q_k, a, is_causal, **options).support for a in (alpha, 1.0))
        with_weight, visible = (float(x.sum()) for x in counts)
        seen.append((with_weight, visible))
    return weighted(q, k, v, alpha, is_causal, dropout, **options)


def _by_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    dropout: float,
    mask: MaskFunction,
    selected: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention with a mask that is made for one tile of queries at a time, and made again."""
    N_q, N_k = q.shape[2], k.shape[2]
    ends, sequence = options.pop("cu_seqlens", None), None
    if ends is not None:
        at = torch.arange(N_k, device=q.device)
        sequence = torch.bucketize(at, ends[1:].to(at.dtype), right=True)

    def tile(first: int, stop: int) -> Tensor:
        def part(x: Tensor) -> Tensor:
            return x if x.shape[2] == 1 else x[:, :, first:stop]

        seen = mask.rows(first, stop)[..., :N_k]
        seen = seen if selected is None else seen & part(selected)
        if sequence is not None:
            seen = seen & (sequence[first:stop, None] == sequence)
        added = None if bias is None else part(bias)
        rows = q[:, :, first:stop]
        return _weighted(rows, k, v, alpha, False, dropout, mask=seen, bias=added, **options)

    step = max(1, _TILE_PAIRS // max(1, q.shape[0] * N_k))
    if step >= N_q:
        return tile(0, N_q)
    parts = []
    for first in range(0, N_q, step):
        stop = min(first + step, N_q)
        if torch.is_grad_enabled():
            parts.append(checkpoint(tile, first, stop, use_reentrant=False))
        else:
            parts.append(tile(first, stop))
    return torch.cat(parts, 2)


def _selected(
    module: nn.Module, options: dict[str, Any], query: Tensor, key: Tensor
) -> Tensor | None:
    """(B, 1 or H, N_q, N_k), True at the keys that a model selects for each query, or None.

    Taken out of the options: ``indices`` (B, N_q, n) are keys, ``block_indices`` (B, groups, N_q,
    n) are blocks of ``module.indexer.block_size`` keys for each group of heads. -1 is none.
    """
    keys, blocks = options.pop("indices", None), options.pop("block_indices", None)
    if keys is not None and blocks is not None:
        checks.fail("indices", "not come with `block_indices`", "both")
    if keys is None and blocks is None:
        return None
    indexer: Any = getattr(module, "indexer", None)
    size = 1 if blocks is None else int(indexer.block_size)
    chosen = (keys[:, None] if blocks is None else blocks).long()
    n = -(-key.shape[2] // size)
    seen = torch.zeros(*chosen.shape[:3], n + 1, dtype=torch.bool, device=query.device)
    seen = seen.scatter(-1, chosen.masked_fill(chosen < 0, n), True)[..., :n]
    seen = seen.repeat_interleave(size, -1)[..., : key.shape[2]]
    repeats = 1 if seen.shape[1] == 1 else query.shape[1] // seen.shape[1]
    return seen.repeat_interleave(repeats, 1)


class TransformersCheck(NamedTuple):
    """What :func:`check_transformers` saw.

    Attributes:
        called: names of the modules that called the registered function.
        future_leaks: whether the first token's result changes with the second token, as it must
            not in a model that generates; in an encoder it does.
    """

    called: tuple[str, ...]
    future_leaks: bool

    def __str__(self) -> str:
        first = (
            f"{len(self.called)} modules call the function"
            if self.called
            else "the model never calls the function: its attention is its own"
        )
        return (
            f"{first}; the first token {'sees' if self.future_leaks else 'does not see'} the next"
        )


@torch.no_grad()
def check_transformers(model: nn.Module, **inputs: Any) -> TransformersCheck:
    """Whether a model really uses the registered function, seen by running two tokens twice.

    Args:
        model: a model of transformers, built with ``attn_implementation=name`` for a name given to
            :func:`register_transformers`.
        inputs: what else its forward pass needs.

    Returns:
        :class:`TransformersCheck`. Of a model that generates, ``called`` must not be empty and
        ``future_leaks`` must be False.

    Raises:
        ValueError: the model's attention is not a registered one, or its input is no text.

    Example (needs transformers)::

        print(check_transformers(model))
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_attn_implementation", None)
    if name not in _registered:
        checks.fail("model", "have a registered attn_implementation", repr(name))
    main_input = getattr(model, "main_input_name", "input_ids")
    if main_input != "input_ids":
        checks.fail("model", "take input_ids", repr(main_input))
    n, like = int(config.get_text_config().vocab_size), next(model.parameters())
    first, second, other = n // 2, n // 3, n // 4
    varied = "decoder_input_ids" if getattr(config, "is_encoder_decoder", False) else "input_ids"
    calls: list[nn.Module] = []
    results = []
    was_training = model.training
    model.eval()
    _watching.append(calls)
    try:
        for last in (second, other):
            ids = torch.tensor([[first, last]], device=like.device)
            out = model(**{"input_ids": torch.full_like(ids, first), varied: ids, **inputs})
            logits = out.logits if hasattr(out, "logits") else out[0]
            results.append(logits[:, 0].float())
    finally:
        _watching.remove(calls)
        model.train(was_training)
    one, two = results
    rounding = 16 * torch.finfo(like.dtype).eps * one.abs().max()
    names = {module: name for name, module in model.named_modules()}
    called = dict.fromkeys(names.get(module, type(module).__name__) for module in calls)
    return TransformersCheck(tuple(called), bool((one - two).abs().max() > rounding))


def save_entmax_alpha(model: nn.Module, folder: str | Path) -> Path:
    """Write every ``entmax_alpha`` of a model into a folder, beside what ``save_pretrained`` wrote.

    ``from_pretrained`` makes only what the configuration names, so that it drops them:
    :func:`load_entmax_alpha` puts them back.

    Args:
        model: a model in whose layers ``entmax_alpha`` was set.
        folder: where the file ``entmax_alpha.safetensors`` goes; made if it is not there.

    Returns:
        the path of the file.

    Raises:
        ValueError: no module of the model has an ``entmax_alpha``.
        TypeError: one is a module other than :class:`AlphaParameter`.

    Example (needs transformers)::

        model.save_pretrained(folder)
        save_entmax_alpha(model, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="entmax")
        load_entmax_alpha(model, folder)
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    kinds: dict[str, dict[str, float | bool]] = {}
    for name, module in model.named_modules():
        alpha = getattr(module, "entmax_alpha", None)
        if alpha is None:
            continue
        if isinstance(alpha, AlphaParameter):
            kinds[name] = {"low": alpha.low, "high": alpha.high, "scalar": alpha.is_scalar}
            alpha = alpha.raw
        elif isinstance(alpha, nn.Module):
            checks.fail(
                f"{name}.entmax_alpha",
                "be a number, a tensor or an AlphaParameter",
                type(alpha).__name__,
                "save the state_dict of other modules",
                TypeError,
            )
        else:
            is_number = not isinstance(alpha, Tensor)
            kinds[name] = {"number": is_number, "learned": isinstance(alpha, nn.Parameter)}
            alpha = torch.tensor(alpha, dtype=torch.float64) if is_number else alpha
        tensors[name] = alpha.detach().cpu().clone()
    if not tensors:
        checks.fail("model", "have a module with an `entmax_alpha`", "none")
    path = Path(folder) / _ALPHA_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"entmax_alpha": json.dumps(kinds)})
    return path


def load_entmax_alpha(model: nn.Module, folder: str | Path) -> None:
    """Set every ``entmax_alpha`` of a model as :func:`save_entmax_alpha` wrote it.

    Args:
        model: a model of the same configuration, on whose devices the values go.
        folder: where the file ``entmax_alpha.safetensors`` is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model lacks a module that the file names.

    Example (needs transformers)::

        load_entmax_alpha(model, folder)
    """
    from safetensors import safe_open

    path = Path(folder) / _ALPHA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; save_entmax_alpha(model, folder) writes it"
        )
    modules = dict(model.named_modules())
    with safe_open(path, "pt") as file:
        kinds = json.loads(file.metadata()["entmax_alpha"])
        missing = sorted(set(kinds) - set(modules))
        if missing:
            checks.fail("model", "have the modules of the file", f"no {', '.join(missing)}")
        for name, kind in kinds.items():
            module, alpha = modules[name], file.get_tensor(name)
            device = next((p.device for p in module.parameters()), alpha.device)
            alpha = alpha.to(device)
            if "low" in kind:
                raw, n = alpha, None if kind["scalar"] else alpha.numel()
                middle = (kind["low"] + kind["high"]) / 2
                alpha = AlphaParameter(n, middle, kind["low"], kind["high"])
                alpha.raw = nn.Parameter(raw)
            elif kind["number"]:
                alpha = alpha.item()
            elif kind["learned"]:
                alpha = nn.Parameter(alpha)
            if hasattr(module, "entmax_alpha"):  # a parameter takes no number in its place
                del module.entmax_alpha
            module.entmax_alpha = alpha

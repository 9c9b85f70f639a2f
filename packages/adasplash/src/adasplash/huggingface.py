"""alpha-entmax attention for Hugging Face transformers: `pip install adasplash[transformers]`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks
from .modules import AlphaParameter
from .sdpa import weighted

# What models hand to every attention function and what does not change its result: positions and
# windows are in the mask that they also hand over, the rest is for other parts of the model.
_HARMLESS = frozenset({
    "cache_position", "deterministic", "inputs_embeds", "logits_to_keep", "max_length_k",
    "max_length_q", "mm_token_type_ids", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "seq_idx", "sliding_window", "target_dtype", "token_type_ids", "use_cache",
})  # fmt: skip
_ALPHA_FILE = "entmax_alpha.safetensors"
_OWN_NAMES = ("eager", "sdpa", "flex_attention")
_registered: set[str] = set()
# Each running `check_transformers` has a list here, of the modules that called the function.
_watching: list[list[nn.Module]] = []


def register_transformers(name: str = "adasplash", alpha: float = 1.5) -> None:
    r"""Make ``attn_implementation=name`` mean attention with alpha-entmax weights.

    o = entmax_alpha(scaling q k^T + mask) v, in every model that goes through transformers'
    attention interface, with its masks, caches, dropout and grouped queries.

    A layer's own alpha goes before the one given here: set ``layer.self_attn.entmax_alpha`` to a
    number, a tensor or an :class:`AlphaParameter`, which is then trained and saved with the model.

    Padding and causality take O(N) memory. Masks of other shapes (sliding windows, chunks, packed
    sequences, static caches) come from transformers as one byte per pair.

    The position biases of T5 and the keys that DeepSeek V3.2 (``indices``) and MiniMax M3
    (``block_indices``) select are honoured. An option that is not known and not None is refused by
    name.

    **Some models never call the function.** BLOOM and others (34 files of transformers 5.23) accept
    the name, build their mask for it and compute softmax attention of their own, which then may
    lose its causality. :func:`check_transformers` says so in one call.

    Args:
        name: what to write as ``attn_implementation``.
        alpha: in [1, 2]; 1 is the model's own softmax attention.

    Raises:
        ImportError: transformers is not installed, or older than 5.23.
        ValueError: alpha outside [1, 2], or a name that transformers uses itself.

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

    taken = name in _OWN_NAMES or name.startswith("flash_attention")
    if not name or taken or "|" in name or "/" in name:
        checks.fail("name", "be a new name without '|' and '/'", repr(name))
    AttentionInterface.register(name, _forward_with(alpha))
    AttentionMaskInterface.register(name, _mask)
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
        kwargs = {
            option: value
            for option, value in kwargs.items()
            if value is not None and value is not False and option not in _HARMLESS
        }
        position_bias = kwargs.pop("position_bias", None)
        selected = _selected(module, kwargs, query, key)
        ends = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None)
        for option in kwargs:
            checks.fail(
                option, "be None for entmax attention", "a value",
                "attn_implementation='eager' has what the model offers, with softmax",
                NotImplementedError,
            )  # fmt: skip
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        options: dict[str, Any] = {"scale": scaling}
        if attention_mask is None or attention_mask.dim() == 2:  # from `_mask`
            if attention_mask is not None:
                options["mask"] = attention_mask[:, None, None]
        else:  # (B, 1 or H, N_q, N_k), causality included
            is_causal = False
            name = "mask" if attention_mask.dtype == torch.bool else "bias"
            options[name] = attention_mask[..., : key.shape[2]]
        if attention_mask is None and ends[0] is not None:
            if ends[1] is not None and not torch.equal(ends[0], ends[1]):
                checks.fail("cu_seq_lens_k", "be cu_seq_lens_q without a mask", "other lengths")
            options["cu_seqlens"] = ends[0]
        if selected is not None:
            options["mask"] = selected & options["mask"] if "mask" in options else selected
        if position_bias is not None:
            options["bias"] = position_bias + options.get("bias", 0.0)
        alpha = getattr(module, "entmax_alpha", default)
        if isinstance(alpha, nn.Module):
            alpha = alpha()
        out = weighted(query, key, value, alpha, is_causal, dropout, **options)
        return out.transpose(1, 2).contiguous(), None

    return entmax_attention_forward


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
                f"{name}.entmax_alpha", "be a number, a tensor or an AlphaParameter",
                type(alpha).__name__, "save the state_dict of other modules", TypeError,
            )  # fmt: skip
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


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """None or the (B, N_k) padding where the mask is plainly causal and ends with the keys,
    (B, 1, 1, N_k) where it looks both ways; the whole (B, 1, N_q, N_k) otherwise.
    """
    from transformers import masking_utils

    bare = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    causal, both_ways = (mask_function is function for function in bare)
    ends_together = all(isinstance(x, int) for x in (q_offset, kv_offset)) and (
        q_offset + q_length == kv_offset + kv_length
    )
    if attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length):
        padding = None if attention_mask is None else attention_mask.to(torch.bool)
        if causal and allow_is_causal_skip and ends_together and kv_offset == 0:
            return padding
        if both_ways and allow_is_bidirectional_skip:
            return None if padding is None else padding[:, None, None]
    mask: Tensor | None = masking_utils.sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs,
    )  # fmt: skip
    return mask

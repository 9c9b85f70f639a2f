"""alpha-entmax attention for Hugging Face transformers: `pip install adasplash[transformers]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks
from .sdpa import weighted


def register_transformers(name: str = "adasplash", alpha: float = 1.5) -> None:
    r"""Make ``attn_implementation=name`` mean attention with alpha-entmax weights.

    o = entmax_alpha(scaling q k^T + mask) v, in every model that goes through transformers'
    attention interface, with its masks, caches, dropout and grouped queries.

    A layer's own alpha goes before the one given here: set ``layer.self_attn.entmax_alpha`` to a
    number, a tensor or an :class:`AlphaParameter`, which is then trained and saved with the model.

    Padding and causality take O(N) memory. Masks of other shapes (sliding windows, chunks, packed
    sequences, static caches) come from transformers as one byte per pair.

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


_OWN_NAMES = ("eager", "sdpa", "flex_attention")


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
        for option in ("softcap", "s_aux", "position_bias", "cache", "output_attentions"):
            if kwargs.get(option) is not None and kwargs[option] is not False:
                checks.fail(
                    option, "be None for entmax attention", "a value",
                    "attn_implementation='eager' has it, with softmax", NotImplementedError,
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
        alpha = getattr(module, "entmax_alpha", default)
        if isinstance(alpha, nn.Module):
            alpha = alpha()
        out = weighted(query, key, value, alpha, is_causal, dropout, **options)
        return out.transpose(1, 2).contiguous(), None

    return entmax_attention_forward


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
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

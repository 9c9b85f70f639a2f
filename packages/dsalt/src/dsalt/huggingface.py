# mypy: disable-error-code="union-attr,override,operator,assignment,index"
"""The language model as a model of Hugging Face: ``pip install dsalt[huggingface]``.

Importing this module registers :class:`DSALTConfig` and :class:`DSALTForCausalLM` with AutoConfig
and AutoModelForCausalLM. Folders are shared: what ``DSALTLMHeadModel.save_pretrained`` or a
checkpoint of the trainer wrote is loaded here, and the other way round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared_kernels import checks

from .model import DSALTLMHeadModel
from .modules import AttentionCache, WindowSizePredictor

try:
    from huggingface_hub.dataclasses import strict
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        DynamicCache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "dsalt.huggingface needs transformers: pip install dsalt[huggingface]"
    ) from error

__all__ = ["DSALTConfig", "DSALTForCausalLM"]

# What generate and trainers pass and this model does not need.
HARMLESS = {"cache_position", "token_type_ids"}


@strict
class DSALTConfig(PreTrainedConfig):
    """The arguments of :class:`dsalt.DSALTLMHeadModel` as a configuration of Hugging Face.

    Example:
        >>> DSALTConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2).num_hidden_layers
        1
    """

    model_type = "dsalt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 50257
    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    n_min: int | float = 32
    n_max: int | float = 256
    k_lmk: int = 16
    norm_eps: float = 1e-6
    dropout: int | float = 0.1
    bias: bool = False
    n_kv_heads: int | None = None
    window_ramp: int | float = 8.0
    landmark_block: int = 32
    landmark_mode: str = "block_causal"
    n_sink: int = 0
    rope_base: int | float | None = 10000.0
    rope_factor: int | float = 1.0
    rope_length: int | None = None
    alpha: float = 0.6
    d_ff: int | None = None
    max_seq_len: int | None = None
    tie_embeddings: bool = False
    window_reg: str = "entropy"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of :class:`dsalt.DSALTLMHeadModel`."""
        return {name: getattr(self, name) for name in DSALTLMHeadModel.arguments()}


class _Layer(CacheLayerMixin):
    """One layer's :class:`AttentionCache` in a cache of Hugging Face."""

    def __init__(self, state: AttentionCache) -> None:
        super().__init__()
        self.state, self.is_initialized = state, True
        self.keys, self.values = state.keys, state.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a cache of dsalt is filled by its model")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a cache of dsalt is filled by its model")

    def get_seq_length(self) -> int:
        return self.state.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.length + query_length, 0

    def reset(self) -> None:
        raise NotImplementedError("begin with a new cache instead")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.__init__(self.state.rows(beam_idx))  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.__init__(self.state.rows(indices))  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.keys.shape[0], device=self.keys.device)
        self.__init__(self.state.rows(rows.repeat_interleave(repeats)))  # type: ignore[misc]


class DSALTForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`dsalt.DSALTLMHeadModel` as Hugging Face's tools expect a causal language model.

    Labels are the inputs themselves, as for every model there: they are moved by one here.

    Example:
        >>> model = DSALTForCausalLM(DSALTConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2))
        >>> ids = torch.randint(0, 32, (1, 5))
        >>> model(ids, labels=ids).logits.shape
        torch.Size([1, 5, 32])
    """

    config_class = DSALTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DSALTBlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: DSALTConfig) -> None:
        super().__init__(config)
        made = DSALTLMHeadModel(**config.arguments())
        self.embedding, self.dropout = made.embedding, made.dropout
        self.transformer, self.lm_head = made.transformer, made.lm_head
        self.post_init()

    @property
    def base_model(self) -> _Body:
        """The model without its head; the modules of both stand side by side, as in our files."""
        return _Body(self)

    def _init_weights(self, module: nn.Module) -> None:
        windows = [m.proj for m in self.modules() if isinstance(m, WindowSizePredictor)]
        if any(module is proj for proj in windows):
            return  # drawn by its WindowSizePredictor
        if module is self.embedding or module is self.lm_head:
            nn.init.normal_(module.weight, std=0.02)  # type: ignore[arg-type]
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _set_gradient_checkpointing(self, enable: bool = True, **_: Any) -> None:
        self.transformer.gradient_checkpointing = enable

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, the loss with labels, and the cache.

        Args:
            input_ids: (B, N), or inputs_embeds (B, N, d).
            attention_mask: (B, past + N), nonzero where there is a token, padding on either side.
            past_key_values: a ``DynamicCache``, empty or from an earlier call.
            labels: (B, N), the inputs themselves; −100 is ignored.
            use_cache: also return the cache.
            logits_to_keep: logits of the last so many tokens, or of these places; 0: of all.
            return_dict: False gives a tuple.
            cache: ``past_key_values`` by its name since transformers 5.24.
            kwargs: ``num_items_in_batch`` for the loss. What would change the result and is not
                known is refused by name.
        """
        items = {n: kwargs.pop(n) for n in ("num_items_in_batch",) if n in kwargs}
        past = _one_of(past_key_values, cache)
        kept, past, mask = self._hidden(
            input_ids, attention_mask, past, inputs_embeds, use_cache, **kwargs
        )
        if isinstance(logits_to_keep, Tensor):
            kept = kept[:, logits_to_keep]
        elif logits_to_keep:
            kept = kept[:, -logits_to_keep:]
        logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            if mask is not None:
                labels = labels.masked_fill(mask == 0, -100)
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **items)
        out = CausalLMOutputWithPast(loss, logits, past)  # type: ignore[arg-type]
        return out if return_dict is None or return_dict else out.to_tuple()

    def _hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Cache | None, Tensor | None]:
        """Hidden states, the cache after them, and the mask of the new tokens if it is used."""
        unknown = [n for n, x in kwargs.items() if n not in HARMLESS and x not in (None, False)]
        if unknown:
            checks.fail("kwargs", "be known to dsalt", ", ".join(unknown), error=TypeError)
        if (input_ids is None) == (inputs_embeds is None):
            checks.fail("input_ids", "be given, or inputs_embeds", "both or none")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        past = _states(past_key_values)
        seen = 0 if past is None else past[0].length
        mask = attention_mask
        if mask is not None:
            checks.shape("attention_mask", mask, (x.shape[0], seen + x.shape[1]), "(B, past + N)")
        cu_seqlens = _sequences(position_ids, mask, seen, x)
        if mask is not None:
            mask = mask[:, seen:]
            # a cache knows where its rows end; whole rows need no mask
            if checks.reads_values(mask) and bool((mask != 0).all()):
                mask = None
        body = self.transformer(
            self.dropout(x),
            attention_mask=mask,
            cu_seqlens=cu_seqlens,
            past_key_values=past,
            use_cache=use_cache,
            return_windows=True,
        )
        if use_cache:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            past_key_values.layers = [_Layer(state) for state in body.past_key_values]
        kept = past_key_values if use_cache else None
        return body.hidden, kept, mask


class _Body:
    """The base model of a :class:`DSALTForCausalLM`: hidden states instead of logits."""

    def __init__(self, model: DSALTForCausalLM) -> None:
        self.model = model

    def __call__(self, *args: Any, cache: Cache | None = None, **kwargs: Any) -> Any:
        kwargs.pop("return_dict", None)
        if cache is not None:
            kwargs["past_key_values"] = _one_of(kwargs.get("past_key_values"), cache)
        hidden, past, _ = self.model._hidden(*args, **kwargs)
        return BaseModelOutputWithPast(hidden, past)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _sequences(
    position_ids: Tensor | None, mask: Tensor | None, seen: int, x: Tensor
) -> Tensor | None:
    """cu_seqlens where positions begin anew inside a row; other positions than the mask's fail."""
    if position_ids is None or not checks.reads_values(position_ids) or x.shape[1] == 0:
        return None
    there = x.new_ones(x.shape[0], seen + x.shape[1]) if mask is None else mask
    there = there != 0
    counted = (there.cumsum(-1) - 1)[:, seen:]
    found = position_ids.expand(x.shape[:2])
    if bool(((found == counted) | (there[:, seen:] == 0)).all()):
        return None
    starts = (found[0] == 0).nonzero().flatten()
    packed = x.shape[0] == 1 and seen == 0 and bool(there.all()) and bool(found[0, 0] == 0)
    if packed:
        token = torch.arange(x.shape[1], device=x.device)
        before = torch.searchsorted(starts, token, right=True) - 1
        packed = bool((token - starts[before] == found[0]).all())
    if not packed:
        needs = "count the tokens of each row, or begin anew with each sequence packed in one row"
        checks.fail("position_ids", needs, position_ids.tolist())
    return torch.cat((starts, starts.new_tensor([x.shape[1]]))).to(torch.int32)


def _one_of(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, by its name before transformers 5.24 or by the one since."""
    if past_key_values is not None and cache is not None:
        checks.fail("cache", "not come with `past_key_values`, its older name", "both")
    return past_key_values if cache is None else cache


def _states(cache: Cache | None) -> list[AttentionCache] | None:
    """What the layers remember; None for an empty cache."""
    if cache is None:
        return None
    layers = list(cache.layers)
    if not any(layer.is_initialized for layer in layers) and type(cache) is DynamicCache:
        return None
    if not layers or not all(isinstance(layer, _Layer) for layer in layers):
        got = type(cache).__name__
        checks.fail("past_key_values", "be a DynamicCache that this model filled", got)
    return [layer.state for layer in layers]


AutoConfig.register("dsalt", DSALTConfig, exist_ok=True)
AutoModelForCausalLM.register(DSALTConfig, DSALTForCausalLM, exist_ok=True)

"""The language model: embedding, DSALT body, head; loss, generation, saving and loading."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shared_kernels import checks

from . import _distributed
from ._files import CONFIG_NAME, WEIGHTS_NAME, load_weights, read_config, save_weights
from ._version import __version__
from .modules import DSALTTransformer, window_regulariser

__all__ = ["DSALTLMHeadModel", "LMOutput"]

IGNORE_INDEX = -100


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class LMOutput:
    """What the language model returns: one object for three styles of use.

    Without labels it behaves as its logits: ``out.shape``, ``out[:, -1]``, ``out.argmax(-1)``.
    With labels it unpacks: ``loss, logits = model(ids, labels=labels)``. Always: ``out.logits``,
    ``out.loss`` (None without labels), ``out.window_sizes`` (one (B, H, N) tensor per layer),
    ``out.window_reg`` (scalar; None when no layer has windows) and ``out.past_key_values`` (None
    unless ``use_cache=True``).
    """

    logits: Tensor
    loss: Tensor | None = None
    window_sizes: Any = None
    window_reg: Tensor | None = None
    past_key_values: Any = None

    def _sequence(self) -> Any:
        return self.logits if self.loss is None else (self.loss, self.logits)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._sequence())

    def __len__(self) -> int:
        return len(self._sequence())

    def __getitem__(self, index: Any) -> Tensor:
        return self._sequence()[_logits_of(index)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _FIELDS:
            raise AttributeError(name)
        if self.loss is not None:
            raise AttributeError(
                f"LMOutput with a loss has no attribute {name!r}: it stands for (loss, logits); "
                f"use .loss or .logits"
            )
        return getattr(self.logits, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return func(*_logits_of(args), **_logits_of(kwargs or {}))

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss={self.loss.detach().item():.4f}"
        return f"LMOutput(logits={tuple(self.logits.shape)}{loss})"

    __hash__ = object.__hash__


_FIELDS = tuple(field.name for field in dataclasses.fields(LMOutput))


def _logits_of(tree: Any) -> Any:
    """The tree with every LMOutput replaced by its logits."""

    def one(x: Any) -> Any:
        return x.logits if isinstance(x, LMOutput) else x

    return pytree.tree_map(one, tree, is_leaf=lambda x: isinstance(x, LMOutput))


def _operator(name: str) -> Any:
    def method(self: LMOutput, *args: Any) -> Any:
        if self.loss is not None and name in ("__eq__", "__ne__"):
            return NotImplemented
        return getattr(self.logits, name)(*_logits_of(args))

    method.__name__ = name
    return method


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv matmul rmatmul pow neg abs lt le gt ge eq ne"
).split():
    setattr(LMOutput, f"__{_name}__", _operator(f"__{_name}__"))

# Sharding and compilers look for the tensors inside an output: tell them where they are.
pytree.register_pytree_node(
    LMOutput,
    lambda out: ([getattr(out, name) for name in _FIELDS], None),
    lambda values, _: LMOutput(**dict(zip(_FIELDS, values, strict=True))),
    serialized_type_name="dsalt.model.LMOutput",
)


class DSALTLMHeadModel(nn.Module):
    """A causal language model on window + landmark attention.

    logits = head(body(embedding(ids))); loss = mean of −log softmax(logits)[label].

    Args:
        vocab_size: number of token ids.
        d_model: width of the hidden states.
        n_layers: number of blocks.
        n_heads: query heads per block.
        n_min, n_max: smallest and largest window, in tokens.
        k_lmk: landmarks per head.
        norm_eps: epsilon of the RMSNorms.
        dropout: on attention and feed-forward outputs and on the embedding, in training only.
        bias: biases in the linear layers of the body.
        n_kv_heads: key/value heads (grouped-query attention); None: as many as query heads.
        window_ramp: width R of the soft edge of a window, in tokens.
        landmark_block: landmarks are refreshed every so many tokens; part of the model's meaning.
        landmark_mode: "block_causal" (no future token has any influence) or "global" (not causal).
        n_sink: the first tokens that are always landmarks.
        rope_base: base of the rotary position embedding.
        tie_embeddings: the head uses the embedding matrix.
        window_reg: kind of the window regulariser, "entropy" or "length".
        gradient_checkpointing: recompute each block in the backward pass instead of storing it.

    Example:
        >>> model = DSALTLMHeadModel(32, 16, 1, 2, n_min=2, n_max=4, k_lmk=2)
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 32])
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        n_min: int,
        n_max: int,
        k_lmk: int,
        norm_eps: float = 1e-6,
        dropout: float = 0.1,
        bias: bool = False,
        *,
        n_kv_heads: int | None = None,
        window_ramp: float = 8.0,
        landmark_block: int = 32,
        landmark_mode: str = "block_causal",
        n_sink: int = 0,
        rope_base: float = 10000.0,
        tie_embeddings: bool = False,
        window_reg: str = "entropy",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        checks.positive_int("vocab_size", vocab_size)
        checks.in_set("window_reg", window_reg, ("entropy", "length"))
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_min": n_min,
            "n_max": n_max,
            "k_lmk": k_lmk,
            "norm_eps": norm_eps,
            "dropout": dropout,
            "bias": bias,
            "n_kv_heads": n_kv_heads,
            "window_ramp": window_ramp,
            "landmark_block": landmark_block,
            "landmark_mode": landmark_mode,
            "n_sink": n_sink,
            "rope_base": rope_base,
            "tie_embeddings": tie_embeddings,
            "window_reg": window_reg,
        }
        # numbers of numpy become Python's, so that the file can hold them
        self.config = {
            n: x.item() if isinstance(x, np.generic) else x for n, x in self.config.items()
        }
        self.vocab_size = vocab_size
        self.tie_embeddings = tie_embeddings
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.transformer = DSALTTransformer(
            d_model,
            n_heads,
            n_layers,
            n_min,
            n_max,
            k_lmk,
            norm_eps=norm_eps,
            dropout=dropout,
            bias=bias,
            gradient_checkpointing=gradient_checkpointing,
            n_kv_heads=n_kv_heads,
            window_ramp=window_ramp,
            landmark_block=landmark_block,
            landmark_mode=landmark_mode,
            n_sink=n_sink,
            rope_base=rope_base,
        )
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.reset_parameters()
        if k_lmk == 0:
            # nothing is chosen, so nothing could train the scores
            for name, parameter in self.named_parameters():
                if ".scorer." in name:
                    parameter.requires_grad_(False)
        if tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Draw the embedding and the head again, as at construction."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        shift_labels: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Logits for every position, and the loss when labels are given.

        Args:
            input_ids: (B, N) integer token ids.
            labels: (B, N) integer; −100 is ignored. Aligned with the logits: ``logits[:, t]``
                should predict ``labels[:, t]``.
            attention_mask: (B, N), True or 1 where there is a token; padding is neither attended
                nor counted in the loss.
            cu_seqlens: (S+1,) boundaries of packed sequences, with B = 1.
            past_key_values: the cache of an earlier call with ``use_cache=True``.
            use_cache: return a cache in ``past_key_values``.
            shift_labels: labels are the inputs themselves; position t is scored against t + 1.
            return_dict: False gives plain tensors: logits, or (loss, logits) with labels.

        Returns:
            LMOutput with logits (B, N, vocab_size).

        Raises:
            ValueError: ids or labels of a wrong shape or, on the CPU, outside the vocabulary.
        """
        self._check_ids("input_ids", input_ids)
        body = self.transformer(
            self.dropout(self.embedding(input_ids)),
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_windows=True,
        )
        logits = self.lm_head(body.hidden)
        loss = None
        if labels is not None:
            self._check_labels(labels, input_ids)
            loss = _cross_entropy(logits, labels, attention_mask, cu_seqlens, shift_labels)
        if not return_dict:
            return logits if loss is None else (loss, logits)
        reg = None
        if body.windows:
            kind = self.config["window_reg"]
            reg = window_regulariser(body.windows, self.config["n_min"], self.config["n_max"], kind)
        return LMOutput(logits, loss, body.windows, reg, body.past_key_values)

    def _check_ids(self, name: str, ids: Tensor) -> None:
        checks.integer(name, ids)
        checks.shape(name, ids, (None, None), "(B, N)")
        if checks.reads_values(ids) and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                got = low if low < 0 else high
                checks.fail(
                    name, f"lie in [0, {self.vocab_size})", got, "`vocab_size` bounds the ids"
                )

    def _check_labels(self, labels: Tensor, input_ids: Tensor) -> None:
        checks.integer("labels", labels)
        if labels.shape != input_ids.shape:
            checks.fail(
                "labels", f"have the shape of `input_ids` {tuple(input_ids.shape)}", labels.shape
            )
        if checks.reads_values(labels) and labels.numel():
            bad = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= self.vocab_size)
            if bool(bad.any()):
                got = int(labels[bad][0])
                checks.fail("labels", f"be {IGNORE_INDEX} or lie in [0, {self.vocab_size})", got)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        *,
        min_new_tokens: int = 0,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue each prompt: next ~ softmax(logits / temperature), cut to top_k and top_p.

        Rows of different lengths (``attention_mask``, padding on either side) are decoded together,
        their padding is never seen: a row in a batch continues as it does alone. Where ranks share
        the weights (FSDP) all must call it, with prompts of their own; the last to end ends all.

        Args:
            input_ids: (B, N) prompts, N ≥ 1.
            max_new_tokens: how many tokens to add at most.
            temperature: 0 is greedy (the largest logit).
            top_k: sample among the k largest logits only; more than there are is all of them.
            top_p: sample among the fewest tokens whose probabilities reach p; always at least one.
            min_new_tokens: no row ends before it has so many.
            eos_token_id: a row ends with this token; the rest is filled with ``pad_token_id``.
            pad_token_id: default ``eos_token_id``, else 0.
            attention_mask: (B, N), True or 1 where the prompt has a token.
            generator: random numbers come from it.
            use_cache: False recomputes the whole sequence for each token: slow, the same tokens.
                Not so with ``landmark_mode="global"``: a cache keeps the landmarks of the prompt,
                without one they are chosen anew from all tokens so far.

        Returns:
            (B, N + n) ids: the prompts as given, then n ≤ max_new_tokens new tokens.
        """
        self._check_ids("input_ids", input_ids)
        if input_ids.shape[1] < 1:
            checks.fail("input_ids", "hold at least one token per row", tuple(input_ids.shape))
        if max_new_tokens < 0:
            checks.fail("max_new_tokens", "be at least 0", max_new_tokens)
        if not 0 <= min_new_tokens <= max_new_tokens:
            needs = f"be in [0, max_new_tokens = {max_new_tokens}]"
            checks.fail("min_new_tokens", needs, min_new_tokens)
        if eos_token_id is not None and not 0 <= eos_token_id < self.vocab_size:
            checks.fail("eos_token_id", f"lie in [0, {self.vocab_size})", eos_token_id)
        if not temperature >= 0.0:
            checks.fail("temperature", "be at least 0", temperature, "0 is greedy")
        if top_k is not None and top_k < 1:
            checks.fail("top_k", "be at least 1", top_k)
        if top_p is not None and not 0.0 < top_p <= 1.0:
            checks.fail("top_p", "be in (0, 1]", top_p)
        B = input_ids.shape[0]
        pad = pad_token_id if pad_token_id is not None else eos_token_id
        pad = 0 if pad is None else pad
        mask = None
        if attention_mask is not None:
            checks.shape("attention_mask", attention_mask, tuple(input_ids.shape), "(B, N)")
            mask = attention_mask.to(input_ids.device).bool()
            if not bool(mask.any(1).all()):
                checks.fail(
                    "attention_mask", "leave at least one token in every row", "an empty row"
                )
        new = input_ids.new_full((B, max_new_tokens), pad)
        ends = (eos_token_id, pad, min_new_tokens)
        was_training = self.training
        self.eval()
        try:
            tokens = self._decode(
                input_ids, mask, max_new_tokens, (temperature, top_k, top_p), ends, generator,
                use_cache,
            )  # fmt: skip
            for t, token in enumerate(tokens):
                new[:, t] = token
        finally:
            self.train(was_training)
        if eos_token_id is not None and max_new_tokens:
            after = (new == eos_token_id).cumsum(1) - (new == eos_token_id).long() > 0
            used = int((~after).sum(1).max()) if B else 0
            new = new[:, :used]
        return torch.cat([input_ids, new], dim=1)

    def _decode(
        self,
        ids: Tensor,
        mask: Tensor | None,
        n: int,
        how: tuple[float, int | None, float | None],
        ends: tuple[int | None, int, int],
        generator: torch.Generator | None,
        use_cache: bool,
    ) -> Iterator[Tensor]:
        """Yield the next token (B,) up to n times, until every row has ended."""
        (eos, pad, shortest), cache, step = ends, None, ids
        mesh = _distributed.shard_mesh(self)
        ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        rows = torch.arange(ids.shape[0], device=ids.device)
        last: Any = -1
        if mask is not None:  # where each row's prompt ends
            last = (torch.arange(ids.shape[1], device=ids.device) * mask).amax(1)
        for t in itertools.count():
            wanted = t < n and not (eos is not None and bool(ended.all()))
            if not _distributed.anywhere(wanted, mesh):
                return
            if not wanted:  # another rank goes on, and parts of its weights are here
                self.transformer(self.embedding(ids.new_zeros(1, 1)))
                continue
            body = self.transformer(
                self.embedding(step),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=use_cache,
                return_windows=True,
            )
            cache = body.past_key_values if use_cache else None
            logits = self.lm_head(body.hidden[rows, last])
            if eos is not None and t < shortest:
                logits[:, eos] = -torch.inf
            token = _sample(logits, *how, generator)
            token = torch.where(ended, token.new_full((), pad), token)
            yield token
            if eos is not None:
                ended = ended | (token == eos)
            step, last = token[:, None], -1
            if use_cache:
                mask = None  # the cache knows each row's length
            else:
                ids = step = torch.cat([ids, step], dim=1)
                mask = None if mask is None else F.pad(mask, (0, 1), value=True)

    def num_parameters(self, trainable_only: bool = False, embeddings: bool = True) -> int:
        """Number of parameters; a tied matrix counts once."""
        skip = set() if embeddings else {id(self.embedding.weight)}
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in skip and (p.requires_grad or not trainable_only)
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder (made if absent)."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.save_config(path)
        save_weights(self.state_dict(), path / WEIGHTS_NAME)

    def save_config(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into the folder."""
        config = {"model_type": "dsalt", "dsalt_version": __version__, **self.config}
        text = json.dumps(config, indent=2) + "\n"
        (Path(folder) / CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu", **overrides: Any
    ) -> DSALTLMHeadModel:
        """The model that ``save_pretrained`` or a trainer's checkpoint wrote, in evaluation mode.

        Args:
            folder: holds ``config.json`` and ``model.safetensors``.
            device: where the parameters go.
            **overrides: constructor arguments that replace those in the file (``dropout=0.0``).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or the weights do not fit the configuration.
        """
        path = Path(folder)
        config = read_config(path)
        if not (path / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"no {WEIGHTS_NAME} in {path}")
        try:
            model = cls(**{**config, **overrides})
        except TypeError as error:
            raise ValueError(f"{path / CONFIG_NAME} does not fit this version: {error}") from error
        load_weights(model, path / WEIGHTS_NAME)
        return model.to(device).eval()


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
) -> Tensor:
    """Mean of −log softmax(logits)[label] over valid labels; 0 when there is none."""
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
    if shift:
        if cu_seqlens is not None:
            # a packed sequence's first token is nobody's next token
            starts = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
            starts = starts.index_fill(0, cu_seqlens.long(), True)[:-1]
            labels = labels.masked_fill(starts, IGNORE_INDEX)
        labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        if attention_mask is not None:
            # padding in front does not predict the first token
            labels = labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
    labels = labels.reshape(-1).long()
    scores = logits.reshape(-1, logits.shape[-1])
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    total = F.cross_entropy(scores, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token per row of logits (B, V)."""
    logits = logits.float()
    if temperature < torch.finfo(logits.dtype).tiny:
        return logits.argmax(-1)
    # subtract the maximum first: a tiny temperature must not overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        # by place, not by value: of tied logits no more than k stay
        kept = logits.topk(top_k, dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # keep a token while the mass before it is below p: the first always stays
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

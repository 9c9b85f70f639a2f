"""The language model: embedding, DSALT body, head; loss, generation, saving and loading."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks, _generation, _labels, _loss
from ._context import Chunk
from ._files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_weights,
    read_config,
    save_weights,
    stored_dtypes,
)
from ._labels import IGNORE_INDEX
from ._output import LMOutput
from ._version import __version__
from .modules import DSALTTransformer, window_regulariser

__all__ = ["DSALTLMHeadModel", "LMOutput"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, labels) -> scalar


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
        rope_factor, rope_length: reach positions rope_factor times rope_length, the length trained
            on, by YaRN's interpolation of the rotary frequencies; 1 leaves them as they are.
        alpha: share of the value norm in a landmark's score at the start; it is learned.
        d_ff: width of the feed-forward part; None: see :class:`SwiGLU`.
        max_seq_len: longer sequences are refused; None: any length.
        tie_embeddings: the head uses the embedding matrix; ``tie_weights`` is another name for it.
        window_reg: kind of the window regulariser, "entropy" or "length".
        gradient_checkpointing: recompute each block in the backward pass instead of storing it.
        loss: callable (hidden (T, d), weight (V, d), labels (T,) with -100 where none is) ->
            scalar, in the place of the mean cross-entropy. Not saved with the model.
        use_fa2: an argument of the published package; only False is taken.

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
        n_min: int = 32,
        n_max: int = 256,
        k_lmk: int = 16,
        norm_eps: float = 1e-6,
        dropout: float = 0.1,
        bias: bool = False,
        *,
        alpha: float = 0.6,
        d_ff: int | None = None,
        max_seq_len: int | None = None,
        n_kv_heads: int | None = None,
        window_ramp: float = 8.0,
        landmark_block: int = 32,
        landmark_mode: str = "block_causal",
        n_sink: int = 0,
        rope_base: float = 10000.0,
        rope_factor: float = 1.0,
        rope_length: int | None = None,
        tie_embeddings: bool = False,
        tie_weights: bool | None = None,
        window_reg: str = "entropy",
        gradient_checkpointing: bool = False,
        loss: Loss | None = None,
        use_fa2: bool = False,
    ) -> None:
        super().__init__()
        checks.positive_int("vocab_size", vocab_size)
        if max_seq_len is not None:
            checks.positive_int("max_seq_len", max_seq_len)
        if use_fa2:
            checks.fail(
                "use_fa2", "be False", use_fa2, "this package has kernels of its own, no flash-attn"
            )
        if loss is not None and not callable(loss):
            needs = "be a callable (hidden, weight, labels) -> scalar"
            checks.fail("loss", needs, repr(loss), error=TypeError)
        tie_embeddings = bool(tie_embeddings if tie_weights is None else tie_weights)
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
            "rope_factor": rope_factor,
            "rope_length": rope_length,
            "alpha": alpha,
            "d_ff": d_ff,
            "max_seq_len": max_seq_len,
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
        outside = ("vocab_size", "max_seq_len", "tie_embeddings", "window_reg")
        body = {name: value for name, value in self.config.items() if name not in outside}
        self.transformer = DSALTTransformer(gradient_checkpointing=gradient_checkpointing, **body)
        self.loss, self._may_copy = loss, True
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

    @overload
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
        return_logits: bool = True,
        return_dict: Literal[True] = True,
        group: Any = None,
    ) -> LMOutput: ...
    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        shift_labels: bool = False,
        return_logits: Literal[True] = True,
        return_dict: Literal[False],
        group: Any = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        shift_labels: bool = False,
        return_logits: bool = True,
        return_dict: Literal[False],
        group: Any = None,
    ) -> tuple[Tensor, Tensor | None]: ...
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
        return_logits: bool = True,
        return_dict: bool = True,
        group: Any = None,
    ) -> LMOutput | Tensor | tuple[Tensor, Tensor | None]:
        """Logits for every position, and the loss when labels are given.

        Args:
            input_ids: (B, N) token ids of any integer dtype.
            labels: (B, N) integer; −100 is ignored. Aligned with the logits: ``logits[:, t]``
                should predict ``labels[:, t]``. Labels that are the inputs themselves would teach
                the model to copy: a warning says so, once.
            attention_mask: (B, N), True or 1 where there is a token; padding is neither attended
                nor counted in the loss.
            cu_seqlens: (S+1,) boundaries of packed sequences, with B = 1.
            past_key_values: the cache of an earlier call with ``use_cache=True``.
            use_cache: return a cache in ``past_key_values``.
            shift_labels: labels are the inputs themselves; position t is scored against t + 1.
            return_logits: False, with labels: the loss alone, in chunks of tokens, so that the
                (B N, vocab_size) logits never exist; ``out.logits`` is None.
            return_dict: False gives plain tensors: logits, or (loss, logits) with labels.
            group: ranks that share the sequences, each with consecutive tokens of them: a
                ProcessGroup or one dimension of a DeviceMesh. Ids and labels are this rank's,
                cu_seqlens those of the whole row, and the loss is the mean over this rank's labels
                (``DSALTTrainer(context_parallel=n)`` weights it). Gradients are this rank's part.

        Returns:
            LMOutput with logits (B, N, vocab_size).

        Raises:
            ValueError: ids or labels of a wrong shape or, on the CPU, outside the vocabulary.
        """
        input_ids = self._ids("input_ids", input_ids)
        if not return_logits and labels is None:
            checks.fail("return_logits", "be True without labels", False, "nothing would be left")
        n = input_ids.shape[1]
        if group is not None:
            _checks.with_group({"shift_labels": shift_labels or None})
            group = Chunk.of(group, input_ids, cu_seqlens)
            n = group.total
        self._check_length(n, past_key_values)
        body = self.transformer(
            self.dropout(self.embedding(input_ids)),
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_windows=True,
            group=group,
        )
        loss = logits = None
        if return_logits:
            logits = self.lm_head(body.hidden)
        if labels is not None:
            labels = self._labels(labels, input_ids, shift_labels)
            if shift_labels:
                labels = _labels.next_tokens(labels, attention_mask, cu_seqlens)
            labels = _labels.without_padding(labels, attention_mask).flatten()
            hidden = body.hidden.flatten(0, 1)
            if self.loss is not None:
                if not _loss.is_plain(self.lm_head):
                    needs = "be a plain nn.Linear for a loss of your own"
                    checks.fail("lm_head", needs, type(self.lm_head).__name__)
                loss = self.loss(hidden, self.lm_head.weight, labels)
            elif logits is None:
                loss = _loss.linear_cross_entropy(hidden, self.lm_head, labels, self.vocab_size)
            else:
                loss = _loss.mean(logits, labels)
        if not return_dict:
            return cast(Tensor, logits) if loss is None else (loss, logits)
        reg = None
        if body.windows:
            kind = self.config["window_reg"]
            reg = window_regulariser(body.windows, self.config["n_min"], self.config["n_max"], kind)
        return LMOutput(logits, loss, body.windows, reg, body.past_key_values)  # type: ignore[arg-type]

    if TYPE_CHECKING:
        __call__ = forward

    @classmethod
    def arguments(cls) -> list[str]:
        """Names of the arguments that ``config.json`` holds: those that make the model."""
        others = {"self", "gradient_checkpointing", "loss", "tie_weights", "use_fa2"}
        return [
            n for n in inspect.signature(DSALTLMHeadModel.__init__).parameters if n not in others
        ]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def _check_length(self, n: int, past: Any) -> None:
        most = self.config["max_seq_len"]
        if most is None:
            return
        n += 0 if past is None else next((c.length for c in past if c is not None), 0)
        if n > most:
            checks.fail("input_ids", f"hold at most max_seq_len = {most} tokens per row", n)

    def _ids(self, name: str, ids: Tensor) -> Tensor:
        """The ids as int64, checked: any integer dtype is taken, memory-mapped uint16 too."""
        checks.integer(name, ids)
        checks.shape(name, ids, (None, None), "(B, N)")
        ids = ids.long()
        if checks.reads_values(ids) and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                got = low if low < 0 else high
                checks.fail(
                    name, f"lie in [0, {self.vocab_size})", got, "`vocab_size` bounds the ids"
                )
        return ids

    def _labels(self, labels: Tensor, input_ids: Tensor, shift: bool) -> Tensor:
        checks.integer("labels", labels)
        if labels.shape != input_ids.shape:
            checks.fail(
                "labels", f"have the shape of `input_ids` {tuple(input_ids.shape)}", labels.shape
            )
        labels = labels.long()
        if checks.reads_values(labels, input_ids) and labels.numel():
            none = labels == IGNORE_INDEX
            bad = ((labels < 0) & ~none) | (labels >= self.vocab_size)
            if bool(bad.any()):
                got = int(labels[bad][0])
                needs = f"be {IGNORE_INDEX} or lie in [0, {self.vocab_size})"
                checks.fail("labels", needs, got)
            if self._may_copy and not shift:
                self._warn_of_copies(labels, input_ids, none)
        return labels

    def _warn_of_copies(self, labels: Tensor, ids: Tensor, none: Tensor) -> None:
        """Labels that are the inputs, where the inputs' next tokens are others."""
        moved = (labels[:, :-1] == ids[:, 1:]) | none[:, :-1]
        if bool(((labels == ids) | none).all()) and not bool(moved.all()):
            self._may_copy = False
            warnings.warn(
                "the labels are the inputs themselves, and logits[:, t] are scored against "
                "labels[:, t]: the model learns to copy; give the next tokens as labels, or "
                "shift_labels=True",
                stacklevel=6,
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 64,
        temperature: float | None = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        *,
        min_new_tokens: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        num_return_sequences: int = 1,
        repetition_penalty: float = 1.0,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        normalizer: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """Continue each prompt: next ~ softmax(logits / temperature), cut to top_k and top_p.

        Rows of different lengths (``attention_mask``, padding on either side) are decoded together,
        their padding is never seen: a row in a batch continues as it does alone. Where ranks share
        the weights (FSDP) all must call it, with prompts of their own; the last to end ends all.

        Args:
            input_ids: (B, N) prompts, N ≥ 1, of any integer dtype.
            max_new_tokens: how many tokens to add at most.
            temperature: 0 is greedy (the largest logit); None is 1.
            top_k: sample among the k largest logits only; more than there are is all of them.
            top_p: sample among the fewest tokens whose probabilities reach p; always at least one.
            min_new_tokens: no row ends before it has so many.
            eos_token_id: a row ends with this token, or with any of several; the rest is filled
                with ``pad_token_id``.
            pad_token_id: default the first ``eos_token_id``, else 0.
            attention_mask: (B, N), True or 1 where the prompt has a token.
            generator: random numbers come from it. Without one they come from a generator of this
                package, which begins with ``torch.initial_seed()``: generating leaves the random
                numbers of everything else as they are.
            use_cache: False recomputes the whole sequence for each token: slow, the same tokens.
                Not so with ``landmark_mode="global"``: a cache keeps the landmarks of the prompt,
                without one they are chosen anew from all tokens so far.
            num_return_sequences: so many continuations of each prompt, in rows that follow each
                other: (B * num_return_sequences, ...).
            repetition_penalty: logits of tokens that the row holds already are divided by it where
                positive and multiplied where negative; 1 is none.
            stop_strings: a row ends with the token that completes one of them in the text of its
                new tokens; needs ``tokenizer``.
            tokenizer: its ``decode(list of ids)`` gives the text for ``stop_strings``.
            streamer: gets the prompts and each new token as they come: an object with ``put(ids)``
                and ``end()``, as Hugging Face's are, or a callable of the new tokens (B,).
            normalizer: callable (scores (B, V), dim) -> weights >= 0 that sum to 1, in the place of
                softmax: of logits / temperature, -inf where top_k leaves a token out. A map with
                exact zeros never draws a token outside its support.

        Returns:
            (B, N + n) int64 ids: the prompts, then n ≤ max_new_tokens new tokens.

        Raises:
            TypeError, ValueError: an argument out of its range, ids outside the vocabulary, or a
                normalizer whose result is no set of probabilities.

        Source: Keskar et al. 2019, "CTRL", section 4.1 (the penalty).
        """
        ids = self._ids("input_ids", input_ids)
        mask, how = _generation.plan(
            ids,
            self.vocab_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_new_tokens=min_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            attention_mask=attention_mask,
            generator=generator,
            repetition_penalty=repetition_penalty,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            normalizer=normalizer,
        )
        checks.positive_int("num_return_sequences", num_return_sequences)
        ids = ids.repeat_interleave(int(num_return_sequences), 0)
        mask = None if mask is None else mask.repeat_interleave(int(num_return_sequences), 0)
        put, end = _generation.listener(streamer)
        if hasattr(streamer, "put"):
            put(ids)
        new = [ids]
        was_training = self.training
        self.eval()
        try:
            for token in _generation.decode(self, ids, mask, how, use_cache):
                new.append(token[:, None])
                put(token)
        finally:
            self.train(was_training)
        end()
        return torch.cat(new, dim=1)

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
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **overrides: Any,
    ) -> DSALTLMHeadModel:
        """The model that ``save_pretrained`` or a trainer's checkpoint wrote, in evaluation mode.

        Args:
            folder: holds ``config.json`` and ``model.safetensors``.
            device: where the parameters go; the CPU by default.
            dtype: of the parameters; None or "auto": as in the file. ``torch_dtype`` is another
                name for it.
            device_map: a device, ``{"": device}``, or "auto": the GPU if there is one.
            **overrides: constructor arguments that replace those in the file (``dropout=0.0``).

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: an override is no argument of the model.
            ValueError: a file is damaged or the weights do not fit the configuration.
        """
        path = Path(folder)
        config = read_config(path)
        if "transformers_version" in config:  # Hugging Face writes its own entries as well
            config = {n: x for n, x in config.items() if n in cls.arguments()}
        unknown = sorted(set(overrides) - set(inspect.signature(cls).parameters))
        if unknown:
            needs = f"be arguments of {cls.__name__} or of from_pretrained"
            checks.fail("overrides", needs, ", ".join(unknown), error=TypeError)
        if not (path / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"no {WEIGHTS_NAME} in {path}")
        wanted = _dtype("torch_dtype", torch_dtype) if dtype is None else _dtype("dtype", dtype)
        place = _place(device_map) if device is None else device
        try:
            model = cls(**{**config, **overrides})
        except TypeError as error:
            raise ValueError(f"{path / CONFIG_NAME} does not fit this version: {error}") from error
        load_weights(model, path / WEIGHTS_NAME)
        stored = stored_dtypes(path / WEIGHTS_NAME)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(wanted or stored.get(name, parameter.dtype))
        return model.to(place).eval()


def _dtype(name: str, value: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype that is meant; None: that of the file."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value is None or value == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        checks.fail(name, 'be a floating dtype, its name or "auto"', repr(value), error=TypeError)
    return found


def _place(device_map: Any) -> torch.device:
    """The one device of a Hugging Face ``device_map``."""
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, dict):
        needs = "name one device"
        checks.fail("device_map", needs, device_map, "the layers of this model stay together")
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device_map` must be a device or 'auto', got {device_map!r}") from error

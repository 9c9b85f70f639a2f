"""How a prompt is continued: which token comes next, and where a row ends."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_kernels import checks

from . import _checks, _distributed

if TYPE_CHECKING:
    from .model import DSALTLMHeadModel

_SUM_ERROR = 1e-2  # a normaliser's weights may sum to 1 within this: half types round


class Plan(NamedTuple):
    """How the next token is chosen, and where a row ends."""

    temperature: float
    top_k: int | None
    top_p: float | None
    penalty: float
    longest: int  # new tokens at most
    shortest: int  # and at least
    eos: list[int]
    pad: int
    stops: list[str]
    tokenizer: Any
    generator: torch.Generator
    normalizer: Callable[[Tensor, int], Tensor]


def plan(
    ids: Tensor,
    vocab_size: int,
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    attention_mask: Tensor | None,
    generator: torch.Generator | None,
    repetition_penalty: float,
    stop_strings: str | Sequence[str] | None,
    tokenizer: Any,
    normalizer: Callable[[Tensor, int], Tensor] | None,
) -> tuple[Tensor | None, Plan]:
    """The arguments of ``DSALTLMHeadModel.generate``, checked: (mask of the prompts, plan)."""
    if ids.shape[1] < 1:
        checks.fail("input_ids", "hold at least one token per row", tuple(ids.shape))
    max_new_tokens, min_new_tokens = int(max_new_tokens), int(min_new_tokens)
    if max_new_tokens < 0:
        checks.fail("max_new_tokens", "be at least 0", max_new_tokens)
    if not 0 <= min_new_tokens <= max_new_tokens:
        needs = f"be in [0, max_new_tokens = {max_new_tokens}]"
        checks.fail("min_new_tokens", needs, min_new_tokens)
    given: Any = () if eos_token_id is None else eos_token_id
    several = isinstance(given, Iterable) and getattr(given, "ndim", 1) != 0
    eos = [_token_id("eos_token_id", e) for e in (given if several else (given,))]
    for e in eos:
        if not 0 <= e < vocab_size:
            checks.fail("eos_token_id", f"lie in [0, {vocab_size})", e)
    temperature = 1.0 if temperature is None else float(temperature)
    if not temperature >= 0.0:
        checks.fail("temperature", "be at least 0", temperature, "0 is greedy")
    if top_k is not None and top_k < 1:
        checks.fail("top_k", "be at least 1", top_k)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        checks.fail("top_p", "be in (0, 1]", top_p)
    if not 0.0 < repetition_penalty < float("inf"):
        checks.fail("repetition_penalty", "be > 0", repetition_penalty, "1 is none")
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if stops and not all(stops):
        checks.fail("stop_strings", "hold no empty string", stops)
    if stops and not hasattr(tokenizer, "decode"):
        checks.fail("tokenizer", "have decode(ids) for stop_strings", type(tokenizer).__name__)
    if normalizer is not None:
        _checks.normalizer(normalizer)
    pad = eos[0] if eos else 0
    if pad_token_id is not None:
        pad = _token_id("pad_token_id", pad_token_id)
    mask = None
    if attention_mask is not None:
        checks.shape("attention_mask", attention_mask, tuple(ids.shape), "(B, N)")
        mask = attention_mask.to(ids.device).bool()
        if not bool(mask.any(1).all()):
            checks.fail("attention_mask", "leave at least one token in every row", "an empty row")
    return mask, Plan(
        temperature=temperature,
        top_k=None if top_k is None else int(top_k),
        top_p=top_p,
        penalty=float(repetition_penalty),
        longest=max_new_tokens,
        shortest=min_new_tokens,
        eos=eos,
        pad=pad,
        stops=stops,
        tokenizer=tokenizer,
        generator=generator or _own_generator(ids.device),
        normalizer=normalizer or torch.softmax,
    )


def listener(streamer: Any) -> tuple[Callable[[Tensor], Any], Callable[[], Any]]:
    """What is called with each new token (B,), and what is called at the end."""
    end = getattr(streamer, "end", lambda: None)
    if hasattr(streamer, "put"):
        return lambda token: streamer.put(token.cpu()), end
    if streamer is not None and not callable(streamer):
        needs = "have put(ids) and end(), or be a callable of the new tokens"
        checks.fail("streamer", needs, type(streamer).__name__, error=TypeError)
    return streamer or (lambda token: None), end


def decode(
    model: DSALTLMHeadModel, ids: Tensor, mask: Tensor | None, how: Plan, use_cache: bool
) -> Iterator[Tensor]:
    """Yield the next token (B,) of every row, until all rows have ended."""
    cache, step, B = None, ids, ids.shape[0]
    mesh = _distributed.shard_mesh(model)
    ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
    rows = torch.arange(B, device=ids.device)
    ends = torch.tensor(how.eos, dtype=torch.long, device=ids.device)
    can_end = bool(how.eos or how.stops)
    seen = None
    if how.penalty != 1.0:
        seen = torch.zeros(B, model.vocab_size, dtype=torch.uint8, device=ids.device)
        there = torch.ones_like(ids) if mask is None else mask
        seen = seen.scatter_reduce(1, ids, there.to(torch.uint8), "amax").bool()
    texts: list[list[int]] = [[] for _ in range(B)]
    last: Any = -1
    if mask is not None:  # where each row's prompt ends
        last = (torch.arange(ids.shape[1], device=ids.device) * mask).amax(1)
    for t in itertools.count():
        wanted = t < how.longest and not (can_end and bool(ended.all()))
        if not _distributed.anywhere(wanted, mesh):
            return
        if not wanted:  # another rank goes on and needs the parts of the weights that are here
            model.transformer(model.embedding(ids.new_zeros(1, 1)))
            continue
        model._check_length(step.shape[1], cache)
        body = model.transformer(
            model.embedding(step),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=use_cache,
            return_windows=True,
        )
        cache = body.past_key_values if use_cache else None
        logits = model.lm_head(body.hidden[rows, last])
        if seen is not None:
            weaker = torch.where(logits > 0, logits / how.penalty, logits * how.penalty)
            logits = torch.where(seen, weaker, logits)
        if t < how.shortest:
            logits[:, how.eos] = -torch.inf
        token = _sample(logits, how)
        token = torch.where(ended, how.pad, token)
        yield token
        if seen is not None:
            seen = seen.scatter(1, token[:, None], True)
        if how.eos:
            ended = ended | torch.isin(token, ends)
        if how.stops:
            ended = ended | _stopped(texts, token, ended, how, t)
        step, last = token[:, None], -1
        if use_cache:
            mask = None  # the cache knows each row's length
        else:
            ids = step = torch.cat([ids, step], dim=1)
            mask = None if mask is None else F.pad(mask, (0, 1), value=True)


_generators: dict[torch.device, tuple[int, torch.Generator]] = {}


def _own_generator(device: torch.device) -> torch.Generator:
    """The generator of this package on a device, begun anew when torch's seed is another one."""
    seed = torch.initial_seed()
    if device not in _generators or _generators[device][0] != seed:
        kind = "cpu" if device.type == "meta" else device
        _generators[device] = (seed, torch.Generator(kind).manual_seed(seed))
    return _generators[device][1]


def _stopped(texts: list[list[int]], token: Tensor, ended: Tensor, how: Plan, t: int) -> Tensor:
    """Which rows' new text holds a stop string now; texts hold the new tokens of each row."""
    # a character takes at most four tokens; eight more, because the first may be cut in the middle
    tail = 4 * max(len(s) for s in how.stops) + 8
    found = []
    for ids, new, over in zip(texts, token.tolist(), ended.tolist(), strict=True):
        if not over:
            ids.append(new)
        text = "" if over or t + 1 < how.shortest else how.tokenizer.decode(ids[-tail:])
        found.append(any(stop in text for stop in how.stops))
    return torch.tensor(found, dtype=torch.bool, device=token.device)


def _sample(logits: Tensor, how: Plan) -> Tensor:
    """One token per row of logits (B, V)."""
    logits = logits.float()
    if how.temperature < torch.finfo(logits.dtype).tiny:
        return logits.argmax(-1)
    # subtract the maximum first: a tiny temperature must not overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        # by place, not by value: of tied logits no more than k stay
        kept = logits.topk(how.top_k, dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    probabilities = how.normalizer(logits, -1)
    if how.normalizer is not torch.softmax:
        _check_probabilities(probabilities, logits)
    if how.top_p is not None and how.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # keep a token while the mass before it is below p: the first always stays
        before = ordered.cumsum(-1) - ordered
        dropped = before >= how.top_p
        dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    # In fp16 on a CPU one draw of 350 among 128 000 tokens is one of weight 0 (torch 2.13).
    probabilities = probabilities.to(logits.dtype)
    return torch.multinomial(probabilities, 1, generator=how.generator).squeeze(-1)


def _check_probabilities(weights: Any, scores: Tensor) -> None:
    """Refuse what a user's normalizer returned where it cannot be sampled from."""
    checks.floating("normalizer(scores, dim)", weights)
    checks.shape("normalizer(scores, dim)", weights, tuple(scores.shape), "the scores' (B, V)")
    if not checks.reads_values(weights):
        return
    total, least = weights.sum(-1), float(weights.min())
    if not (least >= 0.0 and bool(((total - 1.0).abs() < _SUM_ERROR).all())):
        checks.fail(
            "normalizer(scores, dim)",
            "hold weights >= 0 that sum to 1 in each row",
            f"a smallest weight of {least:.3g} and sums {total.tolist()}",
        )


def _token_id(name: str, value: Any) -> int:
    """An id as numpy, torch or python hold it; True and 3.0 are none."""
    try:
        if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError:
        checks.fail(name, "be a token id", repr(value), error=TypeError)

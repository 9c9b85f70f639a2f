"""Modules: a bounded alpha, and multi-head attention with alpha-entmax weights."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shared_kernels import checks

from . import _checks, _length_scale, _torch_lazy
from .api import adasplash, lazy_attention_triton, triton_entmax
from .sdpa import causal_from_the_start, probability, weighted


def _learnable(alpha: float) -> None:
    if not 1.01 < alpha < 2.0:
        checks.fail("alpha", "be in (1.01, 2) to be learned", alpha, "learn_alpha=False fixes it")


def _check_input(x: Tensor, width: int) -> None:
    checks.floating("x", x)
    checks.shape("x", x, (None, None, width), lambda: f"(B, N, {width})")


class AlphaParameter(nn.Module):
    r"""A learnable alpha that cannot leave (low, high) while it is trained.

    alpha = low + (high - low) * sigmoid(raw), computed in fp32 at least.

    Args:
        n: how many values, usually one per head; None for a scalar.
        init: the value they start from.
        low, high: the bounds, 1 <= low < init < high <= 2.
        device, dtype: of the parameter.

    Returns (when called): alpha, of shape (n,) or ().

    Example:
        >>> AlphaParameter(4, init=1.5)().shape
        torch.Size([4])
    """

    low: float
    high: float
    init: float
    is_scalar: bool
    raw: nn.Parameter

    def __init__(
        self,
        n: int | None = None,
        init: float = 1.5,
        low: float = 1.01,
        high: float = 2.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1.0 <= low < high <= 2.0:
            checks.fail("low", "satisfy 1 <= low < high <= 2", f"low={low}, high={high}")
        if isinstance(init, bool) or not isinstance(init, Real):
            checks.fail("init", "be a number", type(init).__name__, error=TypeError)
        if n is not None:
            checks.positive_int("n", n)
        if not low < init < high:
            checks.fail("init", f"be in ({low}, {high})", init)
        self.low, self.high, self.init = float(low), float(high), float(init)
        self.is_scalar = n is None
        # One value has a dimension as well: FSDP shards no scalar.
        self.raw = nn.Parameter(torch.empty(1 if n is None else int(n), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the start value."""
        share = (self.init - self.low) / (self.high - self.low)
        nn.init.constant_(self.raw, math.log(share / (1 - share)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        raw = state_dict.get(f"{prefix}raw")
        if self.is_scalar and isinstance(raw, Tensor) and raw.dim() == 0:  # an older checkpoint
            state_dict = {**state_dict, f"{prefix}raw": raw.reshape(1)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self) -> Tensor:
        raw = self.raw if self.raw.dtype == torch.float64 else self.raw.float()
        raw = raw.reshape(()) if self.is_scalar else raw
        # Rounding could step over `high` by one ulp.
        return (self.low + (self.high - self.low) * torch.sigmoid(raw)).clamp(max=self.high)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"n={self.raw.numel()}, low={self.low}, high={self.high}"


class KeyValueCache(NamedTuple):
    """What one attention layer remembers of T tokens.

    Any object with such ``keys`` and ``values`` may take its place.
    """

    keys: Tensor  # (B, H_kv, T, D)
    values: Tensor  # (B, H_kv, T, D)

    @property
    def length(self) -> int:
        return self.keys.shape[2]


def _check_past(past: KeyValueCache, wanted: tuple[int | None, ...]) -> None:
    B, H_kv, _, D = wanted
    for name, x in (("keys", past.keys), ("values", past.values)):
        checks.shape(f"past_key_value.{name}", x, wanted, lambda: f"(B={B}, H_kv={H_kv}, T, D={D})")


def _half_alibi(n_heads: int) -> Tensor:
    """(n_heads,) slopes: those of ALiBi for the first half of the heads, 0 for the others."""
    n = n_heads // 2
    slopes = torch.zeros(n_heads)
    slopes[:n] = 2.0 ** (-8 * torch.arange(1, n + 1) / max(n, 1))
    return slopes


class EntmaxAttention(nn.Module):
    r"""Multi-head self-attention whose weights are alpha-entmax, with an alpha learned per head.

    x -> q, k, v -> adasplash(q, k, v, alpha) -> out: memory linear in the number of tokens.

    Args:
        d_model: width of the model.
        n_heads: number of query heads; divides d_model.
        n_kv_heads: number of key heads (grouped queries); n_heads by default.
        causal: hide the future.
        alpha: start value in [1, 2].
        learn_alpha: learn one alpha per head, kept in (1.01, 2); otherwise alpha is fixed.
        bias: whether the projections have a bias.
        window: see :func:`adasplash`.
        length_scale: learn delta, beta and gamma per head, see :func:`adasplash`; at the start 1, 0
            and 1, which changes nothing.
        alibi: "half" gives the first half of the heads fixed ALiBi slopes 2^(-8 i / n), i = 1 to n
            (the n heads of that half), and leaves the others without positions; None gives none.

    Example:
        >>> attention = EntmaxAttention(d_model=32, n_heads=4, causal=True)
        >>> attention(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        causal: bool = False,
        alpha: float = 1.5,
        learn_alpha: bool = True,
        bias: bool = False,
        window: int | None = None,
        length_scale: bool = False,
        alibi: Literal["half"] | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        for name, value in (("d_model", d_model), ("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
            checks.positive_int(name, value)
        if d_model % n_heads:
            checks.fail("d_model", f"be a multiple of n_heads={n_heads}", d_model)
        if n_heads % n_kv_heads:
            checks.fail("n_heads", f"be a multiple of n_kv_heads={n_kv_heads}", n_heads)
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim = d_model // n_heads
        self.causal, self.window = causal, window
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)
        self.alpha: AlphaParameter | float
        self.length_scale: nn.Parameter | None = None
        _checks.flag("length_scale", length_scale)
        if length_scale:
            self.length_scale = nn.Parameter(torch.tensor([1.0, 0.0, 1.0]).repeat(n_heads, 1))
        if alibi not in (None, "half"):
            checks.fail("alibi", "be 'half' or None", repr(alibi))
        slopes = None if alibi is None else _half_alibi(n_heads)
        self.alibi_slopes: Tensor | None
        self.register_buffer("alibi_slopes", slopes, persistent=False)
        _checks.alpha(alpha)
        if window is not None:
            checks.positive_int("window", window)
        if learn_alpha:
            _learnable(alpha)
            self.alpha = AlphaParameter(n_heads, init=alpha)
        else:
            self.alpha = alpha

    def current_alpha(self) -> float | Tensor:
        """The alpha in use: a number, or one per head."""
        return self.alpha() if isinstance(self.alpha, AlphaParameter) else self.alpha

    def _split(self, x: Tensor, n_heads: int) -> Tensor:
        heads: Tensor = x.unflatten(-1, (n_heads, self.head_dim))
        return heads.transpose(-3, -2)

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        varlen: Tensor | None = None,
        mask: Tensor | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: Literal[False] = False,
        group: Any = None,
        layout: str = "contiguous",
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        varlen: Tensor | None = None,
        mask: Tensor | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: Literal[True],
        group: Any = None,
        layout: str = "contiguous",
    ) -> tuple[Tensor, KeyValueCache]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        varlen: Tensor | None = None,
        mask: Tensor | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: bool = False,
        group: Any = None,
        layout: str = "contiguous",
    ) -> Tensor | tuple[Tensor, KeyValueCache]: ...
    def forward(
        self,
        x: Tensor,
        *,
        varlen: Tensor | None = None,
        mask: Tensor | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: bool = False,
        group: Any = None,
        layout: str = "contiguous",
    ) -> Tensor | tuple[Tensor, KeyValueCache]:
        """x (B, N, d_model) -> the same, and with ``use_cache`` the cache that x has joined.

        Args:
            varlen, mask: as for :func:`adasplash`.
            past_key_value: what an earlier call returned with ``use_cache``; x continues it. Needs
                ``causal=True``, and neither ``varlen`` nor a mask.
            use_cache: also return the :class:`KeyValueCache`.
            group, layout: as for :func:`adasplash`; x is this rank's tokens. Gradients of the
                parameters are this rank's part: sum them over the ranks.
        """
        _check_input(x, self.d_model)
        q = self._split(self.q_proj(x), self.n_heads)
        k = self._split(self.k_proj(x), self.n_kv_heads)
        v = self._split(self.v_proj(x), self.n_kv_heads)
        given = {"varlen": varlen, "mask": mask, "group": group}
        if use_cache or past_key_value is not None:
            if not self.causal:
                checks.fail("causal", "be True for a cache", "False")
            for name, value in given.items():
                if value is not None:
                    got = "a group" if name == "group" else "a tensor"
                    checks.fail(name, "be None for a cache", got)
        if past_key_value is not None:
            _check_past(past_key_value, (x.shape[0], self.n_kv_heads, None, self.head_dim))
            k = torch.cat([past_key_value.keys, k], 2)
            v = torch.cat([past_key_value.values, v], 2)
        out = adasplash(
            q,
            k,
            v,
            self.current_alpha(),
            is_causal=self.causal,
            window=self.window,
            alibi_slopes=self.alibi_slopes,
            length_scale=self.length_scale,
            layout=layout,
            **given,
        )
        out = self.o_proj(out.transpose(-3, -2).flatten(-2))
        return (out, KeyValueCache(k, v)) if use_cache else out

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """The (B, H, N, N) attention weights, to look at: this one does take N x N memory."""
        _check_input(x, self.d_model)
        q = self._split(self.q_proj(x), self.n_heads)
        k = self._split(self.k_proj(x), self.n_kv_heads)
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, 1)
        scores = q @ k.mT * self.head_dim**-0.5
        i = torch.arange(x.shape[-2], device=x.device)
        distance = i[:, None] - i
        if self.length_scale is not None:
            n = (i + 1 if self.causal else torch.full_like(i, len(i))).view(1, 1, -1, 1)
            scores = scores * _length_scale.factors(self.length_scale, n)
        if self.alibi_slopes is not None:
            scores = scores - self.alibi_slopes.view(-1, 1, 1) * distance.abs()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.causal:
            hidden |= distance < 0
        if self.window is not None:
            hidden |= distance.abs() >= self.window
        alpha = self.current_alpha()
        if isinstance(alpha, Tensor):
            alpha = alpha.view(-1, 1, 1)
        return triton_entmax(scores.masked_fill(hidden, -torch.inf), alpha)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_heads={self.n_heads}, causal={self.causal}"


_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# What torch.nn.Module keeps of hooks; a handle removes its hook from the table that it knows.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class MultiheadAttention(nn.MultiheadAttention):
    r"""``nn.MultiheadAttention`` with alpha-entmax weights: same arguments, same state_dict.

    At alpha = 1 outputs, weights and gradients are those of PyTorch's module, and for a fixed alpha
    the state_dicts load into each other. It takes the place of ``self_attn`` and
    ``multihead_attn`` in PyTorch's transformer layers.

    Args:
        embed_dim, num_heads, ...: whatever is not named here, as for ``nn.MultiheadAttention``.
        dropout: chance that a weight is dropped in training, exactly as there. Memory stays O(N),
            but rows are then computed in tiles of plain PyTorch, without a kernel.
        alpha: in [1, 2]; the start value if it is learned.
        learn_alpha: learn one alpha per head, kept in (1.01, 2). It adds ``alpha.raw`` to the
            state_dict, so that PyTorch's loads with ``strict=False`` only.

    **Pass ``need_weights=False``**, as PyTorch's own layers do: the default, True, returns the
    weights and so takes N x N memory, as there.

    Example:
        >>> attention = MultiheadAttention(32, 4, batch_first=True, alpha=1.5)
        >>> x = torch.randn(2, 10, 32)
        >>> attention(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 10, 32])
    """

    alpha: AlphaParameter | float

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float = 1.5,
        learn_alpha: bool = False,
    ) -> None:
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            checks.positive_int(name, value)
        if embed_dim % num_heads:
            checks.fail("embed_dim", f"be a multiple of num_heads={num_heads}", embed_dim)
        probability("dropout", dropout)
        _checks.alpha(alpha)
        super().__init__(
            int(embed_dim),  # three times a number of 8 bits need not be one
            int(num_heads),
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        # PyTorch's layers ask this before they compute softmax attention of their own.
        self._qkv_same_embed_dim = False
        self.alpha = alpha
        if learn_alpha:
            _learnable(alpha)
            self.alpha = AlphaParameter(num_heads, init=alpha, device=device, dtype=dtype)

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, *, alpha: float = 1.5, learn_alpha: bool = False
    ) -> MultiheadAttention:
        """The same attention with alpha-entmax weights; the parameters are shared, not copied.

        So are hooks, buffers and parametrizations: weight norm, spectral norm, pruning and
        ``torch.nn.utils.parametrize`` go on as they did.

        Raises:
            TypeError: the module is no ``nn.MultiheadAttention``, or has a forward pass of its own.

        Example:
            >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
            >>> layer.self_attn = MultiheadAttention.from_torch(layer.self_attn, alpha=1.5)
        """
        if not isinstance(module, nn.MultiheadAttention):
            checks.fail(
                "module", "be an nn.MultiheadAttention", type(module).__name__, error=TypeError
            )
        forward = getattr(module.forward, "__func__", module.forward)
        if forward not in (nn.MultiheadAttention.forward, cls.forward):
            checks.fail(
                "module",
                "have the forward pass of nn.MultiheadAttention",
                f"one of its own ({type(module).__name__})",
                "build a MultiheadAttention and load its state_dict",
                TypeError,
            )
        weight = module.in_proj_weight if module.kdim == module.embed_dim else module.q_proj_weight
        weight = module.out_proj.weight if weight is None else weight
        own = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            module.out_proj.bias is not None,
            module.bias_k is not None,
            module.add_zero_attn,
            module.kdim,
            module.vdim,
            module.batch_first,
            weight.device,
            weight.dtype,
            alpha=alpha,
            learn_alpha=learn_alpha,
        )
        own._take(module)
        return own.train(module.training)

    def _take(self, module: nn.MultiheadAttention) -> None:
        """Share all that makes the tensors of ``module`` and all that hears of its calls."""
        alpha = self.alpha
        names = [*_PROJECTIONS, "in_proj_bias", "bias_k", "bias_v"]
        parametrized = [x for x in names if parametrize.is_parametrized(module, x)]
        for name in names:
            value = getattr(module, name)
            self._parameters.pop(name, None)
            self.__dict__.pop(name, None)
            if name in parametrized:
                setattr(self, name, nn.Parameter(value.detach().clone()))
            elif name in module._parameters:
                self._parameters[name] = module._parameters[name]
            else:  # a hook makes it before each call
                setattr(self, name, value)
        for name in parametrized:
            parametrize.transfer_parametrizations_and_params(module, self, name)
        more = {x: p for x, p in module._parameters.items() if x not in names and x != "alpha"}
        self._parameters.update(more)
        self._buffers.update(module._buffers)
        self._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        own = ("parametrizations", "alpha")
        self._modules.update({x: m for x, m in module._modules.items() if x not in own})
        for name in _HOOKS:
            self.__dict__[name] = module.__dict__[name]
        self.alpha = alpha

    def reset_parameters(self) -> None:
        """As after construction; the output projection and alpha have their own."""
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        # PyTorch's own version asks `_qkv_same_embed_dim` which of the weights there are.
        for name in _PROJECTIONS:
            if (weight := getattr(self, name)) is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for learned in (self.bias_k, self.bias_v):
            if learned is not None:
                nn.init.xavier_normal_(learned)

    def current_alpha(self) -> float | Tensor:
        """The alpha in use: a number, or one per head."""
        return self.alpha() if isinstance(self.alpha, AlphaParameter) else self.alpha

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: (output, weights or None).

        Args:
            query, key, value: (N, E), (N, B, E) or, with ``batch_first``, (B, N, E).
            key_padding_mask: (B, N_k) or (N_k,). Boolean: **True hides** the key. Floating point:
                added to the scores.
            need_weights: also return the weights; takes N_q x N_k memory.
            attn_mask: (N_q, N_k) or (B * H, N_q, N_k). Boolean: **True hides** the pair.
            average_attn_weights: average the returned weights over the heads.
            is_causal: ``attn_mask`` is the causal mask (query i sees keys 0 to i): it is then not
                looked at, and may be left out.

        A query that sees no key gives the bias of the output projection (weights 0), not NaN.
        """
        batched = self._check_forward(query, key, value)
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        pairs = self._pairs(query, key, key_padding_mask, None if is_causal else attn_mask)
        q, k, v = self._heads(query, key, value)
        free = self._free_keys(k.shape[0])
        n_free = free[0].shape[2] if free else 0
        if free:
            k, v = torch.cat([free[0], k], 2), torch.cat([free[1], v], 2)
            pairs = {
                name: nn.functional.pad(x, (n_free, 0), value=1.0 if name == "mask" else 0.0)
                for name, x in pairs.items()
            }
        dropout_p = self.dropout if self.training else 0.0
        alpha, weights = self.current_alpha(), None
        if need_weights:
            weights = self._weights(q, k, alpha, is_causal, n_free, dropout_p, **pairs)
            out = weights @ v
            weights = torch.cat([weights[..., n_free:], weights[..., :n_free]], -1)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        elif is_causal:
            out = causal_from_the_start(q, k, v, alpha, dropout_p, n_free=n_free, **pairs)
        else:
            out = weighted(q, k, v, alpha, False, dropout_p, **pairs)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check_forward(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the input is batched."""
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, size), x in zip(sizes.items(), (query, key, value), strict=True):
            checks.tensor(name, x)
            if x.is_nested:
                checks.fail(
                    name,
                    "not be a nested tensor",
                    "one",
                    "nn.TransformerEncoder(..., enable_nested_tensor=False) pads instead",
                    NotImplementedError,
                )
            checks.floating(name, x)
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != size:
                checks.fail(name, f"have shape (N, B, {size}) or (N, {size})", tuple(x.shape))
        if key.shape[:-1] != value.shape[:-1]:
            checks.fail("value", f"have key's lengths {tuple(key.shape[:-1])}", tuple(value.shape))
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            checks.fail("key", f"have query's batch size {query.shape[batch]}", key.shape[batch])
        return query.dim() == 3

    def _pairs(
        self, query: Tensor, key: Tensor, padding: Tensor | None, attn_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """`mask` (True sees) and `bias` of the two masks, neither of them larger than they are."""
        B, N_q, N_k = query.shape[0], query.shape[1], key.shape[1]
        pairs: dict[str, Tensor] = {}
        if attn_mask is not None:
            checks.tensor("attn_mask", attn_mask)
            flat, full = (N_q, N_k), (B * self.num_heads, N_q, N_k)
            wanted = flat if attn_mask.dim() == 2 else full
            checks.shape("attn_mask", attn_mask, wanted, lambda: f"{flat} or {full}")
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(B, self.num_heads, N_q, N_k)
            if attn_mask.dtype == torch.bool:
                pairs["mask"] = ~attn_mask
            else:
                checks.floating("attn_mask", attn_mask)
                pairs["bias"] = attn_mask
        if padding is not None:
            checks.tensor("key_padding_mask", padding)
            checks.shape("key_padding_mask", padding, (B, N_k), lambda: f"(B={B}, N_k={N_k})")
            padding = padding[:, None, None]
            if padding.dtype == torch.bool and "mask" not in pairs:
                pairs["mask"] = ~padding
            else:
                if padding.dtype == torch.bool:
                    zero = torch.zeros((), dtype=query.dtype, device=query.device)
                    padding = zero.masked_fill(padding, -torch.inf)
                checks.floating("key_padding_mask", padding)
                pairs["bias"] = pairs["bias"] + padding if "bias" in pairs else padding
        return pairs

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v (B, H, N, D) of inputs (B, N, E)."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            nn.functional.linear(x, w, b)
            .unflatten(-1, (self.num_heads, self.head_dim))
            .transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]

    def _free_keys(self, B: int) -> list[Tensor]:
        """Keys and values (B, H, n, D) that every query sees: the learned one, and the zero one."""
        parts: list[list[Tensor]] = [[], []]
        for part, learned in zip(parts, (self.bias_k, self.bias_v), strict=True):
            if learned is not None:
                part.append(learned.view(1, self.num_heads, 1, self.head_dim))
            if self.add_zero_attn:
                like = self.out_proj.weight
                part.append(like.new_zeros(1, self.num_heads, 1, self.head_dim))
        return [torch.cat(part, 2).expand(B, -1, -1, -1) for part in parts if part]

    def _weights(
        self,
        q: Tensor,
        k: Tensor,
        alpha: float | Tensor,
        is_causal: bool,
        n_free: int,
        dropout_p: float,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(B, H, N_q, N_k) weights, stored."""
        scores = q @ k.mT * self.head_dim**-0.5
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if is_causal:
            i, j = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
            scores = scores.masked_fill(j > i[:, None] + n_free, -torch.inf)
        alpha = alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
        weights = triton_entmax(scores, alpha).to(q.dtype)
        return nn.functional.dropout(weights, dropout_p)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


class LazyAttention(nn.Module):
    r"""Causal self-attention with rotary positions, biases by distance and an elastic softmax.

    W = relu(softmax(q k^T / sqrt(d) + b[h, i-j]) + tau_h / i): see :func:`lazy_attention_triton`.

    Args:
        dim: width of the model.
        num_heads: number of heads; dim / num_heads is even.
        window_size: the largest distance that has a learned bias.
        rope_base: base of the rotary frequencies.

    Parameters: ``attention_biases`` (num_heads, window_size + 1), 0 at first, and ``tau``
    (num_heads,), -1 at first: then a weight survives if it is above average for its row. A bias of
    -inf hides the pairs of its distance as the mask does, whatever tau is.

    Example:
        >>> attention = LazyAttention(dim=64, num_heads=4, window_size=16)
        >>> attention(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int = 512, rope_base: float = 10000
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads), ("window_size", window_size)):
            checks.positive_int(name, value)
        if dim % num_heads or (dim // num_heads) % 2:
            checks.fail("dim", f"be an even multiple of num_heads={num_heads}", dim)
        if not rope_base > 0:
            checks.fail("rope_base", "be positive", rope_base)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window_size, self.rope_base = window_size, rope_base
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.attention_biases = nn.Parameter(torch.empty(num_heads, window_size + 1))
        self.tau = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The biases back to 0 and tau to -1; the projections have their own."""
        nn.init.zeros_(self.attention_biases)
        nn.init.constant_(self.tau, -1.0)

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary embedding, first half against second half, positions from `start`."""
        exact = x if x.dtype == torch.float64 else x.float()
        half = self.head_dim // 2
        powers = torch.arange(half, device=x.device, dtype=exact.dtype) / -half
        position = torch.arange(start, start + x.shape[-2], device=x.device, dtype=exact.dtype)
        angle = position[:, None] * self.rope_base**powers
        first, second = exact.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.to(x.dtype)

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        varlen: Tensor | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        varlen: Tensor | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: Literal[True],
    ) -> tuple[Tensor, KeyValueCache]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        varlen: Tensor | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KeyValueCache]: ...
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        varlen: Tensor | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KeyValueCache]:
        """x (B, N, dim) -> the same, and with ``use_cache`` the cache that x has joined.

        Args:
            mask: boolean, broadcasts to (B, H, N, N), True = allowed.
            varlen: see :func:`lazy_attention_triton`.
            past_key_value: what an earlier call returned with ``use_cache``; x continues it. Needs
                neither ``varlen`` nor a mask.
            use_cache: also return the :class:`KeyValueCache`; its keys are rotated.
        """
        _check_input(x, self.dim)
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if use_cache or past_key_value is not None:
            for name, given in (("varlen", varlen), ("mask", mask)):
                if given is not None:
                    checks.fail(name, "be None for a cache", "a tensor")
        start = 0
        if past_key_value is not None:
            _check_past(past_key_value, (x.shape[0], self.num_heads, None, self.head_dim))
            start = past_key_value.keys.shape[2]
        q, k = self._rotate(q, start), self._rotate(k, start)
        if past_key_value is not None:
            k = torch.cat([past_key_value.keys, k], 2)
            v = torch.cat([past_key_value.values, v], 2)
            out = _torch_lazy.newest(q, k, v, self.attention_biases, self.tau, self.window_size)
        else:
            bias, tau = self.attention_biases, self.tau
            out = lazy_attention_triton(q, k, v, bias, tau, self.window_size, varlen, mask=mask)
        out = self.o_proj(out.transpose(-3, -2).flatten(-2))
        return (out, KeyValueCache(k, v)) if use_cache else out

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"

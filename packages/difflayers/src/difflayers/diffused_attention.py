"""DiffusedHopfield: a Hopfield association whose patterns are smoothed over their kNN graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks

from . import _attention, _checks, _graph, _separation
from .dynamics_engine import DiffusionConfig, TensorCache
from .functional import association_scores
from .hopfield import Hopfield

# On CPU a dense graph of this many patterns is applied as a sparse one: the same numbers, sooner.
_SPARSE_FROM = 512

_DEFAULT = DiffusionConfig()


class DiffusedHopfield(Hopfield):
    """Hopfield association after graph diffusion of its patterns.

    K' = H(L) LN(stored), Q' = LN(state) or H(L_state) LN(state), V = LN(projection) or H(L) of it;
    output = W_o separation(beta W_q(Q') W_k(K')^T) W_v(V).

    L is the Laplacian of the cosine kNN graph of the stored patterns as they are given: one graph
    per batch item, without the padded patterns, built without gradient. H is

    ==================== =========================================================
    factored, iterative  (I - eta L)^steps
    simple               I - eta L
    ppr                  z <- (1 - restart)(I - eta L) z + restart x, steps times
    spectral, heat       exp(-eta steps L): by eigendecomposition, by Chebyshev
    ==================== =========================================================

    Every argument of :class:`Hopfield` is accepted, and ``state_dict`` is the same. With
    ``diffuse_query=False`` (and no adaptive eta) queries do not influence each other.

    Args:
        eta, k_neighbors, ...: the fields of :class:`DiffusionConfig` under their names, except
            energy_stop_tol, which belongs to DynamicsEngine: there is one association here, and
            nothing to stop.
        diffusion_steps: ``DiffusionConfig.steps``.
        config: all of them at once; keywords that contradict it are an error. A ``config.beta``
            other than 1.0 is the scaling.

    ``attention_mode="graph"``: a state associates only with its k most similar stored patterns;
    when state and stored are one tensor these are its neighbours in the graph, itself excluded.
    Patterns of different sizes are compared in the association space.

    The graph of patterns that do not change is kept: patterns that are a parameter, or an
    ``expand`` of one, have their graph built once per optimizer step, and one graph serves the
    batch.

    Example:
        >>> memory = DiffusedHopfield(input_size=8, num_heads=2, eta=0.2, k_neighbors=3)
        >>> memory((torch.randn(2, 20, 8), torch.randn(2, 5, 8), torch.randn(2, 20, 8))).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        output_size: int | None = None,
        pattern_size: int | None = None,
        num_heads: int = 1,
        scaling: float | Tensor | None = None,
        update_steps_max: int | Tensor | None = 0,
        update_steps_eps: float | Tensor = 1e-4,
        *,
        eta: float = _DEFAULT.eta,
        k_neighbors: int = _DEFAULT.k_neighbors,
        diffusion_mode: str = _DEFAULT.diffusion_mode,
        diffusion_steps: int = _DEFAULT.steps,
        attention_mode: str = _DEFAULT.attention_mode,
        use_normalized_laplacian: bool = _DEFAULT.use_normalized_laplacian,
        use_sparse: bool = _DEFAULT.use_sparse,
        diffuse_key: bool = _DEFAULT.diffuse_key,
        diffuse_query: bool = _DEFAULT.diffuse_query,
        diffuse_value: bool = _DEFAULT.diffuse_value,
        use_logit_diffusion: bool = _DEFAULT.use_logit_diffusion,
        logit_eta: float | None = _DEFAULT.logit_eta,
        adaptive_eta: bool = _DEFAULT.adaptive_eta,
        adaptive_temperature: float = _DEFAULT.adaptive_temperature,
        adaptive_threshold: float = _DEFAULT.adaptive_threshold,
        cache_graph: bool = _DEFAULT.cache_graph,
        energy_stop_tol: float = _DEFAULT.energy_stop_tol,
        restart: float = _DEFAULT.restart,
        config: DiffusionConfig | None = None,
        **hopfield: Any,
    ) -> None:
        given = DiffusionConfig(
            eta=eta,
            beta=_DEFAULT.beta,
            steps=diffusion_steps,
            diffusion_mode=diffusion_mode,
            attention_mode=attention_mode,
            k_neighbors=k_neighbors,
            use_normalized_laplacian=use_normalized_laplacian,
            use_sparse=use_sparse,
            diffuse_key=diffuse_key,
            diffuse_query=diffuse_query,
            use_logit_diffusion=use_logit_diffusion,
            logit_eta=logit_eta,
            adaptive_eta=adaptive_eta,
            adaptive_temperature=adaptive_temperature,
            adaptive_threshold=adaptive_threshold,
            cache_graph=cache_graph,
            energy_stop_tol=energy_stop_tol,
            diffuse_value=diffuse_value,
            restart=restart,
        )
        if config is not None and not isinstance(config, DiffusionConfig):
            got = type(config).__name__
            checks.fail("config", "be a DiffusionConfig", got, "see from_dict", TypeError)
        if config is None:
            config = given
        else:
            for field in dataclasses.fields(config):
                mine, default = getattr(given, field.name), field.default
                if field.name != "beta" and mine not in (default, getattr(config, field.name)):
                    checks.fail(field.name, "not contradict `config`", mine)
            if scaling is None and config.beta != _DEFAULT.beta:
                scaling = config.beta
        super().__init__(
            input_size=input_size,
            hidden_size=hidden_size,
            output_size=output_size,
            pattern_size=pattern_size,
            num_heads=num_heads,
            scaling=scaling,
            update_steps_max=update_steps_max,
            update_steps_eps=update_steps_eps,
            **hopfield,
        )
        core = self.association_core
        if config.attention_mode == "graph":
            never = {
                "concat_bias_pattern": core.bias_k is not None,
                "add_zero_association": core.add_zero_attn,
                "use_logit_diffusion": config.use_logit_diffusion,
            }
            for name, used in never.items():
                if used:
                    checks.fail(name, "be False with attention_mode='graph'", True)
            if not isinstance(update_steps_max, int):
                checks.fail(
                    "update_steps_max", "be an int with attention_mode='graph'", update_steps_max
                )
        self.config = config
        self._stored_graph, self._state_graph = TensorCache(), TensorCache()

    def extra_repr(self) -> str:
        changed = [
            f"{f.name}={getattr(self.config, f.name)!r}"
            for f in dataclasses.fields(self.config)
            if getattr(self.config, f.name) != f.default
        ]
        return ", ".join(changed)

    def invalidate(self) -> None:
        """Forget the graphs; needed only after changes that torch does not see (.data)."""
        self._stored_graph.clear()
        self._state_graph.clear()

    def _graph_of(self, cache: TensorCache, x: Tensor, padding: Tensor | None) -> _graph.Graph:
        cfg = self.config
        spectral = cfg.diffusion_mode == "spectral"
        quick = x.is_cpu and x.shape[1] >= _SPARSE_FROM and not torch.compiler.is_compiling()

        def build() -> _graph.Graph:
            _checks.finite("stored" if cache is self._stored_graph else "state", x)
            graph = _graph.build(
                x,
                cfg.k_neighbors,
                None if padding is None else ~padding,
                normalized=cfg.use_normalized_laplacian,
                sparse=(cfg.use_sparse or quick) and not spectral,
                spectral=spectral,
                bounded=cfg.diffusion_mode == "heat",
            )
            if not cfg.use_normalized_laplacian and checks.reads_values(graph.degrees):
                steps = [] if cfg.diffusion_mode in ("spectral", "heat") else [cfg.eta]
                if cfg.use_logit_diffusion:
                    steps.append(cfg.effective_logit_eta)
                for eta in steps:
                    _checks.stable_step(eta, float(graph.degrees.max()) if x.numel() else 0.0)
            return graph

        return cache.get((x, padding), None, build) if cfg.cache_graph else build()

    def _smooth(self, graph: _graph.Graph, x: Tensor, eta: float | Tensor) -> Tensor:
        cfg = self.config
        return _graph.smooth(graph, x, cfg.diffusion_mode, eta, cfg.steps, cfg.restart, cfg.eta)

    def _associate(
        self,
        data: Any,
        padding: Tensor | None,
        mask: Tensor | None,
        raw: bool = False,
        projected: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        cfg = self.config
        if padding is None:
            stored, state, projection = self._patterns(data)
            left_out = None
        else:
            stored, state, projection = _checks.patterns(data, self.batch_first)
            left_out = _checks.padding_mask(padding, *stored.shape[:2])
            if isinstance(data, Tensor):
                state = projection = stored
        alone = state is stored
        key, query, value = self._normalize(stored, state, projection)
        graph = query_graph = None
        along = cfg.attention_mode == "graph"
        if cfg.diffuse_key or cfg.diffuse_value or cfg.use_logit_diffusion or (along and alone):
            graph = self._graph_of(self._stored_graph, stored, left_out)
        if cfg.diffuse_query:
            same = alone and graph is not None
            query_graph = (
                graph
                if same
                else self._graph_of(self._state_graph, state, left_out if alone else None)
            )
        eta: float | Tensor = cfg.eta
        if cfg.adaptive_eta:
            eta = self._adaptive_eta(query, key, value, padding, mask)
        if graph is not None and cfg.diffuse_key:
            key = self._smooth(graph, key, eta)
        if graph is not None and cfg.diffuse_value:
            value = self._smooth(graph, value, eta)
        if query_graph is not None:
            query = self._smooth(query_graph, query, eta)
        if along:
            return self._along_graph(
                stored, state, graph, left_out, (query, key, value), padding, mask, raw, projected
            )
        transform = None
        if graph is not None and cfg.use_logit_diffusion:
            transform = _LogitDiffusion(graph, cfg.effective_logit_eta)
        return self._core(key, query, value, padding, mask, raw, projected, transform)

    def _rule(self) -> _attention.Rule:
        core = self.association_core
        return _attention.Rule(
            _checks.scaling(self._scaling, core.num_heads),
            _separation.resolve(core.separation).normalizer,
        )

    @torch.no_grad()
    def _adaptive_eta(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """eta sigmoid(temperature (entropy - threshold)), (B, 1, 1)."""
        q, k, _ = self.association_core.heads(query, key, value)
        B, cfg, rule = max(q.shape[0], k.shape[0]), self.config, self._rule()
        scores = association_scores(padding, mask, q, k)
        total = torch.zeros(B, dtype=torch.float64, device=q.device)
        L, rows = q.shape[2], max(1, _attention.TILE // max(1, B * q.shape[1] * k.shape[2]))
        for i in range(0, L, rows):
            part = (
                scores if scores is None or scores.shape[-2] == 1 else scores[..., i : i + rows, :]
            )
            w = _attention.association(q[:, :, i : i + rows], k, part, rule).double()
            total = total - torch.special.xlogy(w, w).sum((1, 2, 3))
        entropy = total / max(1, L * q.shape[1])
        gate = torch.sigmoid(cfg.adaptive_temperature * (entropy - cfg.adaptive_threshold))
        dtype = torch.promote_types(q.dtype, torch.float32)
        return (cfg.eta * gate).to(dtype).view(B, 1, 1)

    def _along_graph(
        self,
        stored: Tensor,
        state: Tensor,
        graph: _graph.Graph | None,
        left_out: Tensor | None,
        inputs: tuple[Tensor, Tensor, Tensor],
        padding: Tensor | None,
        mask: Tensor | None,
        raw: bool,
        projected: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        core, rule = self.association_core, self._rule()
        q, k, v = core.heads(*inputs)
        S = k.shape[2]
        if graph is not None and state is stored:
            index, ok = graph.index, graph.ok
        else:
            a, b = (
                (state, stored)
                if state.shape[-1] == stored.shape[-1]
                else (q.detach().transpose(1, 2).flatten(2), k.detach().transpose(1, 2).flatten(2))
            )
            valid = None if left_out is None else ~left_out
            B = max(a.shape[0], b.shape[0])
            a, b = a.detach().expand(B, -1, -1), b.detach().expand(B, -1, -1)
            cosine, index = _graph.nearest(a, b, min(self.config.k_neighbors, S), valid, False)
            ok = cosine > -torch.inf
        scores = association_scores(padding, mask, q, k)
        steps = self._update_steps_max
        for _ in range(steps if isinstance(steps, int) else 0):
            q = _attention.attend_neighbours(q, k, k, index, ok, scores, rule)
        dropout = core.dropout if self.training else 0.0
        heads = _attention.attend_neighbours(q, k, v, index, ok, scores, rule, dropout)
        xi = None
        if raw:
            B, L = heads.shape[0], heads.shape[2]
            seen = torch.zeros(B, L, S, dtype=torch.int8, device=q.device)
            index, ok = index.expand(B, -1, -1), ok.expand(B, -1, -1)
            seen = seen.scatter_add(-1, index, ok.to(torch.int8))[:, None] > 0
            xi = _attention.association(q, k, _attention.merge_masks(seen, scores), rule)
        if projected and v.shape[0] != heads.shape[0]:
            v = v.expand(heads.shape[0], -1, -1, -1)
        return core.output(heads), xi, v if projected else None


class _LogitDiffusion:
    """w -> max(0, (I - eta L) w) over the stored patterns, rescaled to the sum it had."""

    def __init__(self, graph: _graph.Graph, eta: float) -> None:
        self.graph, self.eta = graph, eta

    def __call__(self, weights: Tensor) -> Tensor:
        graph, N = self.graph, self.graph.degrees.shape[1]
        own, extra = weights[..., :N], weights[..., N:]
        B, H, rows, _ = own.shape
        # [B, N, H rows]
        columns = own.flatten(1, 2).mT.to(graph.degrees.dtype)
        if graph.degrees.shape[0] == B:
            moved = graph.laplacian(columns)
        else:
            moved = graph.laplacian(columns.transpose(0, 1).flatten(1)[None])
            moved = moved[0].view(N, B, H * rows).transpose(0, 1)
        new = (columns - self.eta * moved).clamp(min=0.0).mT.view(B, H, rows, N)
        total = new.sum(-1, keepdim=True)
        share = own.sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        new = (new * share).to(weights.dtype)
        return torch.cat((new, extra), -1) if extra.shape[-1] else new

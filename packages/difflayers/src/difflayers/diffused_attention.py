"""DiffusedHopfield: a Hopfield association whose patterns are smoothed over their kNN graph."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.ops import full_precision

from . import _attention, _checks, _graph, _kept, _separation, diffusion
from ._association import association_scores
from ._kept import TensorCache
from ._nearest import nearest
from ._tiles import row_tiles
from .activation import HopfieldCore
from .dynamics_engine import DiffusionConfig
from .hopfield import Hopfield, Setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import HopfieldOptions

# On CPU a dense graph of this many patterns is applied as a sparse one: the same numbers, sooner.
_SPARSE_FROM = 512


class _FromConfig:
    """The default of every setting: that of `config`, or without one of DiffusionConfig."""

    def __repr__(self) -> str:
        return "<from config>"


_CONFIG: Any = _FromConfig()


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
            other than 1.0 is the scaling. The attribute ``config`` may be replaced at any time.
        backend: what runs products with a sparse graph and associations along it: "auto",
            "reference", "torch" or "triton"; ``explain`` says which it is. Everything dense is
            PyTorch's own on every backend.

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
        eta: float = _CONFIG,
        k_neighbors: int = _CONFIG,
        use_normalized_laplacian: bool = _CONFIG,
        diffuse_query: bool = _CONFIG,
        diffuse_key: bool = _CONFIG,
        diffusion_mode: str = _CONFIG,
        diffusion_steps: int = _CONFIG,
        attention_mode: str = _CONFIG,
        use_sparse: bool = _CONFIG,
        use_logit_diffusion: bool = _CONFIG,
        logit_eta: float | None = _CONFIG,
        adaptive_eta: bool = _CONFIG,
        adaptive_temperature: float = _CONFIG,
        adaptive_threshold: float = _CONFIG,
        cache_graph: bool = _CONFIG,
        energy_stop_tol: float = _CONFIG,
        diffuse_value: bool = _CONFIG,
        restart: float = _CONFIG,
        config: DiffusionConfig | None = None,
        backend: str = "auto",
        **hopfield: Unpack[HopfieldOptions],
    ) -> None:
        given: dict[str, Any] = {
            "eta": eta,
            "k_neighbors": k_neighbors,
            "use_normalized_laplacian": use_normalized_laplacian,
            "diffuse_query": diffuse_query,
            "diffuse_key": diffuse_key,
            "diffusion_mode": diffusion_mode,
            "steps": diffusion_steps,
            "attention_mode": attention_mode,
            "use_sparse": use_sparse,
            "use_logit_diffusion": use_logit_diffusion,
            "logit_eta": logit_eta,
            "adaptive_eta": adaptive_eta,
            "adaptive_temperature": adaptive_temperature,
            "adaptive_threshold": adaptive_threshold,
            "cache_graph": cache_graph,
            "energy_stop_tol": energy_stop_tol,
            "diffuse_value": diffuse_value,
            "restart": restart,
        }
        given = {name: value for name, value in given.items() if value is not _CONFIG}
        if config is None:
            config = DiffusionConfig(**given)
        else:
            _is_config(config)
            for name, value in given.items():
                if value != getattr(config, name):
                    keyword = "diffusion_steps" if name == "steps" else name
                    checks.fail(keyword, "not contradict `config`", value)
            if scaling is None and config.beta != 1.0:
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
        self._stored_graph, self._state_graph = TensorCache(), TensorCache()
        self.backend = backend
        self._take_config(config)

    def _take_config(self, config: DiffusionConfig) -> None:
        """Keep ``config``, if this layer can do what it says."""
        _is_config(config)
        is_sparse = config.use_sparse and config.diffusion_mode != "spectral"
        _checks.backend(self.backend, is_sparse or config.attention_mode == "graph")
        if config.attention_mode == "graph":
            core = _core_of(self)
            never = {
                "concat_bias_pattern": core.bias_k is not None,
                "add_zero_association": core.add_zero_attn,
                "use_logit_diffusion": config.use_logit_diffusion,
            }
            for name, used in never.items():
                if used:
                    checks.fail(name, "be False with attention_mode='graph'", True)
            steps = self._update_steps_max
            if not isinstance(steps, int):
                checks.fail("update_steps_max", "be an int with attention_mode='graph'", steps)
        # coefficients for every graph with a normalised L; a compiled program cannot compute them
        self._heat: tuple[float, ...] | None = None
        if config.diffusion_mode == "heat" and config.use_normalized_laplacian:
            self._heat = diffusion.heat_coefficients(config.eta * config.steps)
        self._config = config

    @property
    def config(self) -> DiffusionConfig:
        """The settings; another DiffusionConfig may be given at any time, but for its ``beta``."""
        return self._config

    @config.setter
    def config(self, config: DiffusionConfig) -> None:
        _is_config(config)
        if config.beta != self._config.beta:
            checks.fail(
                "config",
                f"keep beta={self._config.beta}",
                config.beta,
                "beta is the scaling, which is settled when the layer is made",
            )
        self._take_config(config)

    eta = Setting[float]("config.eta")
    k_neighbors = Setting[int]("config.k_neighbors")
    use_normalized_laplacian = Setting[bool]("config.use_normalized_laplacian")
    diffuse_query = Setting[bool]("config.diffuse_query")
    diffuse_key = Setting[bool]("config.diffuse_key")
    diffuse_value = Setting[bool]("config.diffuse_value")
    diffusion_mode = Setting[str]("config.diffusion_mode")
    diffusion_steps = Setting[int]("config.steps")
    attention_mode = Setting[str]("config.attention_mode")
    use_logit_diffusion = Setting[bool]("config.use_logit_diffusion")
    logit_eta = Setting[float]("config.effective_logit_eta")
    adaptive_eta = Setting[bool]("config.adaptive_eta")
    adaptive_temperature = Setting[float]("config.adaptive_temperature")
    adaptive_threshold = Setting[float]("config.adaptive_threshold")
    cache_graph = Setting[bool]("config.cache_graph")

    def get_config(self) -> dict[str, Any]:
        """``config.to_dict()``: field names and values, all JSON types."""
        return self._config.to_dict()

    def extra_repr(self) -> str:
        changed = [
            f"{f.name}={getattr(self._config, f.name)!r}"
            for f in dataclasses.fields(self._config)
            if getattr(self._config, f.name) != f.default
        ]
        return ", ".join(changed)

    def invalidate(self) -> None:
        """Forget the graphs; needed only after changes that torch does not see (.data)."""
        self._stored_graph.clear()
        self._state_graph.clear()

    def invalidate_cache(self) -> None:
        """`invalidate`, by its name in difflayers 0.1.1."""
        self.invalidate()

    def _graph_of(self, cache: TensorCache, x: Tensor, padding: Tensor | None) -> _graph.Graph:
        cfg = self._config
        spectral = cfg.diffusion_mode == "spectral"
        quick = _checks.reads_values(x) and x.shape[1] >= _SPARSE_FROM

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
                backend=self.backend,
            )
            if not cfg.use_normalized_laplacian and _checks.reads_values(graph.degrees):
                steps = [] if cfg.diffusion_mode in ("spectral", "heat") else [cfg.eta]
                if cfg.use_logit_diffusion:
                    steps.append(cfg.effective_logit_eta)
                for eta in steps:
                    largest = float(graph.degrees.max()) if graph.degrees.numel() else 0.0
                    _checks.stable_step(eta, largest)
            return graph

        if cfg.cache_graph:
            return cache.get((x, padding), cfg, build)
        return _kept.make(x.device.type, build)

    def _smooth(self, graph: _graph.Graph, x: Tensor, eta: float | Tensor) -> Tensor:
        """H(L) x; x has one item where the graph has B, or the other way round, or both have B."""
        cfg = self._config
        x = x.expand(_attention.batch_of(graph.degrees, x), -1, -1)
        return diffusion.apply(
            graph,
            x,
            cfg.diffusion_mode,
            eta,
            cfg.steps,
            restart=cfg.restart,
            largest_eta=cfg.eta,
            coefficients=self._heat,
        )

    def _associate(
        self,
        data: Any,
        padding: Tensor | None,
        mask: Tensor | None,
        raw: bool = False,
        projected: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        cfg = self._config
        if padding is None:
            stored, state, projection = self._patterns(data)
            left_out = None
        else:
            stored, state, projection = _checks.patterns(data, self._batch_first)
            left_out = _checks.padding_mask(padding, *stored.shape[:2])
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
            eta = self._adaptive_eta(query, key, value, padding, mask, left_out if alone else None)
        if graph is not None and cfg.diffuse_key:
            key = self._smooth(graph, key, eta)
        if graph is not None and cfg.diffuse_value:
            value = self._smooth(graph, value, eta)
        if query_graph is not None:
            query = self._smooth(query_graph, query, eta)
        transform = neighbours = None
        if along:
            neighbours = _Neighbours(stored, state, graph if alone else None, left_out, cfg)
        elif graph is not None and cfg.use_logit_diffusion:
            transform = _LogitDiffusion(graph, cfg.effective_logit_eta)
        return self._core(
            *(key, query, value, padding, mask, raw, projected, transform, neighbours, self.backend)
        )

    @torch.no_grad()
    def _adaptive_eta(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        left_out: Tensor | None = None,
    ) -> Tensor:
        """eta sigmoid(temperature (entropy - threshold)), (B, 1, 1).

        The entropy is averaged over the states that associate with anything and are not padding.
        """
        core, cfg = _core_of(self), self._config
        projections = core.projections(query, key, value)
        q, k, v = projections.heads(query, key, value)
        scores = association_scores(padding, mask, q, k)
        k, _, scores = projections.append(k, v, scores)
        B, H = _attention.batch_of(q, k), q.shape[1]
        rule = _attention.Rule(
            _checks.scaling(self._scaling, H), _separation.resolve(core.separation).normalizer
        )
        total = torch.zeros(B, dtype=torch.float64, device=q.device)
        counted = torch.zeros_like(total)
        for rows in row_tiles(q.shape[2], B * H * k.shape[2], _attention.TILE):
            part = _attention.mask_rows(scores, rows)
            w = _attention.association_weights(q[:, :, rows], k, part, rule).double()
            counts = (w > 0).any(-1)
            if left_out is not None:
                counts = counts & ~left_out[:, None, rows]
            entropy = -torch.special.xlogy(w, w).sum(-1)
            total = total + torch.where(counts, entropy, 0.0).sum((1, 2))
            counted = counted + counts.sum((1, 2))
        gate = torch.sigmoid(
            cfg.adaptive_temperature * (total / counted.clamp(min=1.0) - cfg.adaptive_threshold)
        )
        dtype = torch.promote_types(q.dtype, torch.float32)
        return (cfg.eta * gate).to(dtype).view(B, 1, 1)


def _is_config(config: Any) -> None:
    if not isinstance(config, DiffusionConfig):
        got = type(config).__name__
        checks.fail("config", "be a DiffusionConfig", got, "see from_dict", TypeError)


def _core_of(layer: Hopfield) -> HopfieldCore:
    """The core, for what only it knows; a wrapper may stand in its place."""
    found = next((m for m in layer.association_core.modules() if isinstance(m, HopfieldCore)), None)
    if found is None:
        got = type(layer.association_core).__name__
        checks.fail("association_core", "be or hold a HopfieldCore", got, error=TypeError)
    return found


class _Neighbours:
    """The stored patterns that each state may see: those of the graph, else the most similar."""

    def __init__(
        self,
        stored: Tensor,
        state: Tensor,
        graph: _graph.Graph | None,
        left_out: Tensor | None,
        config: DiffusionConfig,
    ) -> None:
        self.stored, self.state, self.graph = stored, state, graph
        self.valid = None if left_out is None else ~left_out
        self.config = config

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.graph is not None:
            return self.graph.index, self.graph.ok
        a, b = self.state, self.stored
        if a.shape[-1] != b.shape[-1]:
            # patterns of different sizes are compared in the association space
            a, b = (x.transpose(1, 2).flatten(2) for x in (q, k))
        B = _attention.batch_of(a, b)
        a, b = a.detach().expand(B, -1, -1), b.detach().expand(B, -1, -1)

        def search() -> tuple[Tensor, Tensor]:
            _, index, ok = nearest(a, b, self.config.k_neighbors, self.valid, False)
            return index, ok

        return _kept.make(a.device.type, search)


class _LogitDiffusion:
    """w -> max(0, (I - eta L) w) over the stored patterns that may be seen, rescaled to its sum."""

    def __init__(self, graph: _graph.Graph, eta: float) -> None:
        self.graph, self.eta = graph, eta

    def __call__(self, weights: Tensor, seen: Tensor | None) -> Tensor:
        with full_precision(weights.device.type):
            return self._diffuse(weights, seen)

    def _diffuse(self, weights: Tensor, seen: Tensor | None) -> Tensor:
        graph, N = self.graph, self.graph.degrees.shape[1]
        own, extra = weights[..., :N], weights[..., N:]
        wide = own.to(graph.degrees.dtype)
        if graph.W is not None:
            # W is symmetric: rows of weights are multiplied from the right
            moved = graph.diagonal[:, None, None] * wide - wide @ graph.W[:, None]
        else:
            B, H, rows, _ = own.shape
            # [B, N, H rows]
            columns = wide.flatten(1, 2).mT
            if graph.degrees.shape[0] != B:
                # one graph for every item: the items are columns
                columns = columns.transpose(0, 1).flatten(1)[None]
            moved = graph.laplacian(columns)
            if graph.degrees.shape[0] != B:
                moved = moved[0].view(N, B, H * rows).transpose(0, 1)
            moved = moved.mT.unflatten(1, (H, rows))
        new = (wide - self.eta * moved).clamp(min=0.0)
        if seen is not None:
            new = new.masked_fill(~seen[..., :N], 0.0)
        total = new.sum(-1, keepdim=True)
        share = own.sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        # where all of it would go to patterns that may not be seen, it stays
        new = torch.where(total > 0, new * share, own.to(new.dtype)).to(weights.dtype)
        return torch.cat((new, extra), -1) if extra.shape[-1] else new

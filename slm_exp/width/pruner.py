"""What all width pruners share: how much goes where. A member adds the scores."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from slm_exp.core.cost import Tokens, Work
from slm_exp.core.errors import ArchitectureError, ConfigError, PlanError, require, require_one_of
from slm_exp.core.registry import Fields
from slm_exp.core.together import DepthMethod, Together
from slm_exp.core.types import Group, MergePlan, Target
from slm_exp.core.widths import InputMeans, KeptUnits, WidthDecision, WidthSizes, pack_indices
from slm_exp.merging import sizes
from slm_exp.merging.sizes import Costs, Kept, LayerScores, Shape
from slm_exp.merging.width import narrower_config
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.width.base import M, Width, WidthTask

if TYPE_CHECKING:
    from torch import Tensor

    from slm_exp.width.inputs import Walk

ALLOCATIONS = ("equal", "score", "ecoflap")
RATIO = 0.2
"""Where neither ratio, share nor ratios is set."""
ECOFLAP_SLACK = 0.1
"""A layer may lose at most this much more than the ratio (the LLaMA script's 0.7 for 0.6)."""

PROJECTIONS = 7
"""Of a layer, in every family whose layers may have widths of their own."""


class Scored(NamedTuple):
    """What a member found out."""

    layers: list[LayerScores]
    """Bottom to top."""
    means: list[dict[str, Tensor]] | None = None
    """Per layer, the mean of each input channel of the named projections, for compensation."""
    hidden_D: Tensor | None = None
    """Scores of the residual stream's channels."""


class Extras(NamedTuple):
    """What some decisions need besides the units that stay."""

    means: InputMeans | None = None
    hidden: str | None = None


Choose = Callable[[int, LayerScores], Kept | None]


@dataclass
class Pruner(Width):
    """Removes attention heads and MLP channels of lowest score.

    Every layer gets the same widths unless `uniform=false`; heads are snapped to what grouped-query attention and
    the family's config class allow, channels to multiples of 8, and channels make up for what snapped heads leave.
    """

    published_allocation: ClassVar[str] = "equal"
    compare: ClassVar[str] = "standardised"
    """How scores of different layers and kinds compare, see `sizes.allocate_by_score`."""
    passes: ClassVar[int] = 1
    """Block forwards per layer that the scores are worth."""

    ratio: float | None = None
    """Share of the parameters of all decoder layers to remove; null is 0.2."""
    share: float | None = None
    """Instead of ratio: the part of method.target_ratio that is taken from width, in (0, 1). Depth takes the rest
    first (or last, with order=before), and whoever comes second removes what is still missing."""
    uniform: bool = True
    """The same widths in every layer, saved as an ordinary config. Otherwise a checkpoint brings its own code."""
    layers: list[int] | None = None
    """[start, stop) of the layers to narrow; needs uniform=false. A merged layer is narrowed if all the layers it
    stands for are in the range."""
    counts: str = "dense"
    """What `layers` (or the published range) counts: `dense`, the layers of the dense model; `merged`, those that depth
    left, as released scripts do that prune a merged checkpoint; there a stop beyond the last but one is that."""
    allocation: str | None = None
    """With uniform=false: `equal` ratios, one threshold for all layers' units (`score`), or by ECoFLaP's
    zeroth-order importance of each layer (`ecoflap`). Null is what the method published."""
    ratios: list[float] | None = None
    """With uniform=false, instead of ratio: one per layer of the dense model; a merged layer takes its layers' mean."""
    heads: str = "kv_groups"
    """kv_groups removes key-value heads with all their query heads; within_groups as many query heads from each."""
    ecoflap_samples: int = 2
    """Calibration samples that ECoFLaP's importance looks at; its cost grows with them."""

    def check(self) -> None:
        for name in ("ratio", "share"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, f"width.{name}", value, "null or a share in (0, 1)")
        require_one_of("width.order", self.order, ("after", "before"))
        require_one_of("width.heads", self.heads, sizes.HEAD_UNITS)
        self.at_least(1, "ecoflap_samples")
        if self.allocation is not None:
            require_one_of("width.allocation", self.allocation, ALLOCATIONS)
        given = [f"width.{name}" for name in ("ratio", "share", "ratios") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"set at most one of width.ratio, width.share, width.ratios; got {' and '.join(given)}.")
        for name in ("layers", "allocation", "ratios"):
            value = getattr(self, name)
            require(not self.uniform or value is None, f"width.{name}", value, "null with width.uniform=true",
                    "Layers of different widths need width.uniform=false; their checkpoint brings its own code.")
        require_one_of("width.counts", self.counts, ("dense", "merged"))
        require(not self.uniform or self.counts == "dense", "width.counts", self.counts,
                "dense with width.uniform=true", "All layers get the same widths there.")
        if self.order == "before":
            require(self.uniform, "width.order", self.order, "after with width.uniform=false",
                    "Merging needs layers of one shape: merge first, then narrow.")
        if self.layers is not None:
            ok = len(self.layers) == 2 and 0 <= self.layers[0] < self.layers[1]
            require(ok, "width.layers", self.layers, "two layer numbers, first and one past the last", "Try [4,26].")
        if self.ratios is not None:
            require(all(0 <= r < 1 for r in self.ratios) and any(self.ratios), "width.ratios", self.ratios,
                    "shares in [0, 1), not all zero")
            require(self.allocation is None, "width.allocation", self.allocation, "null when width.ratios are given")

    def identity(self) -> Fields:
        out = super().identity()
        if self.share is None and self.ratios is None:
            out["ratio"] = RATIO if self.ratio is None else self.ratio
        if self._allocation != "ecoflap":
            out.pop("ecoflap_samples")
        if self.counts == "dense":
            out.pop("counts")
        return out

    @property
    def _allocation(self) -> str:
        if self.uniform:
            return "uniform"
        if self.ratios is not None:
            return "given"
        return self.allocation or self.published_allocation

    def refuses(self, others: Together) -> str | None:
        if refused := super().refuses(others):
            return refused
        if others.budget:
            return (f"width = {self.name}; expected none with method.{others.budget}, which the plan alone has to "
                    "meet. method=joint narrows layers under such a budget.")
        if self.share is not None and others.target_ratio is None:
            return (f"width.share = {self.share} is a part of method.target_ratio, which is not set. Set "
                    "method.target_ratio, or width.ratio instead of width.share.")
        if self.share is not None and others.removes_sublayers:
            return (f"width.share = {self.share} with method={others.method}: method.target_ratio counts sublayers "
                    "that stay in the checkpoint at zero, so width would remove the target again. Set width.ratio "
                    "instead of width.share, or take a method that removes whole layers.")
        return None

    def cost(self, sizes: Sizes, layers: float, tokens: Tokens) -> Work:
        passes, heads = self.passes * layers + 2 * layers + sizes.n_layers, 0.0
        if self._allocation == "ecoflap":  # as `layer_importance` says, the layers in proportion to those left
            n = int(layers) if self.counts == "merged" else sizes.n_layers
            start, stop = (at * layers / n for at in self._range(n))
            losses, share = 2 * PROJECTIONS * (stop - start), min(self.ecoflap_samples, tokens.n) / tokens.n
            passes += share * (losses * (layers - (start + stop - 1) / 2) + stop - 1)
            heads = share * losses
        return Work(blocks=passes * sizes.block_flops(tokens.total, tokens.t),
                    head=heads * sizes.head_flops(tokens.total))

    def layers_left(self, sizes: Sizes, target_ratio: float | None) -> int | None:
        if self.share is None or not target_ratio:
            return None
        n, whole = sizes.n_layers, target_ratio * sizes.total
        layer = sizes.layer - (self.share * whole / n if self.order == "before" else 0)
        return n - round((1 - self.share) * whole / layer)

    def params_removed(self, sizes: Sizes, layers: int, target_ratio: float | None) -> int:
        if self.ratios is not None:
            start, stop = self._range(sizes.n_layers)
            return int(sum(self.ratios[start:stop]) / sizes.n_layers * layers * sizes.layer)
        if self.share is None:
            return int((self.ratio or RATIO) * layers * sizes.layer)
        return max(0, int(sizes.with_layers(layers).total - sizes.total + (target_ratio or 0) * sizes.total))

    def depth_method(self, method: M, dense: ModelHandle, start: ModelHandle) -> M:
        if self.share is None or method.target_ratio is None:
            return method
        if self.order == "after":
            return method.with_ratio((1 - self.share) * method.target_ratio)
        ratio = 1 - (1 - method.target_ratio) * dense.n_params / start.n_params
        if ratio <= 0:
            raise ConfigError(f"{self._shared(method)} leaves nothing to depth: width removes "
                              f"{1 - start.n_params / dense.n_params:.4f} of the parameters already. Lower width.share "
                              "or take width.order=after.")
        return method.with_ratio(ratio)

    def check_depth(self, method: DepthMethod, dense: ModelHandle) -> None:
        start = self._outline(method, dense) if self.order == "before" else dense
        depth = self.depth_method(method, dense, start)
        try:
            depth.check_model(start)
        except ConfigError as error:
            if self.share is None:
                raise
            raise ConfigError(f"{self._shared(method)} leaves {depth.target_ratio:.4f} to depth: {error}") from None

    def _shared(self, method: DepthMethod) -> str:
        return f"width.share = {self.share} of method.target_ratio = {method.target_ratio}"

    def _outline(self, method: DepthMethod, dense: ModelHandle) -> ModelHandle:
        """The narrower model as far as shapes go: its sizes are right, its weights are not."""
        slots = MergePlan(dense.n_layers).slots
        shapes = self.plan_sizes(dense, slots, len(slots), self.ratio_for(method, dense, dense))
        config = narrower_config(dense.config, dense.layout.family, self._sizes(shapes or [], dense), self.adds_biases)
        return dataclasses.replace(dense, config=config)

    def target_of(self, method: DepthMethod, target: Target | None) -> Target | None:
        """With `share`: what was asked of the run, and `depth`, what of that was asked of the model depth worked on."""
        if self.share is None or target is None or method.target_ratio is None:
            return target
        return dataclasses.replace(target, asked=method.target_ratio, depth=float(target.asked), share=self.share)

    def ratio_for(self, method: DepthMethod, dense: ModelHandle, handle: ModelHandle) -> float:
        """What to remove, as a share of `handle`'s decoder layers. Raises PlanError: with `share`, depth has already
        removed the whole target."""
        if self.share is None or method.target_ratio is None:
            return RATIO if self.ratio is None else self.ratio
        if self.order == "after":
            remove = handle.n_params - (1 - method.target_ratio) * dense.n_params
        else:
            remove = self.share * method.target_ratio * dense.n_params
        ratio = (remove - self._outside(handle)) / self._layers_size(handle)
        if ratio <= 0:
            raise PlanError(f"width.share = {self.share} leaves nothing to prune: whole layers removed already "
                            f"{1 - handle.n_params / dense.n_params:.3f} of the parameters, method.target_ratio is "
                            f"{method.target_ratio}. Raise either.")
        return ratio

    def check_model(self, handle: ModelHandle, method: DepthMethod) -> None:
        slots, layout = MergePlan(handle.n_layers).slots, handle.layout
        if layout.no_width:
            raise ConfigError(f"width = {self.name}: {layout.family} layers are not narrowed: {layout.no_width}. Take "
                              "width=none and remove or merge layers.")
        require(self.uniform or layout.layerwise, "width.uniform", self.uniform,
                f"true with layers of {layout.family}, which have no code for widths of their own")
        require(self._hidden(handle) == handle.config.hidden_size or layout.layerwise, "width.hidden_size",
                self._hidden(handle), f"null with {layout.family}, whose constants follow the hidden size")
        if self.ratios is not None:
            require(len(self.ratios) == handle.n_layers, "width.ratios", self.ratios,
                    f"{handle.n_layers} shares, one per layer of {handle.name}")
        ratio = self._expected_ratio(method, handle)
        try:
            self.plan_sizes(handle, slots, handle.n_layers, ratio)
        except ConfigError as error:
            if self.share is None:
                raise
            raise ConfigError(f"{self._shared(method)} is about {ratio:.3f} of the decoder layers: {error}") from None

    def _expected_ratio(self, method: DepthMethod, dense: ModelHandle) -> float:
        """What `ratio_for` will come to: with `share` after depth, as if depth removed exactly its part."""
        if self.share is None or method.target_ratio is None or self.order == "before":
            return self.ratio_for(method, dense, dense)
        whole = self._layers_size(dense)
        left = whole - (1 - self.share) * method.target_ratio * dense.n_params
        return (self.share * method.target_ratio * dense.n_params - self._outside(dense)) / max(left, 1.0)

    def _layers_size(self, handle: ModelHandle) -> int:
        """Parameters of all decoder layers."""
        return handle.layer_params * handle.n_layers

    def _outside(self, handle: ModelHandle) -> float:
        """Parameters that a narrower stream takes from embeddings, head and last norm: all in proportion to it."""
        return (handle.n_params - self._layers_size(handle)) * (1 - self._hidden(handle) / handle.config.hidden_size)

    def _hidden(self, handle: ModelHandle) -> int:
        """Hidden size of the result."""
        return self.new_hidden_size or int(handle.config.hidden_size)

    def protected_range(self, n_layers: int) -> tuple[int, int]:
        """The published [start, stop) of layers to narrow when uniform=false and no range is given."""
        return 0, n_layers

    def _range(self, n_layers: int) -> tuple[int, int]:
        """The [start, stop) to narrow of the model that is counted."""
        start, stop = self.layers or self.protected_range(n_layers)
        return start, min(stop, n_layers - 1) if self.counts == "merged" else stop

    def _selected(self, slots: Sequence[Group], n_dense: int) -> list[int]:
        """Layers to narrow, as positions in the model at hand."""
        if self.uniform:
            return list(range(len(slots)))
        merged = self.counts == "merged"
        start, stop = self._range(len(slots) if merged else n_dense)
        require(stop <= n_dense, "width.layers", self.layers, f"a range within the model's {n_dense} layers")
        found = [p for p, slot in enumerate(slots)
                 if (start <= p < stop if merged else start <= slot.start and slot.stop <= stop)]
        if not found:
            raise PlanError(f"width.layers = [{start}, {stop}) holds no whole layer of the {len(slots)} that are left, "
                            f"of {n_dense}. Widen it, e.g. width.layers=[0,{n_dense}].")
        return found

    def plan_sizes(self, handle: ModelHandle, slots: Sequence[Group], n_dense: int, ratio: float,
                    importance: Sequence[float] | None = None) -> list[Shape] | None:
        """Widths of every layer, or None where scores decide. From shapes alone.
        `importance`: per selected layer, for ECoFLaP.
        Raises:
            ConfigError: the ratio leaves no head or no channel; says how much is possible.
            ArchitectureError: the model's layers have different widths already.
        """
        if getattr(handle.config, "layer_widths", None):
            raise ArchitectureError(f"{handle.name} has layers of different widths already; only models of one width "
                                    "can be narrowed. Narrow the model it was made from.")
        full = sizes.full_shape(handle.config)
        hidden = self._hidden(handle)
        wide, costs = sizes.costs_of(handle), sizes.costs_of(handle, hidden)
        shapes = sizes.attention_shapes(full, self.heads)
        if self.uniform:
            shapes = [s for s in shapes if sizes.legal(handle.config, Shape(*s, full.channels), hidden)]
        selected = self._selected(slots, n_dense)
        if self._allocation == "given":
            assert self.ratios is not None
            of = {p: self.ratios[slots[p].start : slots[p].stop] for p in selected}
            local = {p: sum(ratios) / len(ratios) for p, ratios in of.items()}
        elif importance is not None:
            local = dict(zip(selected, ecoflap_ratios(importance, ratio * len(slots) / len(selected)), strict=True))
        else:
            local = dict.fromkeys(selected, ratio * len(slots) / len(selected))
        if not shapes:
            raise ConfigError(f"width.hidden_size = {hidden}: {type(handle.config).__name__} accepts it with no number "
                              f"of heads that is possible here. Try a multiple of {full.heads} (the number of heads), "
                              f"e.g. {hidden // full.heads * full.heads}.")
        whole = wide.size(full)
        most = 1 - costs.size(sizes.smallest(full, shapes)) / whole
        out = [full] * len(slots)
        for p, r in local.items():
            attention = (1 - r) * wide.attention(full.heads, full.kv_heads)
            shape = sizes.fit(full, costs, attention, (1 - r) * whole, shapes)
            if r > most or shape is None:
                where = f" in {len(selected)} of {len(slots)} layers" if len(selected) < len(slots) else ""
                asked, limit = f"width.ratio = {ratio:g}{where}", most * len(selected) / len(slots)
                if self._allocation == "given":
                    asked, limit = f"width.ratios[{_span(range(*slots[p]))}] = {r:g}", most
                raise ConfigError(
                    f"{asked}: expected at most {limit:.3f} for {handle.name}; more leaves no attention head or no MLP "
                    f"channel (one group of {shapes[0][0]} heads and {sizes.CHANNELS} channels stay). Remove layers as "
                    "well.")
            least = 1 - costs.size(full) / whole
            if r < least - 1e-9:
                raise ConfigError(f"width.hidden_size = {hidden} alone removes {least:.3f} of every decoder layer; "
                                  f"expected width.ratio of at least that, not {ratio:g}.")
            out[p] = shape
        return None if self._allocation == "score" else out

    def decide(self, task: WidthTask) -> WidthDecision:
        """Which heads and channels stay. Cost: that of the scores (see the member); with allocation=ecoflap two half
        passes per projection more."""
        handle, full, importance = task.handle, sizes.full_shape(task.handle.config), None
        selected = self._selected(task.slots, task.n_dense)
        if self._allocation == "ecoflap":
            from slm_exp.width.inputs import layer_importance

            importance = layer_importance(handle, task.tokens, selected, self.ecoflap_samples, task.seed)
        shapes = self.plan_sizes(handle, task.slots, task.n_dense, task.ratio, importance)
        found = self.scores(task, lambda layer, s: None if shapes is None else sizes.select(s, shapes[layer]))
        scores, costs = found.layers, sizes.costs_of(handle, self._hidden(handle))
        whole = sizes.costs_of(handle).size(full)
        if shapes is None:
            remove = task.ratio * whole * len(task.slots)
            by_score = sizes.allocate_by_score({p: scores[p] for p in selected}, full, costs, self.heads, remove,
                                               self.compare)
            shapes = [by_score.get(p, full) for p in range(len(task.slots))]
        kept = [sizes.select(s, shape) for s, shape in zip(scores, shapes, strict=True)]
        return self._decision(task, shapes, kept, costs, whole, self.extras(task, kept, found))

    @abstractmethod
    def scores(self, task: WidthTask, choose: Choose) -> Scored:
        """The scores of every layer's units, bottom to top. `choose` says which of a layer stay, where that is known
        before all layers have scores, for methods that look at a layer's input after pruning the ones below."""

    @property
    def adds_biases(self) -> bool:
        """Whether the result has biases that the model at hand has not."""
        return False

    def inputs(self, task: WidthTask, names: Sequence[str]) -> Walk:
        """What flows into the named projections, layer by layer: see `slm_exp.width.inputs`."""
        from slm_exp.width.inputs import walk

        return walk(task.handle, task.tokens, names)

    def extras(self, task: WidthTask, kept: Sequence[Kept], found: Scored) -> Extras:
        """What else the decision needs to be carried out."""
        return Extras()

    def _sizes(self, shapes: Sequence[Shape], handle: ModelHandle) -> WidthSizes:
        return WidthSizes(heads=[s.heads for s in shapes], kv_heads=[s.kv_heads for s in shapes],
                          channels=[s.channels for s in shapes], hidden=self._hidden(handle))

    def _decision(self, task: WidthTask, shapes: Sequence[Shape], kept: Sequence[Kept], costs: Costs, whole: int,
                  extras: Extras) -> WidthDecision:
        config = task.handle.config
        full, hidden = sizes.full_shape(config), self._hidden(task.handle)
        reached = 1 - sum(costs.size(s) for s in shapes) / (whole * len(shapes))
        uniform = len(set(shapes)) == 1 and sizes.legal(config, shapes[0], hidden)
        requested = sum(self.ratios) / len(self.ratios) if self.ratios else task.ratio
        names, spans = ("heads", "key-value heads", "channels"), map(_span, zip(*shapes, strict=True))
        change = ", ".join(f"{name} {before} -> {span}" for name, before, span in zip(names, full, spans, strict=True))
        notes = [f"width: {change}, snapped to legal sizes: {reached:.4f} of the decoder layers' parameters removed, "
                 f"{requested:.4f} requested."]
        if not uniform:
            notes.append("width: layers have widths of their own, so the checkpoint brings its own code: load it with "
                         "slm_exp, or with from_pretrained(..., trust_remote_code=True).")
        return WidthDecision(
            method=self.name, ratio=requested, order=self.order, reached=reached,  # type: ignore[arg-type]
            uniform=uniform, sizes=self._sizes(shapes, task.handle),
            kept=KeptUnits(query_heads=[k.query for k in kept], kv_heads=[k.kv for k in kept],
                           channels=[pack_indices(k.channels, full.channels) for k in kept]),
            tokens=task.tokens.digest, notes=notes,
            **{name: value for name, value in extras._asdict().items() if value is not None},
        )


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}..{high}"


def ecoflap_ratios(importance: Sequence[float], ratio: float) -> list[float]:
    """Share to remove from each of equal layers: important ones lose less, none more than ratio + 0.1.

    Every layer keeps that floor; the rest of what may stay is shared in proportion to importance, up to a whole
    layer, and what a full layer cannot take goes to the others. Source: ECoFLaP, arXiv:2310.02998 (whose released
    code adds such surplus to the wrong side).
    """
    n = len(importance)
    floor = 1 - min(ratio + ECOFLAP_SLACK, 1.0)
    keep, rest = [floor] * n, n * (1 - ratio - floor)
    weights = [max(float(x), 0.0) for x in importance]
    while rest > 1e-12 and (room := [i for i in range(n) if keep[i] < 1 - 1e-12]):
        total, given = sum(weights[i] for i in room), 0.0
        for i in room:
            part = min(1 - keep[i], rest * (weights[i] / total if total else 1 / len(room)))
            keep[i] += part
            given += part
        rest -= given
    return [1 - k for k in keep]

"""`recovery=reconstruct`: the layer beside every cut takes over, by regression, what the cut took away."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.calibration.fit import FitSource
from slm_exp.core.errors import DataError, require, require_one_of
from slm_exp.core.registry import register
from slm_exp.core.types import CalibrationTokens
from slm_exp.engine.ridge import Moments, add_tokens, changed, empty_moments, held_out, input_of, ridge_step
from slm_exp.recovery.base import Healed, HealTask, Recovery
from slm_exp.recovery.streams import beside_cuts, ends, needs_the_dense_stream, stream_scales

if TYPE_CHECKING:
    from torch import Tensor

    from slm_exp.engine.runner import BlockRunner
    from slm_exp.models.base import ModelHandle
    from slm_exp.pipeline.config import RunConfig

log = logging.getLogger(__name__)

LAYERS = ("cuts", "all")
WEIGHTS = ("relative", "equal")
CALLED = (("calibration.", "recovery."), ("calibration=", "recovery, as in calibration="))


@register("recovery", "reconstruct")
@dataclass
class Reconstruct(Recovery):
    """Refit output projections so that the stream behind each cut is the dense model's again. No training.

    Beside a cut means: the merged layer itself, the layer just below removed layers (the one just above, where the
    lowest layers are removed), the layer that lost a half, and every layer of a model pruned in width. From the bottom
    up, on the stream of the model healed so far, the layer's `down_proj` and `o_proj` get the change that brings the
    stream behind it nearest to the dense model's behind the window, by ridge regression. What `o_proj` adds is taken
    as passing the layer's MLP by; a change after which the stream is further off on held-out sequences is taken back.
    Counting each token's error relative to its norm matters: else the few tokens of huge norm draw the fit.

    Cost: two passes over the calibration tokens (dense and compressed), 2 x passes + 1 more of every refitted layer,
    and its normal equations. Memory: two states [N, T, D] in temporary files, and 16 C^2 bytes for C MLP channels.
    """

    path: str | None = None
    """Tokens to fit on: a .npy file [N, T], or texts as in calibration=jsonl; null is the bundled text."""
    field: str = "text"
    """Name of the text field."""
    n_samples: int = 64
    """Sequences; of a .npy file all are taken."""
    seq_len: int = 256
    """Tokens per sequence."""
    layers: str = "cuts"
    """cuts: the layer beside every cut. all: every layer from the first of these up."""
    attention: bool = True
    """Refit o_proj too."""
    passes: int = 2
    """How often each layer's projections are refitted, in turn."""
    ridges: list[float] = dataclasses.field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0])
    """Ridges to choose from, in units of the mean diagonal of the normal equations."""
    weighting: str = "relative"
    """relative: each token's error counts relative to its norm, as the next layer's norm sees it. equal: as it is."""

    def check(self) -> None:
        require(self.n_samples >= 2, "recovery.n_samples", self.n_samples, "a whole number >= 2",
                "One sequence at least is held out.")
        require(self.seq_len >= 2, "recovery.seq_len", self.seq_len, "a whole number >= 2")
        require(self.passes >= 1, "recovery.passes", self.passes, "a whole number >= 1")
        require(bool(self.ridges) and all(r > 0 for r in self.ridges), "recovery.ridges", self.ridges,
                "one or more numbers > 0", "For example [0.01].")
        require_one_of("recovery.layers", self.layers, LAYERS)
        require_one_of("recovery.weighting", self.weighting, WEIGHTS)

    def identity(self) -> dict[str, Any]:
        sizes = ("n_samples", "seq_len", "field", "path")  # of the source: a token file decides them itself
        out = {name: value for name, value in super().identity().items() if name not in sizes}
        return {**out, "tokens": self._source().identity()}

    def refuses(self, cfg: RunConfig) -> str | None:
        return needs_the_dense_stream(cfg)

    def check_data(self, dense: ModelHandle) -> None:
        self._source().check(dense)

    def _source(self) -> FitSource:
        return FitSource(self.path, self.n_samples, self.seq_len, self.field, CALLED)

    def draw(self, task: HealTask) -> CalibrationTokens:
        """The tokens to fit on: none from a document that the plan was found with, where documents are known.

        Raises:
            DataError: too few or too short texts.
        """
        return self._source().draw(task.dense, task.seed, task.tokens)

    def heal(self, task: HealTask) -> Healed:
        tokens = self.draw(task)
        if len(tokens.tokens_NT) < 2:
            raise DataError(f"{tokens.source}: 1 sequence; recovery=reconstruct holds one out and fits on the others.")
        with tempfile.TemporaryDirectory(prefix="slm_exp-reconstruct-") as where:
            found, steps = _Refit(self, task, tokens, Path(where)).run()
        return Healed(found, {"tokens": tokens.describe(), "digest": tokens.digest, "layers": steps})


class _Refit:
    """One pass up both models, side by side."""

    def __init__(self, cfg: Reconstruct, task: HealTask, tokens: CalibrationTokens, where: Path) -> None:
        import torch

        from slm_exp.engine.runner import BlockRunner

        self.cfg, self.task = cfg, task
        self.layout = task.handle.layout
        ids_NT = tokens.tokens_NT
        self.dense = BlockRunner(task.dense, ids_NT, torch.float32)
        self.short = BlockRunner(task.handle, ids_NT, torch.float32)
        self.batches = [slice(at, at + self.short.rows) for at in range(0, len(ids_NT), self.short.rows)]
        self.held_N = held_out(len(ids_NT))
        shape = (*ids_NT.shape, int(task.handle.config.hidden_size))
        self.dense_NTD, self.short_NTD = (_on_disk(where / name, shape) for name in ("dense", "short"))

    def run(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """New tensors by name in the model, and what was done layer by layer."""
        from slm_exp.engine.runner import Slot

        out: dict[str, Tensor] = {}
        steps: list[dict[str, Any]] = []
        plan = self.task.plan
        chosen, slots, scales = beside_cuts(plan, self.cfg.layers), plan.slots, stream_scales(plan)
        if not chosen:
            return out, steps
        at = slots[chosen[0]].start if chosen[0] else 0
        self._embed()
        for i in range(at):  # so far the two models are one
            self._advance(self.dense, self.dense_NTD, Slot(i))
        self.short_NTD.copy_(self.dense_NTD)
        for position in range(chosen[0], chosen[-1] + 1):
            end = ends(plan)[position]
            for i in range(at, end):
                self._advance(self.dense, self.dense_NTD, Slot(i))
            at = end
            weights: dict[str, Tensor] = {}
            if position in chosen:
                lost = {str(h.kind) for h in plan.sublayers if h.layer == slots[position].start}
                weights, step = self._refit(position, lost, scales[position])
                steps.append({"layer": position, "original": list(slots[position]), **step})
                log.info("layer %d: stream off by %.4f, after the refit %.4f", position, step["errors"][0],
                         step["errors"][-1])
                out |= {f"{self.layout.layer_list}.{position}.{name}": t for name, t in weights.items()}
            if position < chosen[-1]:
                self._advance(self.short, self.short_NTD, Slot(position, weights))
        return out, steps

    def _embed(self) -> None:
        from slm_exp.engine.runner import BlockRunner

        for rows in self.batches:  # a runner embeds all it has: one for each batch
            part = BlockRunner(self.task.dense, self.dense.tokens_NT[rows], self.dense.dtype, fuse=False)
            self.dense_NTD[rows] = part.embed()

    def _advance(self, runner: BlockRunner, h_NTD: Tensor, slot: Any) -> None:
        for rows in self.batches:
            h_NTD[rows] = runner.block(slot, h_NTD[rows])

    def _refit(self, position: int, lost: set[str], scale: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One layer's new parameters by name inside it, and how the error fell."""
        halves = ("mlp", "attention") if self.cfg.attention else ("mlp",)
        modules = [m for half in halves if half not in lost for m in self.layout.outputs[half]]
        if not modules:  # of this layer only the attention is left
            modules = [*self.layout.outputs["attention"]]
        weights: dict[str, Tensor] = {}
        kept, lowest = weights, math.inf
        errors: list[float] = []
        ridges: list[float | None] = []
        for module in [*modules * self.cfg.passes, None]:  # the last look only judges the last change
            fit, held = self._moments(position, module, weights, scale)
            if held.rr > lowest:
                weights, ridges[-1] = kept, None
                fit, held = self._moments(position, module, weights, scale)
            kept, lowest = weights, held.rr
            errors.append(held.rr / held.tt)
            if module is not None:
                step = ridge_step(fit, held, self.cfg.ridges)
                ridges.append(step[1] if step else None)
                if step:
                    weights = weights | changed(self.task.handle.layers[position], module, weights, step[0])
        return weights, {"errors": errors, "projections": modules * self.cfg.passes, "ridges": ridges}

    def _moments(
        self, position: int, module: str | None, weights: dict[str, Tensor], scale: float
    ) -> tuple[Moments, Moments]:
        """(fitted on, held out): inputs of a projection against what the layer's output lacks; without one, errors."""
        from slm_exp.engine.runner import Slot

        layer = self.task.handle.layers[position]
        fit, held = (empty_moments(layer, module, self.dense_NTD.shape[-1]) for _ in "12")
        with input_of(layer, module) as seen:
            for rows in self.batches:
                out_NTD = self.short.block(Slot(position, weights), self.short_NTD[rows])
                target_NTD = self.dense_NTD[rows].to(out_NTD.device) * scale
                x_NTC = seen.pop() if module else out_NTD[..., :0]
                add_tokens(fit, held, x_NTC, out_NTD, target_NTD, self.held_N[rows],
                           self.cfg.weighting == "relative")
        return fit, held


def _on_disk(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Float32 states in a file that is mapped into memory: the system keeps of them what it has room for."""
    import torch

    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)

"""Opening a run's model: whole in memory, or with layers that stay in their files (`runtime.memory`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from slm_exp.core.errors import ConfigError
from slm_exp.core.format import human
from slm_exp.core.runtime import available_memory
from slm_exp.models.base import ModelHandle, dtype_name
from slm_exp.models.sizes import BYTES, Sizes

if TYPE_CHECKING:
    import torch

    from slm_exp.pipeline.config import RunConfig

log = logging.getLogger(__name__)

GIB = 2**30
FACTOR = 1.15
"""What a resident run takes at most, in units of the weights, and a GiB besides (docs/scale.md)."""
SMALL = 2 * GIB
"""Weights up to this are loaded whole where they fit, whatever is done with them."""


class Choice(NamedTuple):
    """How a model is held."""

    streamed: bool
    why: str
    fits: bool = True
    may_fit: bool = True
    """Whether the weights, or what of them is in memory, and what is held beside them are less than what is free."""


def held(cfg: RunConfig, weights: float, sizes: Sizes) -> float:
    """Bytes that a resident run holds beside the dense weights, for long: a narrower model's own, since hardly a tensor
    of it is the dense one's, and what takes most of search, merge rule and recovery."""
    narrows = cfg.width.prunes or cfg.method.narrows or bool(cfg.method.replays and cfg.method.replays.width)
    return weights * narrows + max(searching(cfg, sizes), cfg.recovery.memory(sizes, weights / sizes.total))


def searching(cfg: RunConfig, sizes: Sizes) -> float:
    """Bytes that method, merge rule and the refit of candidates take beside model and calibration."""
    fits = cfg.merge_rule.memory(sizes) if cfg.method.uses_merge_rule() else 0
    return max(fits, cfg.method.memory(sizes, cfg.calibration.shape().t)) + cfg.similarity.memory(sizes)


def streamed_part(weights: float, sizes: Sizes) -> float:
    """Bytes of the weights that a streamed run holds: three layers, and what is no layer."""
    return weights * (sizes.total - max(0, sizes.n_layers - 3) * sizes.layer) / sizes.total


def needed(weights: float, own: float = 0) -> float:
    """Bytes that a resident run takes at most, imports included. `own` as in `choose`."""
    return FACTOR * weights + GIB + own


def choose(cfg: RunConfig, weights: float, free: float, files: bool, where: str, put_off: int = 0, own: float = 0,
           least: float = 0) -> Choice:
    """What `runtime.memory` comes to: `auto` streams where a resident run would not fit into what is free, or where a
    large model's plan is only carried out.

    Args:
        weights: bytes.
        free: bytes on the device, which is called `where`.
        files: whether the weights lie in safetensors files.
        put_off: how many parts `model.device_map` finds no device for.
        own: what `held` gives.
        least: what `streamed_part` gives.
    """
    if cfg.runtime.memory != "auto":
        return Choice(cfg.runtime.memory == "stream", "as requested")
    reasons = cfg.needs_resident() or ([] if files else ["it has no files"])
    only_carried_out = (cfg.method.replays is not None and weights > SMALL and not cfg.evaluation.measures
                        and not cfg.recovery.changes_weights)
    takes = needed(weights, own)
    what = (f"a resident run takes about {human(takes)} ({FACTOR + own / weights:.3g} times its weights and a GiB), "
            f"{human(free)} is free on {where}")
    fits = takes <= free and not put_off
    if put_off:
        what += f", and model.device_map=auto would put {put_off} parts off to the CPU or to disk"
    if fits and not only_carried_out:
        return Choice(False, what)
    if reasons:
        return Choice(False, f"{what}; layers do not stay in their files, for {reasons[0]}", fits,
                      weights + own <= free)
    if least + own > free:
        return Choice(True, f"{what}; streamed it holds {human(least + own)}", False, False)
    return Choice(True, ("a plan is only carried out: " if fits else "it does not fit: ") + what)


def opened(cfg: RunConfig, device: torch.device) -> ModelHandle:
    """The dense model; weights load on first use.

    Raises:
        ConfigError: stream, and there are no files to read from; some of a resident model would be put off to other
            devices; auto, and a run that cannot be streamed has no room, whatever else it does.
    """
    dense = cfg.model.open(device, Path(cfg.cache.dir))
    dtype, spread = dtype_name(dense.config, cfg.model.dtype), cfg.model.device_map is not None
    away: list[str] = []
    if spread:
        from slm_exp.models.loading import off_devices, put_off

        away = put_off(dense.config, dtype)
    weights = dense.n_params * BYTES[dtype]
    choice = choose(cfg, weights, free_on(device, spread), dense.load_streamed is not None,
                    f"all {device.type} devices" if spread else str(device), len(away),
                    held(cfg, weights, dense.sizes), streamed_part(weights, dense.sizes))
    if not choice.may_fit and not away:
        rows = "recovery.micro_batch_size=1, " if cfg.recovery.trains() else ""
        raise ConfigError(f"runtime.memory = auto: there is no room: {choice.why}. Use {rows}a smaller model.dtype or "
                          f"a larger machine, or runtime.memory={'stream' if choice.streamed else 'resident'} to try "
                          "it all the same.")
    if away and not choice.streamed:
        raise ConfigError(off_devices(away) + f" It is not streamed now: {choice.why}.")
    if choice.streamed and dense.load_streamed is None:
        raise ConfigError(f"runtime.memory = stream; expected auto or resident: model={cfg.model.name} has no files.")
    how = "layers are read from their files as they run" if choice.streamed else "the whole model is loaded"
    log.log(logging.WARNING if choice.streamed or not choice.fits else logging.INFO, "runtime.memory=%s: %s: %s.",
            cfg.runtime.memory, how, choice.why)
    return dense.stream() if choice.streamed else dense


def free_on(device: torch.device, others: bool = False) -> float:
    """Bytes free on a device, or on all that are visible."""
    if device.type != "cuda":
        return available_memory()
    import torch

    devices = range(torch.cuda.device_count()) if others else [device]
    return float(sum(torch.cuda.mem_get_info(one)[0] for one in devices))

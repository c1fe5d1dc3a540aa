"""Opening a run's model: whole in memory, or with layers that stay in their files (`runtime.memory`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from slm_exp.core.errors import ConfigError
from slm_exp.core.format import human
from slm_exp.core.runtime import available_memory
from slm_exp.models.base import ModelHandle, dtype_name
from slm_exp.models.sizes import BYTES

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


def choose(cfg: RunConfig, weights: float, free: float, files: bool, where: str) -> Choice:
    """What `runtime.memory` comes to: `auto` streams where a resident run would not fit into what is free, or where a
    large model's plan is only carried out.

    Args:
        weights: bytes.
        free: bytes on the device, which is called `where`.
        files: whether the weights lie in safetensors files.
    """
    if cfg.runtime.memory != "auto":
        return Choice(cfg.runtime.memory == "stream", "as requested")
    needed, reasons = FACTOR * weights + GIB, cfg.needs_resident() or ([] if files else ["it has no files"])
    only_carried_out = (cfg.method.replays is not None and weights > SMALL and not cfg.evaluation.measures
                        and not cfg.recovery.changes_weights)
    what = f"a resident run takes about {human(needed)}, {human(free)} is free on {where}"
    if needed <= free and not only_carried_out:
        return Choice(False, what)
    if reasons:
        return Choice(False, f"{what}; layers do not stay in their files, for {reasons[0]}", needed <= free)
    return Choice(True, ("a plan is only carried out: " if needed <= free else "it does not fit: ") + what)


def opened(cfg: RunConfig, device: torch.device) -> ModelHandle:
    """The dense model; weights load on first use.

    Raises:
        ConfigError: stream, and there are no files to read from.
    """
    dense = cfg.model.open(device, Path(cfg.cache.dir))
    weights = dense.n_params * BYTES[dtype_name(dense.config, cfg.model.dtype)]
    choice = choose(cfg, weights, free_on(device), dense.load_streamed is not None, str(device))
    if choice.streamed and dense.load_streamed is None:
        raise ConfigError(f"runtime.memory = stream; expected auto or resident: model={cfg.model.name} has no files.")
    how = "layers are read from their files as they run" if choice.streamed else "the whole model is loaded"
    log.log(logging.WARNING if choice.streamed or not choice.fits else logging.INFO, "runtime.memory=%s: %s: %s.",
            cfg.runtime.memory, how, choice.why)
    return dense.stream() if choice.streamed else dense


def free_on(device: torch.device) -> float:
    """Bytes free on a device."""
    if device.type != "cuda":
        return available_memory()
    import torch

    return float(torch.cuda.mem_get_info(device)[0])

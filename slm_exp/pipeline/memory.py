"""Opening a run's model: whole in memory, or with layers that stay in their files (`runtime.memory`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

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


def opened(cfg: RunConfig, device: torch.device) -> ModelHandle:
    """The dense model; weights load on first use.

    With `auto`, layers stay in their files where a resident run would not fit into what is free, or where a large
    model's plan is only carried out.

    Raises:
        ConfigError: stream, and there are no files to read from.
    """
    dense = cfg.model.open(device, Path(cfg.cache.dir))
    memory = cfg.runtime.memory
    if memory == "resident" or (memory == "auto" and dense.load_streamed is None):
        return dense
    if dense.load_streamed is None:
        raise ConfigError(f"runtime.memory = stream; expected auto or resident: model={cfg.model.name} has no files.")
    if memory == "auto":
        weights = dense.n_params * BYTES[dtype_name(dense.config, cfg.model.dtype)]
        needed, free, reasons = FACTOR * weights + GIB, free_on(device), cfg.needs_resident()
        only_carried_out = (cfg.method.replays is not None and weights > SMALL and not cfg.evaluation.measures
                            and not cfg.recovery.changes_weights)
        what = f"a resident run of {dense.name} takes about {human(needed)}, {human(free)} is free on {device}"
        if needed <= free and not only_carried_out:
            log.info("runtime.memory=auto: resident: %s.", what)
            return dense
        if reasons:
            (log.warning if needed > free else log.info)("runtime.memory=auto: resident, for %s; %s.", reasons[0], what)
            return dense
        why = "only a plan is carried out" if needed <= free else "it does not fit"
        log.warning("runtime.memory=auto: layers are read from the files as they run (%s: %s).", why, what)
    return dense.stream()


def free_on(device: torch.device) -> float:
    """Bytes free on a device."""
    if device.type != "cuda":
        return available_memory()
    import torch

    return float(torch.cuda.mem_get_info(device)[0])

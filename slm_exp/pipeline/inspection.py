"""The look at a job's model and settings before its first stage: refused here, it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slm_exp.models.base import ModelHandle
from slm_exp.models.sketch import Sketch
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.stages import LIGHT_CHECKS, check_model


class Inspection:
    """Looks at every model of a command once, and at each job's settings against it.

    A folder of a model is opened as the run will open it, without weights (transformers is imported, one to four
    seconds); what only exists after a download or a conversion is judged by the numbers that are known of it, and the
    rest in the run's first stage.
    Args:
        device_type: cpu or cuda, as the sketches have it.
        here: the jobs run on this machine: a device that is not there is refused.
    """

    def __init__(self, device_type: str = "cpu", here: bool = True) -> None:
        self.device_type, self.here = device_type, here
        self.sketches: dict[str, Sketch] = {}
        self._seen: dict[str, ModelHandle | None] = {}
        self._passed: dict[str, set[str]] = {}

    def sketch(self, cfg: RunConfig) -> Sketch:
        """Of a job's model. Raises ConfigError: its files cannot work."""
        name = repr(cfg.model)
        if name not in self.sketches:
            self.sketches[name] = cfg.model.sketch(Path(cfg.cache.dir), self.device_type)
        return self.sketches[name]

    def look(self, cfg: RunConfig) -> ModelHandle | None:
        """The job's model as far as it can be seen. Raises SlmError: model, device or settings cannot work; names file
        or field, and the remedy."""
        if self.here:
            cfg.runtime.require_device(cfg.model.device)
        name = repr(cfg.model)
        if name not in self._seen:
            self._seen[name] = cfg.model.look()
        passed = self._passed.setdefault(name, set())
        if (handle := self._seen[name]) is not None:
            check_model(cfg, handle, passed)
            return handle
        if self.here:  # what else `check_model` looks at needs the tokenizer
            cfg.calibration.check_source()
            cfg.recovery.check_source()
            cfg.evaluation.check_data(self.sketch(cfg).random)
        if (handle := self.sketch(cfg).handle) is not None:
            check_model(cfg, handle, passed, LIGHT_CHECKS)
            if not cfg.width.prunes and not (cfg.method.removes_sublayers and cfg.method.target_ratio):
                cfg.method.check_model(handle)  # the others look at modules, which takes torch
        return handle


def inspect_jobs(cfgs: Iterable[RunConfig]) -> None:
    """Look at every job of a command before the first one starts. Raises SlmError: names the first that cannot work."""
    inspection = Inspection()
    for cfg in cfgs:
        inspection.look(cfg)

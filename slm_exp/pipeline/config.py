"""The whole experiment as one typed object; composed by Hydra, checked before anything loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slm_exp.calibration.base import Calibration
from slm_exp.core.cache.digests import remember_in
from slm_exp.core.cache.store import default_cache_dir
from slm_exp.core.errors import ConfigError, caused_by_config, no_field, require, require_one_of
from slm_exp.core.files import digest
from slm_exp.core.plugins import Plugin
from slm_exp.core.registry import GROUPS, Fields, foreign
from slm_exp.core.runtime import Runtime
from slm_exp.core.together import Together
from slm_exp.evaluation.base import Evaluation
from slm_exp.kernels.base import Kernel
from slm_exp.merging.rules.base import MergeRule
from slm_exp.methods.base import Method
from slm_exp.models.base import ModelSource
from slm_exp.recovery.base import Recovery
from slm_exp.runs.tracking.base import Tracking
from slm_exp.similarity.base import Similarity
from slm_exp.width.base import Width

UNSCIENTIFIC = ("tracking", "runtime")


@dataclass
class CacheConfig:
    """Where grid cells share results."""

    dir: str = field(default_factory=default_cache_dir)
    """Folder of the stage cache and of converted weights."""
    enabled: bool = True
    """False computes every stage anew (converted weights are still kept)."""
    accept: str = "version"
    """Which finished results count: those of the same version of slm_exp (`version`), or only those of the same source,
    torch, transformers and lm-eval besides (`exact`)."""


@dataclass
class RunConfig:
    """One experiment. Every field but seed, save_model and cache is a config group."""

    model: ModelSource
    calibration: Calibration
    kernel: Kernel
    similarity: Similarity
    method: Method
    merge_rule: MergeRule
    width: Width
    recovery: Recovery
    evaluation: Evaluation
    tracking: Tracking
    runtime: Runtime
    seed: int = 0
    """Seeds calibration, shuffles and recovery."""
    save_model: bool | None = None
    """Write model/: null means yes in a single run, no in a multirun."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number >= 0 and < 2^63, as torch takes")
        require(bool(self.cache.dir.strip()), "cache.dir", repr(self.cache.dir), "a folder",
                "cache.enabled=false keeps nothing.")
        require(max(map(len, Path(self.cache.dir).parts)) < 256, "cache.dir", f"{self.cache.dir[:60]}...",
                "a folder, each part of whose name has at most 255 characters")
        remember_in(Path(self.cache.dir))
        require_one_of("cache.accept", self.cache.accept, ("version", "exact"))
        self.merge_rule = self.method.merge_rule(self.merge_rule)
        check_together(self)

    @property
    def run_id(self) -> str:
        """16 hex digits over everything that decides the result (see `science`)."""
        return digest(self.science())

    def science(self) -> dict[str, Any]:
        """The resolved scientific config: never tracking, folders or device."""
        groups = {name: getattr(self, name).identity() for name in GROUPS if name not in UNSCIENTIFIC}
        return {**groups, "seed": self.seed}

    @property
    def plugins(self) -> list[Plugin]:
        """Those that members of this config come from."""
        return foreign([*(getattr(self, name) for name in GROUPS), *self.recovery.parts()])

    @property
    def cache_folder(self) -> Path | None:
        """Of the stage cache; None where nothing is kept: switched off, or a member whose code has no file, so that no
        key could see it change (a notebook's cell)."""
        return Path(self.cache.dir) if self.cache.enabled and all(plugin.digest for plugin in self.plugins) else None

    @property
    def _kernel_decides(self) -> bool:
        return self.similarity.uses_kernel() or self.method.uses_layer_similarity

    def plan_identity(self) -> Fields:
        """What decides the plan besides model and tokens: kernel and rule only where score or method look at them."""
        similarity = {**self.similarity.score_identity(), **self.similarity.after_identity()}
        if self._kernel_decides:
            similarity |= self.similarity.identity() | {"kernel": self.kernel.identity()}
        rule = self.merge_rule.identity() if self.method.uses_merge_rule() else None
        return {"method": self.method.identity(), "rule": rule, "similarity": similarity}

    def matrix_identity(self) -> Fields:
        """What decides the layer similarity matrix besides model and tokens: kernel and CKA estimator."""
        estimator = {k: v for k, v in self.similarity.identity().items() if k not in ("name", "after")}
        return {"kernel": self.kernel.identity(), "estimator": estimator}

    def in_force(self) -> list[str]:
        """What holds where the config leaves a choice open, and `advice`; for `--cfg job`."""
        saved = ["save_model: yes in a single run, no in a multirun"] if self.save_model is None else []
        return [line for name in GROUPS for line in getattr(self, name).in_force()] + saved + self.advice()

    def needs_resident(self) -> list[str]:
        """Why the model's layers cannot stay in their files; nothing where they can."""
        members = (getattr(self, name) for name in GROUPS)
        return [reason for member in members if (reason := member.needs_resident())]

    def advice(self) -> list[str]:
        """Settings that are allowed but do less than they seem to."""
        out = []
        if self.kernel.name != "linear" and not self._kernel_decides:
            out.append(f"kernel={self.kernel.name} shapes the similarity matrix only; candidates are scored by "
                       f"{self.similarity.name}. Add similarity=cka to let the kernel decide.")
        if self.merge_rule.name != "top_layer" and not self.method.uses_merge_rule():
            out.append(f"merge_rule={self.merge_rule.name} plays no part: method={self.method.name} merges nothing.")
        if self.similarity.after and self.similarity.after not in [part.name for part in self.recovery.parts()]:
            out.append(f"similarity.after={self.similarity.after} scores candidates refitted, and recovery="
                       f"{self.recovery.name} leaves the plan's model without a refit. Add recovery="
                       f"{self.similarity.after}.")
        return out + self.evaluation.advice()

    def resolved(self) -> dict[str, Any]:
        """Every setting with the member's name in each group, JSON-able: `config` of the record."""
        groups = {name: {"name": getattr(self, name).name, **asdict(getattr(self, name))} for name in GROUPS}
        return {**groups, "seed": self.seed, "save_model": self.save_model, "cache": asdict(self.cache)}


def check_together(cfg: RunConfig) -> None:
    """Checks across groups. Raises ConfigError."""
    plan = cfg.method.replays
    if cfg.similarity.after and (cfg.method.compensate or (plan and plan.compensation)):
        raise ConfigError(f"similarity.after = {cfg.similarity.after}; expected null with a compensated plan "
                          "(method.compensate): a refit restores the norm of the residual stream after a cut already.")
    if cfg.similarity.after and cfg.method.narrows:
        raise ConfigError(f"similarity.after = {cfg.similarity.after}; expected null with method={cfg.method.name}, "
                          "whose prices are of predictions.")
    others = Together(method=cfg.method.name, recovery=cfg.recovery.name, target_ratio=cfg.method.target_ratio,
                      budget=cfg.method.budgeted, removes_sublayers=cfg.method.removes_sublayers,
                      narrows=cfg.method.narrows, plan=plan, plan_path=cfg.method.plan_path,
                      similarity=cfg.similarity.name, by_sample=cfg.similarity.by_sample,
                      new_hidden_size=cfg.width.new_hidden_size, model_dtype=cfg.model.dtype)
    if cfg.runtime.memory == "stream" and (reasons := cfg.needs_resident()):
        raise ConfigError(f"runtime.memory = stream; expected auto or resident, for {reasons[0]}.")
    of_groups = (group.refuses(others) for group in (cfg.method, cfg.width, cfg.recovery))
    for refused in (*of_groups, cfg.evaluation.refuses()):
        if refused:
            raise ConfigError(refused)


def to_run_config(cfg: Any) -> RunConfig:
    """From a composed Hydra config (its `hydra`, `experiment` and `sweep` nodes ignored) to the typed object. Raises
    ConfigError: with the field, its value, what was wanted and the remedy."""
    _refuse_added_keys(cfg)
    try:
        run_config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise (caused_by_config(error) or ConfigError(where + str(error).splitlines()[0])) from None
    assert isinstance(run_config, RunConfig)
    return run_config


def _refuse_added_keys(cfg: Any, where: str = "") -> None:
    """`+group.key=1` adds keys that no schema knows and Hydra lets pass."""
    kind = OmegaConf.get_type(cfg)
    if not is_dataclass(kind):
        return
    known = {f.name for f in fields(kind)}
    for key in cfg:
        name = f"{where}{key}"
        if key not in known:
            raise ConfigError(f"+{name}: {no_field(name, sorted(known))}")
        value = cfg._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none():
            _refuse_added_keys(value, f"{name}.")


def register_schema() -> None:
    """Put RunConfig into Hydra's ConfigStore as `run_schema`, the base of conf/config.yaml."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)

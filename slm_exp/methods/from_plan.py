"""Replay a plan file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from slm_exp.core.conf import PUBLISHED, published_file
from slm_exp.core.errors import ConfigError, PlanError, require
from slm_exp.core.files import digest, read_json
from slm_exp.core.registry import Fields, available, register
from slm_exp.core.types import MergePlan
from slm_exp.merging.rules.base import MergeRule
from slm_exp.merging.surgery import apply_plan
from slm_exp.merging.width import check_width
from slm_exp.methods.base import Method
from slm_exp.models.base import ModelHandle
from slm_exp.search.task import PlanTask

DEFAULT_RULE = "top_layer"
"""conf/config.yaml's: a merge_rule of this name may just not have been set."""


@register("method", "from_plan")
@dataclass
class FromPlan(Method):
    """Do what a plan.json says; no search. Any run's will do; `groups`, `dropped` and `rule` suffice.

    The plan's merge rule is used, its compensation applied as it stands (`compensate` finds it anew), and its score
    measured on this run's tokens. A plan without `n_layers` is for whatever model the run has. What counts for the
    run_id is what the plan does, not where the file lies.
    Cost: the dense pass and one model.
    """

    path: str = ""
    """A plan.json, a run's folder that holds one, or published:SOURCE/MODEL/NAME, a set of conf/published."""

    def check(self) -> None:
        super().check()
        require(bool(self.path), "method.path", repr(self.path), "a plan.json or the folder of a run")
        narrowed_before = self.given.width is not None and self.given.width.order == "before"
        require(not (self.compensate and narrowed_before), "method.compensate", self.compensate,
                "null: the plan in method.path narrows the model before it cuts layers",
                "The compensation would be that of the wide model; ask for it in the run that makes the plan.")

    def no_target(self, name: str) -> tuple[str, str]:
        return "null: method=from_plan takes the size of its plan", ""

    @property
    def replays(self) -> MergePlan | None:
        return self.given

    @property
    def plan_path(self) -> str:
        return self.path

    @property
    def given(self) -> MergePlan:
        """The plan as it stands in the file; where that names no `n_layers`, for the fewest it can be for. Raises
        ConfigError: there is no such file, or it is no plan."""
        return self._read[0]

    @cached_property
    def _read(self) -> tuple[MergePlan, bool]:
        """The plan, and whether the file names the number of layers."""
        named, _, name = self.path.partition(PUBLISHED)
        path = published_file(name) if name and not named else Path(self.path).expanduser()
        path = path / "plan.json" if path.is_dir() else path
        try:
            data = read_json(path)
            plan = MergePlan.from_json(data, bare=True)
            if plan.fitted:
                plan.fitted.lies_in(path.parent)
                plan.fitted.read()
            return plan, data.get("n_layers") is not None
        except (OSError, ValueError, PlanError) as error:
            why = f"there is no {path}" if isinstance(error, FileNotFoundError) else f"{path} is none ({error})"
            wanted = "a plan.json or the folder of a run"
            raise ConfigError(f"method.path = {self.path}; expected {wanted}: {why}.") from None

    def plan_for(self, handle: ModelHandle) -> MergePlan:
        """The plan, for this model. Raises ConfigError: it is for another number of layers; says which of its layers
        are not there."""
        made, named = self._read
        require(not named or made.n_layers == handle.n_layers, "method.path", self.path,
                f"a plan for the {handle.n_layers} layers of {handle.name}", f"This one is for {made.n_layers}.")
        try:
            return replace(made, n_layers=handle.n_layers)
        except PlanError as error:
            raise ConfigError(f"method.path = {self.path}; expected a plan for {handle.name}: {error}") from None

    def identity(self) -> Fields:
        effect = {k: v for k, v in self.given.effect().items() if k != "n_layers"}  # the model's, or refused
        return {k: v for k, v in super().identity().items() if k != "path"} | {"plan": digest(effect)}

    def uses_merge_rule(self) -> bool:
        return bool(self.given.groups)

    def merge_rule(self, requested: MergeRule) -> MergeRule:
        """The plan's rule, where the plan merges and names one. Raises ConfigError: `requested` is another than the
        plan's and not the default, or the plan's is unknown."""
        name = self.given.rule
        if not (self.given.groups and name) or requested.name == name:
            require(requested.fits == (self.given.fitted is not None) or not self.given.groups, "merge_rule",
                    requested.name, "the plan's own rule, whose layers lie beside it",
                    "The plan in method.path names no file with layers that this rule has fitted.")
            return requested
        rules = available("merge_rule")
        require(name in rules, "rule of the plan in method.path", name, "one of " + ", ".join(rules))
        require(requested.name == DEFAULT_RULE, "merge_rule", requested.name, f"{name}, by which the plan merges",
                "Leave merge_rule out: method=from_plan takes the plan's.")
        rule: MergeRule = rules[name]()  # type: ignore[assignment]
        require(rule.fits == (self.given.fitted is not None), "fitted of the plan in method.path", self.given.fitted,
                "a file with the merged layers, which this rule fits" if rule.fits else f"none: {name} fits nothing")
        return rule

    def needs_resident(self) -> str | None:
        return f"the plan in method.path = {self.path} narrows layers" if self.given.width else None

    def layers_left(self, handle: ModelHandle) -> int | None:
        return self.plan_for(handle).n_layers_out

    def check_model(self, handle: ModelHandle) -> None:
        super().check_model(handle)
        if self.given.fitted:
            from slm_exp.merging.fitted import check

            try:
                check(self.plan_for(handle), handle)
            except PlanError as error:
                raise ConfigError(f"method.path = {self.path}: {error}") from None
        if not self.given.width:
            return
        rule, plan = available("merge_rule").get(self.given.rule or DEFAULT_RULE), self.plan_for(handle)
        try:
            if self.given.width.order == "after":
                handle = apply_plan(handle, replace(plan, width=None), rule() if rule else None)  # type: ignore[arg-type]
            check_width(handle, self.given.width)  # the narrower config takes the model's own class, and torch
        except (PlanError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"method.path = {self.path}; expected a plan whose width fits {handle.name}: {error}."
                              ) from None

    def plan(self, task: PlanTask) -> MergePlan:
        made = self.plan_for(task.handle)
        size = f" at threshold {made.threshold:g}" if made.threshold is not None else ""
        note = (f"replays a plan of method={made.method}{size}.",) if made.method else ()
        plan = replace(made, method=self.name, rule=task.rule.name if made.groups else "", notes=note,
                       similarity=task.similarity.name, threshold=None, target=None, final_score=None, trace=(),
                       evaluations=0, block_forwards=0)
        return replace(task, fitted=made.fitted).scored(plan, self.compensate)

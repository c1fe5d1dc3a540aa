from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slm_exp.core.cost import Work
from slm_exp.core.errors import ConfigError, DataError, SlmError, caused_by_config, did_you_mean, require
from slm_exp.core.registry import Fields, available, register
from slm_exp.core.together import Together
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import Recovery, RecoveryResult, RecoveryTask, with_tensors
from slm_exp.recovery.fitted import Fitted
from slm_exp.recovery.gain import chain_report, held_out_loss, loss_cost

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
EXAMPLE = "For example recovery.steps=[reconstruct,lora], or '[{name: reconstruct, passes: 1}, lora]' with settings."


@register("recovery", "chain")
@dataclass
class Chain(Recovery):
    """Several recoveries, one after the other, each on the model that the one before left.

    Each step is kept in the stage cache by itself: another last step finds the first ones there, and a killed run goes
    on with the step that was not done. The record says of each what the loss on held-out passages was before and after
    it (recovery/gain.py). Of several `lora` steps, `lora/` holds the last one's adapter.
    Cost: that of the steps, and one forward pass over 3,072 tokens before the first and after each.
    """

    steps: list[Any] = field(default_factory=list)
    """Names of recoveries, or mappings of `name` and the recovery's own fields, in the order in which they run."""

    def check(self) -> None:
        require(isinstance(self.steps, list) and len(self.steps) > 0, "recovery.steps", self.steps,
                "a list of recoveries", EXAMPLE)
        maps = [part.maps_stream for part in self.parts()]
        for i, part in enumerate(self.parts()):
            require(not (isinstance(part, Fitted) and not part.maps_stream and any(maps[:i])), f"recovery.steps[{i}]",
                    part.name, "no regression after maps of the stream, which it would take for nothing",
                    "Put it before them.")

    def parts(self) -> tuple[Recovery, ...]:
        return self._parts

    @cached_property
    def _parts(self) -> tuple[Recovery, ...]:
        return tuple(_step(f"recovery.steps[{i}]", step) for i, step in enumerate(self.steps))

    def identity(self) -> Fields:
        return {"name": self.name, "steps": self._each(lambda part: part.identity())}

    def refuses(self, others: Together) -> str | None:
        refused = (part.refuses(replace(others, recovery=part.name)) for part in self.parts())
        return next(filter(None, refused), None)

    def check_source(self) -> None:
        self._each(lambda part: part.check_source())

    def check_data(self, dense: ModelHandle) -> None:
        self._each(lambda part: part.check_data(dense))

    def lengths(self) -> dict[str, int]:
        return {name.replace("recovery.", f"recovery.steps[{i}].", 1): n for i, part in enumerate(self.parts())
                for name, n in part.lengths().items()}

    def _each(self, of: Callable[[Recovery], T]) -> list[T]:
        """What every step gives; its complaints in the names of the chain."""
        out = []
        for i, part in enumerate(self.parts()):
            try:
                out.append(of(part))
            except (ConfigError, DataError) as error:
                raise _named(f"recovery.steps[{i}]", error) from None
        return out

    def needs_resident(self) -> str | None:
        return next(filter(None, (part.needs_resident() for part in self.parts())), None)

    def trains(self) -> bool:
        return any(part.trains() for part in self.parts())

    def ranks(self) -> int:
        return max(part.ranks() for part in self.parts())

    def stored(self) -> bool:
        return all(part.stored() for part in self.parts())

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        costs = [part.cost(sizes, layers) for part in self.parts()]
        losses = loss_cost(sizes, layers) * (len(costs) + 1)
        return sum((work for work, _ in costs), losses), [note for _, notes in costs for note in notes]

    def memory(self, sizes: Sizes, width: float) -> float:
        return max(part.memory(sizes, width) for part in self.parts())

    def recover(self, task: RecoveryTask) -> RecoveryResult:
        """All steps in one go. A run carries them out as stages of their own, which the cache keeps one by one."""
        from slm_exp.recovery.judged import judged

        tensors: dict[str, Tensor] = {}
        reports, losses = [], [held_out_loss(task.handle, task.dense, task.tokens)]
        for part in self.parts():
            result = judged(part, task)
            tensors |= result.tensors
            task = replace(task, handle=with_tensors(task.handle, result, {"recovery": part.identity()}))
            reports.append(result.report)
            losses.append(held_out_loss(task.handle, task.dense, task.tokens))
        return RecoveryResult(tensors, chain_report([p.name for p in self.parts()], reports, losses))


def _step(where: str, given: Any) -> Recovery:
    """One step from its name, or from a mapping. Raises ConfigError: names the step, its field, what was wanted."""
    known = {name: kind for name, kind in available("recovery").items() if cast(type[Recovery], kind).changes_weights}
    del known["chain"]
    settings = {"name": given} if isinstance(given, str) else given
    require(isinstance(settings, dict) and isinstance(settings.get("name"), str), where, given,
            "the name of a recovery, or a mapping with its `name`", EXAMPLE)
    name = settings["name"]
    require(name != "chain", where, name, "a recovery that is no chain", "Write its steps in this list.")
    require(name in known, where, name, f"one of {', '.join(known)}", did_you_mean(name, known))
    kind, own = known[name], {key: value for key, value in settings.items() if key != "name"}
    names = [f.name for f in fields(kind)]
    for key in own:
        require(key in names, f"{where}.{key}", own[key],
                f"a field of recovery={name}: {', '.join(names)}", did_you_mean(key, names))
    try:
        return cast(Recovery, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), own)))
    except OmegaConfBaseException as error:
        if refused := caused_by_config(error):
            raise _named(where, refused) from None
        raise ConfigError(f"{where}.{error.full_key}: {str(error).splitlines()[0]}.") from None
    except ConfigError as error:
        raise _named(where, error) from None


def _named(where: str, error: SlmError) -> SlmError:
    """A recipe's complaint, in the names of the chain."""
    return type(error)(str(error).replace("recovery.", f"{where}."))

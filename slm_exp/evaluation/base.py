"""The `evaluation` group: what is measured on the dense and on the compressed model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.cost import Work
from slm_exp.core.errors import ConfigError, DataError, did_you_mean, require
from slm_exp.core.registry import register
from slm_exp.evaluation import cost, task_index
from slm_exp.evaluation.documents import MMLU_GROUPS, SPLIT, documents_source, missing_documents
from slm_exp.evaluation.gate import check_range
from slm_exp.evaluation.measure import measure
from slm_exp.evaluation.perplexity import FILES, corpus_identity, load_corpora, missing_corpora, unknown_corpus
from slm_exp.evaluation.protocol import read_protocol, require_same
from slm_exp.evaluation.report import SEVEN, EvalReport
from slm_exp.evaluation.settings import Settings
from slm_exp.models.sizes import Sizes

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle

__all__ = ["SEVEN", "EvalReport", "Evaluation"]

CHECKED_BYTES = 4_000_000
"""Texts up to this size are cut into chunks before weights load, to see that there are any."""


@register("evaluation", "custom")
@dataclass
class Evaluation(Settings):
    """Zero-shot tasks, perplexity and speed; presets in conf/evaluation fill the fields."""

    def refuses(self) -> str | None:
        """Why this evaluation makes no sense: an unknown task, an unknown corpus, a file that is not there; or None.

        Costs microseconds for tasks whose documents come with the assets; any other makes lm-eval index its task files
        (10 s, once).
        """
        for name, where in self.corpora.items():
            reason = unknown_corpus(where)
            if reason:
                return f"evaluation.corpora.{name} = {where}: {reason}"
        if self.protocol is not None and not Path(self.protocol).is_file():
            return f"evaluation.protocol = {self.protocol}: there is no such file; give the protocol.json of a run."
        return self._unknown_task()

    def check_data(self, random_model: bool = False) -> None:
        """Raise DataError where documents or hub sets are known to be out of reach; call before weights load.

        Looks at what is installed, at the offline switches and at folder names; opens nothing.
        """
        missing = missing_documents(self.tasks, random_model) or missing_corpora(self.wanted_corpora())
        if missing:
            raise DataError(missing)

    def check_model(self, handle: ModelHandle) -> None:
        """Raise where a generation to time is longer than the model or a file has no chunk; call before weights load.

        Cost: files of texts up to CHECKED_BYTES are read and tokenised; a larger one cannot be too short.

        Raises:
            ConfigError: the former.
            DataError: the latter.
        """
        tokenizer = handle.tokenizer if self.tasks else None
        if tokenizer is not None and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ConfigError(f"evaluation.tasks: the tokenizer of {handle.name} has neither BOS nor EOS, so "
                              "nothing stands before a request without context. Set bos_token or eos_token in its "
                              "tokenizer_config.json, or evaluation.tasks=[].")
        files = {n: w for n, w in self.corpora.items() if w.endswith(FILES) and Path(w).stat().st_size <= CHECKED_BYTES}
        if any(not where.endswith(".npy") for where in self.wanted_corpora().values()):
            handle.require_room("evaluation.ppl_seq_len", self.ppl_seq_len)
        load_corpora(files, handle, self.ppl_seq_len, self.ppl_bos)
        longest = getattr(handle.config, "max_position_embeddings", None) or math.inf
        for case in self.cases() if self.times else ():
            require(case.prompt + case.new <= longest, "evaluation.speed_prompts + speed_new",
                    f"{case.prompt} + {case.new}", f"at most {handle.name}'s {longest} tokens")

    def advice(self) -> list[str]:
        """What will not be measured although it was requested."""
        gone = [name for name in self.corpora if name not in self.wanted_corpora()]
        return [f"perplexity of {name} is left out: {self.corpora[name]} is not on this machine, which is offline. "
                f"Give a file: evaluation.corpora.{name}=path/to/{name}.txt" for name in gone]

    def _unknown_task(self) -> str | None:
        others = [task for task in self.tasks if task not in SPLIT and task not in MMLU_GROUPS]
        others = [task for task in others if task not in task_index.bundled_tasks()]
        known = task_index.task_names() if others else set()
        for task in others:
            if task not in known:
                return f"evaluation.tasks: lm-eval has no task {task!r}. {did_you_mean(task, [*SEVEN, *known])}"
        return None

    def identity(self) -> dict[str, Any]:
        """Corpora by what their files hold, and which documents the tasks use."""
        out = super().identity()
        out["corpora"] = {name: corpus_identity(where) for name, where in self.wanted_corpora().items()}
        out["documents"] = documents_source() if self.tasks else None
        del out["corpora_at_hand"]  # it shows in which corpora there are
        return {name: value for name, value in out.items() if self.times or not name.startswith("speed_")}

    def measured_by(self) -> dict[str, Any]:
        """What distinguishes reports in the stage cache: the backend too, for its rounding, but not the speed."""
        report = {name: value for name, value in self.identity().items() if not name.startswith("speed_")}
        return {"evaluation": report, "backend": self.backend}

    def cost(self, sizes: Sizes, layers: float, random: bool) -> tuple[Work, list[str]]:
        """Measuring a model of so many layers, and what could not be counted. See evaluation/cost.py."""
        return cost.measuring(self, sizes, layers, random)

    def generation_cost(self, sizes: Sizes, layers: float, weight_bytes: float) -> Work:
        """Timing generations of the dense model and of one with so many layers."""
        return cost.generating(self, sizes, layers, weight_bytes)

    def run(self, handle: ModelHandle) -> EvalReport:
        """Measure a model. See evaluation/measure.py."""
        return measure(self, handle)

    def time(self, dense: ModelHandle, compressed: ModelHandle) -> dict[str, Any]:
        """The record's `speed`: both models in turns, measured anew every time. See evaluation/backends/speed.py."""
        from slm_exp.evaluation.backends.speed import measure_speed

        return measure_speed(self, dense, compressed).to_json()

    def accept(self, report: EvalReport, dense: bool) -> None:
        """Refuse a report of another protocol than `protocol`, or of a dense model outside `dense_range`.

        Raises:
            ProtocolError: what was expected, what came, and what to check.
        """
        if self.protocol is not None:
            expected = read_protocol(Path(self.protocol)).to_json()
            require_same({f"evaluation.protocol={self.protocol}": expected, "this run": report.protocol.to_json()},
                         "Change the settings, or leave evaluation.protocol unset.")
        if dense:
            check_range(report, self.dense_range)

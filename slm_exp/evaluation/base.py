"""The `evaluation` group: what is measured on the dense and on the compressed model."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slm_exp.calibration.text import CHECKED_BYTES
from slm_exp.core.errors import ConfigError, DataError, ProtocolError, did_you_mean, require
from slm_exp.core.files import no_file
from slm_exp.core.registry import Fields, register
from slm_exp.evaluation import free_text, task_index
from slm_exp.evaluation import perplexity as texts
from slm_exp.evaluation.cost import generating, measuring
from slm_exp.evaluation.documents import HUB, MMLU_GROUPS, SPLIT, documents_source, missing_documents, missing_examples
from slm_exp.evaluation.protocol import Protocol, read_protocol, require_same
from slm_exp.evaluation.report import SEVEN, EvalReport, average
from slm_exp.evaluation.settings import Settings
from slm_exp.models.base import ModelHandle

__all__ = ["SEVEN", "EvalReport", "Evaluation"]

CHECK = ("Check the model (path, revision, dtype), BOS (evaluation.add_bos, evaluation.ppl_bos), the documents "
         "(evaluation.limit, the protocol's task versions) and the range itself; ~evaluation.dense_range.NAME takes "
         "one away.")


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
            if reason := texts.unknown_corpus(where):
                return f"evaluation.corpora.{name} = {where}: {reason}"
        if self.protocol is not None:
            if reason := no_file(Path(self.protocol)):
                return f"evaluation.protocol = {self.protocol}: {reason} Give the protocol.json of a run."
            try:
                read_protocol(Path(self.protocol))
            except ProtocolError as error:
                return f"evaluation.protocol: {error}"
        return self._unknown_task() or missing_examples(self.fewshot)

    def needs_resident(self) -> str | None:
        if self.times:
            return "evaluation.speed_runs times generation, and reading the files would be timed"
        if self.processes > 1:
            return "evaluation.processes shares weights that are in memory"
        if self.tasks and self.backend == "hflm":
            return "evaluation.backend=hflm reads the whole model for every few requests; take fast"
        others = [task for task in self.tasks if task not in SEVEN and task not in MMLU_GROUPS]
        return f"evaluation.tasks: {others[0]} may generate text; the seven tasks and mmlu do not" if others else None

    def check_data(self, random_model: bool = False) -> None:
        """Raise DataError where documents or hub sets are out of reach; call before weights load.

        Looks at what is installed, at the offline switches and at folder names; what lies on the hub alone costs one
        short request to it (5 s where it does not answer).
        """
        missing = missing_documents(self.tasks, random_model)
        missing = missing or texts.missing_corpora(self.wanted_corpora(), random_model, self.corpora_at_hand)
        if missing := missing or (free_text.missing_openings(random_model) if self.text else None):
            raise DataError(missing)

    def check_files(self, handle: ModelHandle) -> None:
        """Raise DataError where a token file is of another vocabulary, or a text has fewer bytes than a chunk has
        tokens. Looks at the model's config alone; call before weights load."""
        for name, where in self.corpora.items():
            texts.check_file(where, handle, texts.chunk_tokens(name, self.ppl_seq_len))

    def check_model(self, handle: ModelHandle) -> None:
        """Raise where tasks find no special token or a file has no chunk; call before weights load.

        Cost: files of texts up to CHECKED_BYTES are read and tokenised; a larger one cannot be too short.
        Raises:
            ConfigError: the former.
            DataError: the latter.
        """
        if self.processes > 1 and handle.device.type == "cuda":
            import torch

            require(self.processes <= torch.cuda.device_count(), "evaluation.processes", self.processes,
                    f"at most {torch.cuda.device_count()}, the GPUs that are visible")
        tokenizer = handle.tokenizer if self.tasks else None
        if tokenizer is not None and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ConfigError(f"evaluation.tasks: the tokenizer of {handle.name} has neither BOS nor EOS, so "
                              "nothing stands before a request without context. Set bos_token or eos_token in its "
                              "tokenizer_config.json, or evaluation.tasks=[].")
        files = {n: w for n, w in self.corpora.items()
                 if w.endswith(texts.FILES) and Path(w).stat().st_size <= CHECKED_BYTES}
        texts.load_corpora(files, handle, self.ppl_seq_len, self.ppl_bos)

    def lengths(self) -> dict[str, int]:
        """The longest sequence that each setting makes the model read."""
        corpora = self.wanted_corpora()
        out = {f"evaluation.corpora.{name}": length for name, where in corpora.items()
               if (length := texts.row_length(where))}
        for name, where in corpora.items():
            if not where.endswith(".npy"):
                size = texts.chunk_tokens(name, self.ppl_seq_len)
                field = "ppl_seq_len" if size == self.ppl_seq_len else f"corpora.{name}"
                out[f"evaluation.{field}"] = size + (self.ppl_bos in ("every_chunk", "both"))
        if self.times:
            out["evaluation.speed_prompts + speed_new"] = max(case.prompt + case.new for case in self.cases())
        return out

    def advice(self) -> list[str]:
        """What will not be measured although it was requested."""
        gone = [name for name in self.corpora if name not in self.wanted_corpora()]
        return [f"perplexity of {name} is left out: {self.corpora[name]} is not on this machine, which is offline. "
                f"Give a file: evaluation.corpora.{name}=path/to/{name}.txt" for name in gone]

    def _unknown_task(self) -> str | None:
        others = [task for task in self.tasks if task not in (*SPLIT, *MMLU_GROUPS, *HUB)]
        known = task_index.written_names() if others else set()  # whole, but for a typo also quick
        if set(others) <= known:
            others = [task for task in others if task not in task_index.bundled_tasks()]
            known = task_index.task_names() if others else set()
        for task in others:
            if task not in known:
                return f"evaluation.tasks: lm-eval has no task {task!r}. {did_you_mean(task, [*SEVEN, *known])}"
        return None

    def identity(self) -> Fields:
        """Corpora by what their files hold, and which documents the tasks use."""
        out = super().identity()
        out["corpora"] = {name: texts.corpus_identity(where) for name, where in self.wanted_corpora().items()}
        out["documents"] = documents_source() if self.tasks else None
        del out["corpora_at_hand"]  # it shows in which corpora there are
        if not self.fewshot:
            del out["fewshot"]
        out["text"] = free_text.RULE if self.text else None
        if not self.text:
            del out["text"]
        return {name: value for name, value in out.items() if self.times or not name.startswith("speed_")}

    def measured_by(self) -> dict[str, Any]:
        """What distinguishes reports in the stage cache: the backend too, for its rounding, but not the speed."""
        report = {name: value for name, value in self.identity().items() if not name.startswith("speed_")}
        return {"evaluation": report, "backend": self.backend}

    cost = measuring
    generation_cost = generating

    def run(self, handle: ModelHandle) -> EvalReport:
        """Measure a model. The same settings give the same protocol whatever the batch size, backend or device. Raises
        DataError: documents or texts that are missing or too short, a model without a tokenizer where text has to be
        read, NaN or infinite logits."""
        corpora = texts.load_corpora(self.wanted_corpora(), handle, self.ppl_seq_len, self.ppl_bos)
        loaded = results = text = None
        if (self.tasks or self.text) and handle.tokenizer is None:
            raise DataError(f"{handle.name} has no tokenizer, and tasks are text. Use evaluation=none, or corpora of "
                            "token files.")
        if self.tasks:
            from slm_exp.evaluation.backends.harness import load_tasks, run_tasks  # lm-eval takes seconds to import

            # before weights load, so that missing documents stop early
            loaded = load_tasks(self.tasks, self.limit, handle.random, self.fewshot)
        with self._crew(handle) as crew:
            losses = {name: (crew or texts).chunk_losses(handle.model, corpus.tokens_NT, self.batch_size, name)
                      for name, corpus in corpora.items()}
            if loaded is not None and handle.tokenizer is not None:
                results = run_tasks(handle.model, handle.tokenizer, loaded, self.limit, self.batch_size, self.add_bos,
                                    self.backend, crew.gather if crew else None)
        samples = results.samples if results else {}
        if self.text and handle.tokenizer is not None:
            from slm_exp.evaluation.backends.free_text import write_freely

            text, samples[free_text.NAME] = write_freely(handle.model, handle.tokenizer, self.batch_size)
        fields: dict[str, Any] = {
            "lm_eval": version("lm-eval"),
            "tasks": {n: {k: v for k, v in asdict(task).items() if k != "differs" or v}
                      for n, task in results.protocol.items()} if results else {},
            "limit": self.limit,
            **(results.settings if results else {}),
            "dtype": str(handle.model.dtype).removeprefix("torch.") if results or corpora or text else None,
            "perplexity": {name: corpus.protocol for name, corpus in corpora.items()},
            **({"text": free_text.RULE} if text else {}),
        }
        tasks = results.tasks if results else {}
        return EvalReport(tasks, average(tasks), {name: texts.exp_of_mean(loss_N) for name, loss_N in losses.items()},
                          Protocol.of(fields, results.sources if results else {}),
                          {**samples, **texts.samples(corpora, losses)}, text)

    def _crew(self, handle: ModelHandle) -> contextlib.AbstractContextManager[Any]:
        if self.processes == 1 or not (self.tasks or self.corpora):
            return contextlib.nullcontext()
        from slm_exp.evaluation.backends.crew import crew

        return crew(handle.model, handle.tokenizer, self.processes, (self.batch_size, self.add_bos, self.backend))

    def time(self, dense: ModelHandle, compressed: ModelHandle) -> dict[str, Any]:
        """The record's `speed`: both models in turns, measured anew every time. See evaluation/backends/speed.py."""
        from slm_exp.evaluation.backends.speed import measure_speed

        return measure_speed(self, dense, compressed)

    def accept(self, report: EvalReport, dense: bool) -> None:
        """Refuse a report of another protocol than `protocol`, or of a dense model outside `dense_range`. Raises
        ProtocolError: what was expected, what came, and what to check."""
        if self.protocol is not None:
            expected = read_protocol(Path(self.protocol)).to_json()
            require_same({f"evaluation.protocol={self.protocol}": expected, "this run": report.protocol.to_json()},
                         "Change the settings, or leave evaluation.protocol unset.")
        outside = []
        for name, (low, high) in self.dense_range.items() if dense else ():
            got = report.number(name)
            if got is None or not low <= got <= high:
                value = "nothing" if got is None else f"{got:.4g}"
                outside.append(f"{name}: expected {low:g} to {high:g}, got {value}")
        if outside:
            raise ProtocolError(f"the dense model is outside evaluation.dense_range: {'; '.join(outside)}. {CHECK}")

"""The `evaluation` group: what is measured on the dense and on the compressed model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import DataError, did_you_mean, require, require_one_of
from slm_exp.core.registry import Component, knob, register

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle

SEVEN = {  # task -> the metric that enters the seven-task average
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
BOS_TOO = "_bos"
"""Added to a corpus's name for its perplexity with BOS before every chunk (`ppl_bos=both`)."""
CHECKED_BYTES = 4_000_000
"""Texts up to this size are cut into chunks before weights load, to see that there are any."""


@register("evaluation", "custom")
@dataclass
class Evaluation(Component):
    """Zero-shot tasks, perplexity and speed; presets in conf/evaluation fill the fields."""

    tasks: list[str] = field(default_factory=list)
    """lm-eval task names; documents of the seven come with the assets, others must be at hand or downloadable."""
    limit: int | None = None
    """The first N documents of each task; null takes all."""
    batch_size: int | None = knob(None)
    """Sequences per forward pass; null chooses."""
    backend: str = knob("fast")
    """`fast` computes what a document's choices share once; `hflm` is lm-eval's own model class. Same numbers."""
    add_bos: bool | None = None
    """Start every request with BOS; null leaves it to the tokenizer, as stock lm-eval does."""
    corpora: dict[str, str] = field(default_factory=dict)
    """Perplexity: name -> .txt or .jsonl text, .npy token file, or hub set (wikitext2, ptb, c4)."""
    ppl_seq_len: int = 128
    """Tokens per chunk for perplexity."""
    ppl_bos: str = "once"
    """BOS `once` at the very start, at the start of `every_chunk`, or `never`; `both` gives a corpus a second number,
    NAME_bos, with BOS before every chunk. Token files are taken as they are."""
    corpora_at_hand: bool = False
    """Leave out hub corpora that cannot be had here, with a warning, instead of stopping."""
    speed_runs: int = 0
    """Generations of the papers' case (12 tokens in, 128 out, batch 1), dense and compressed in turns; 0: no speed."""
    speed_discard: int = 10
    """The first of them, which do not count."""
    speed_batches: list[int] = field(default_factory=lambda: [1])
    """Further cases: every combination of these batch sizes ..."""
    speed_prompts: list[int] = field(default_factory=lambda: [12])
    """... with these numbers of tokens in ..."""
    speed_new: list[int] = field(default_factory=lambda: [128])
    """... and out."""
    speed_grid_runs: int = 5
    """Counted generations of each further case."""
    protocol: str | None = knob(None)
    """The protocol.json of a run: anything measured otherwise stops the run, naming the field that differs."""
    dense_range: dict[str, Any] = field(default_factory=dict, metadata={"science": False})
    """What the dense model is known to reach, e.g. {average: [38, 44]}; outside of it nothing is compressed.

    Keys: `average`, a task (per cent, by the metric that counts for it) or a corpus (perplexity).
    """

    def check(self) -> None:
        require(self.limit is None or self.limit >= 1, "evaluation.limit", self.limit, "null or a number >= 1")
        require(self.batch_size is None or self.batch_size >= 1, "evaluation.batch_size", self.batch_size,
                "null or a number >= 1")
        require(len(set(self.tasks)) == len(self.tasks), "evaluation.tasks", self.tasks, "each task once")
        require_one_of("evaluation.backend", self.backend, ("fast", "hflm"))
        require_one_of("evaluation.ppl_bos", self.ppl_bos, ("once", "every_chunk", "never", "both"))
        require(self.ppl_seq_len >= 2, "evaluation.ppl_seq_len", self.ppl_seq_len, "a number >= 2")
        twice = [name for name in self.corpora if self.ppl_bos == "both" and name + BOS_TOO in self.corpora]
        require(not twice, "evaluation.corpora", list(self.corpora), f"no {', '.join(n + BOS_TOO for n in twice)}",
                "evaluation.ppl_bos=both gives these names to the numbers with BOS before every chunk.")
        self._check_speed()
        for name, bounds in self.dense_range.items():
            where = f"evaluation.dense_range.{name}"
            pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2
            numbers = pair and all(isinstance(bound, (int, float)) for bound in bounds)
            require(numbers and bounds[0] <= bounds[1], where, bounds, "two numbers [low, high]")
            seven = name == "average" and set(SEVEN) <= set(self.tasks)
            corpus = name in self.corpora or (self.ppl_bos == "both" and name.removesuffix(BOS_TOO) in self.corpora)
            require(seven or name in self.tasks or corpus, where, bounds,
                    "average (of the seven tasks), or one of evaluation.tasks or evaluation.corpora")

    def _check_speed(self) -> None:
        require(self.speed_runs >= 0, "evaluation.speed_runs", self.speed_runs, "a number >= 0")
        if self.speed_runs:
            require(0 <= self.speed_discard < self.speed_runs, "evaluation.speed_discard", self.speed_discard,
                    f"0 to {self.speed_runs - 1}, fewer than evaluation.speed_runs = {self.speed_runs}")
        require(self.speed_grid_runs >= 1, "evaluation.speed_grid_runs", self.speed_grid_runs, "a number >= 1")
        for name in ("batches", "prompts", "new"):
            values = getattr(self, f"speed_{name}")
            require(bool(values) and min(values) >= 1, f"evaluation.speed_{name}", values, "numbers >= 1, one at least")

    @property
    def measures(self) -> bool:
        """Whether anything is measured that the stage cache keeps."""
        return bool(self.tasks or self.corpora)

    @property
    def times(self) -> bool:
        """Whether latency is measured."""
        return bool(self.speed_runs)

    def refuses(self) -> str | None:
        """Why this evaluation makes no sense: an unknown task, an unknown corpus, a file that is not there; or None.

        Costs microseconds for tasks whose documents come with the assets; any other makes lm-eval index its task files
        (10 s, once).
        """
        from slm_exp.evaluation.perplexity import unknown_corpus

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
        from slm_exp.evaluation.documents import missing_documents
        from slm_exp.evaluation.perplexity import missing_corpora

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
        from slm_exp.evaluation.perplexity import FILES, load_corpora
        from slm_exp.evaluation.speed import cases

        files = {n: w for n, w in self.corpora.items() if w.endswith(FILES) and Path(w).stat().st_size <= CHECKED_BYTES}
        load_corpora(files, handle, self.ppl_seq_len, self.ppl_bos)
        longest = getattr(handle.config, "max_position_embeddings", None) or math.inf
        for case in cases(self) if self.speed_runs else ():
            require(case.prompt + case.new <= longest, "evaluation.speed_prompts + speed_new",
                    f"{case.prompt} + {case.new}", f"at most {handle.name}'s {longest} tokens")

    def wanted_corpora(self) -> dict[str, str]:
        """`corpora`, without those that may be left out and cannot be had here."""
        from slm_exp.evaluation.perplexity import missing_corpora

        return {name: where for name, where in self.corpora.items()
                if not (self.corpora_at_hand and missing_corpora({name: where}))}  # fmt: skip

    def advice(self) -> list[str]:
        """What will not be measured although it was asked for."""
        gone = [name for name in self.corpora if name not in self.wanted_corpora()]
        return [f"perplexity of {name} is left out: {self.corpora[name]} is not on this machine, which is offline. "
                f"Give a file: evaluation.corpora.{name}=path/to/{name}.txt" for name in gone]

    def _unknown_task(self) -> str | None:
        from slm_exp.evaluation.documents import MMLU_GROUPS, SPLIT

        others = [task for task in self.tasks if task not in SPLIT and task not in MMLU_GROUPS]
        if not others:
            return None
        from slm_exp.evaluation.harness import bundled_tasks, task_names

        others = [task for task in others if task not in bundled_tasks()]
        known = task_names() if others else set()
        for task in others:
            if task not in known:
                return f"evaluation.tasks: lm-eval has no task {task!r}. {did_you_mean(task, [*SEVEN, *known])}"
        return None

    def identity(self) -> dict[str, Any]:
        """Corpora by what their files hold, and which documents the tasks are asked on."""
        from slm_exp.evaluation.documents import documents_source
        from slm_exp.evaluation.perplexity import corpus_identity

        out = super().identity()
        out["corpora"] = {name: corpus_identity(where) for name, where in self.wanted_corpora().items()}
        out["documents"] = documents_source() if self.tasks else None
        del out["corpora_at_hand"]  # it shows in which corpora there are
        return out if self.speed_runs else _without_speed(out)

    def measured_by(self) -> dict[str, Any]:
        """What the stage cache tells reports apart by: the backend too, whose rounding is its own; never the speed."""
        return {"evaluation": _without_speed(self.identity()), "backend": self.backend}

    def run(self, handle: ModelHandle) -> EvalReport:
        """Measure a model. See evaluation/harness.py and evaluation/perplexity.py."""
        from slm_exp.evaluation.measure import measure

        return measure(self, handle)

    def time(self, dense: ModelHandle, compressed: ModelHandle) -> dict[str, Any]:
        """The record's `speed`: both models in turns, measured anew every time. See evaluation/speed.py."""
        from slm_exp.evaluation.speed import measure_speed

        return measure_speed(self, dense, compressed)

    def accept(self, report: EvalReport, dense: bool) -> None:
        """Refuse a report of another protocol than `protocol`, or of a dense model outside `dense_range`.

        Raises:
            ProtocolError: what was expected, what came, and what to check.
        """
        from slm_exp.evaluation.gate import check_range
        from slm_exp.evaluation.protocol import read_protocol, require_same

        if self.protocol is not None:
            require_same({f"evaluation.protocol={self.protocol}": read_protocol(Path(self.protocol)),
                          "this run": report.protocol}, "Change the settings, or leave evaluation.protocol unset.")
        if dense:
            check_range(report, self.dense_range)


def _without_speed(identity: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if not name.startswith("speed_")}


@dataclass(frozen=True)
class EvalReport:
    """One model's measurements, as in record.json's `eval.dense` / `eval.compressed`."""

    tasks: dict[str, dict[str, Any]]
    """name -> {acc, acc_norm where defined, acc_stderr, acc_norm_stderr, n}; a standard error is None at n = 1."""
    average: float | None
    """Seven-task mean of the contract, in [0, 1]; None when a task of it is missing."""
    perplexity: dict[str, float]
    protocol: dict[str, Any]
    """{hash, fields}: what must be equal for two numbers to be comparable; `sources` says where documents came from."""
    samples: dict[str, list[dict[str, Any]]]
    """task -> one dict per document (doc_id, doc_hash, target, per-choice log-likelihoods, acc, acc_norm)."""

    def to_json(self) -> dict[str, Any]:
        """Without the samples, which have a folder of their own."""
        return {"tasks": self.tasks, "average": self.average, "perplexity": self.perplexity, "protocol": self.protocol}

    def save_samples(self, folder: Path) -> None:
        """One <task>.jsonl.gz per task; the same results give the same bytes."""
        import gzip
        import json

        from slm_exp.core.files import plain, writing

        for task, rows in self.samples.items():
            with writing(folder / f"{task}.jsonl.gz") as tmp:
                with open(tmp, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as f:
                    for row in rows:
                        f.write((json.dumps(plain(row), ensure_ascii=False) + "\n").encode())

    def save(self, folder: Path) -> None:
        """report.json and samples/."""
        from slm_exp.core.files import write_json

        self.save_samples(folder / "samples")
        write_json(folder / "report.json", self.to_json())

    @classmethod
    def load(cls, folder: Path) -> EvalReport:
        import gzip
        import json

        samples = {}
        for path in sorted((folder / "samples").glob("*.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as f:
                samples[path.name.removesuffix(".jsonl.gz")] = [json.loads(line) for line in f]
        return cls(**json.loads((folder / "report.json").read_text()), samples=samples)

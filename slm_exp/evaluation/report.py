"""What was measured on one model: scores, seven-task average, perplexities and the protocol; how it lies on disk."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_exp.core.documents import Section
from slm_exp.core.files import plain, write_json, writing
from slm_exp.evaluation.protocol import Protocol

SEVEN = {  # task -> the metric that enters the seven-task average
    "boolq": "acc", "piqa": "acc", "hellaswag": "acc_norm", "winogrande": "acc", "arc_easy": "acc",
    "arc_challenge": "acc_norm", "openbookqa": "acc_norm",
}  # fmt: skip
Row = dict[str, Any]
"""A document in the schema of its set, or what a model answered to it."""


@dataclass(frozen=True)
class TaskScore:
    """A task's metrics, in [0, 1]."""

    metrics: dict[str, float | None]
    """acc, acc_norm where defined, acc_stderr and so on; a standard error is None at n = 1."""
    n: int | None = None
    """Documents; None for groups that do not say."""

    def to_json(self) -> dict[str, float | None]:
        return {**self.metrics, "n": self.n}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TaskScore:
        return cls({name: value for name, value in stored.items() if name != "n"}, stored.get("n"))


class FreeText(Section):
    """Means over the texts that a model wrote freely, see free_text.py."""

    n: int = 0
    length: float | None = None
    """Tokens written."""
    ended: float | None = None
    """Share of texts that the model ended by itself."""
    distinct_1: float | None = None
    """Distinct tokens, as a share of all of a text."""
    distinct_3: float | None = None
    """Distinct runs of three tokens, as a share of all."""
    loop: float | None = None
    """Tokens of a text's longest loop."""
    looping: float | None = None
    """Share of texts at least half of which is one loop."""


class Spread(Section):
    """Some timings: quartiles by linear interpolation, standard deviation of the population as in the papers."""

    median: float
    q1: float
    q3: float
    mean: float | None = None
    std: float | None = None
    n: int | None = None


class Timing(Section):
    """One model's generation in one case."""

    latency_s: Spread | None = None
    tokens_per_s: Spread | None = None
    first_token_s: Spread | None = None
    peak_bytes: int | float | None = None
    """Weights and what grew during a generation; None where the system does not tell."""
    flops: int | float | None = None


class SpeedCase(Section):
    """Both models in one case, or the error that a case ended in."""

    name: str = ""
    """batch x prompt x new"""
    batch: int = 0
    prompt: int = 0
    new: int = 0
    dense: Timing = Timing()
    compressed: Timing = Timing()
    speedup: Spread | None = None
    """Of dense / compressed latency, run by run."""
    error: str = ""


@dataclass(frozen=True)
class EvalReport:
    """One model's measurements, as in record.json's `eval.dense` / `eval.compressed`."""

    tasks: dict[str, TaskScore]
    average: float | None
    """Seven-task mean of the contract, in [0, 1]; None when a task of it is missing."""
    perplexity: dict[str, float]
    protocol: Protocol
    samples: dict[str, list[Row]]
    """task -> one dict per document (doc_id, doc_hash, target, per-choice log-likelihoods, acc, acc_norm), and
    `perplexity-CORPUS` -> one per chunk (its loss, nll)."""
    text: FreeText | None = None
    """Health of free text; its texts stand in `samples`."""

    def to_json(self) -> dict[str, Any]:
        """Without the samples, which have a folder of their own."""
        tasks = {name: score.to_json() for name, score in self.tasks.items()}
        return {"tasks": tasks, "average": self.average, "perplexity": self.perplexity,
                **({"text": self.text.model_dump()} if self.text else {}), "protocol": self.protocol.to_json()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], samples: dict[str, list[Row]] | None = None) -> EvalReport:
        """A section of record.json's `eval`, or a report.json."""
        tasks = {name: TaskScore.from_json(score) for name, score in stored["tasks"].items()}
        return cls(tasks, stored["average"], dict(stored["perplexity"]), Protocol.from_json(stored["protocol"]),
                   samples or {}, FreeText(**stored["text"]) if stored.get("text") else None)  # fmt: skip

    def number(self, name: str) -> float | None:
        """Per cent of `average` or a task, by the metric that counts, or a corpus's perplexity; None: not measured."""
        if name in self.perplexity:
            return self.perplexity[name]
        metrics = self.tasks[name].metrics if name in self.tasks else {}
        value = self.average if name == "average" else metrics.get(metric_of(name, metrics) or "")
        return None if value is None else 100 * value

    def save_samples(self, folder: Path) -> None:
        """One <task>.jsonl.gz per task; the same results give the same bytes."""
        for task, rows in self.samples.items():
            with (writing(folder / f"{task}.jsonl.gz") as tmp, open(tmp, "wb") as raw,
                  gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as f):  # fmt: skip
                f.writelines((json.dumps(plain(row), ensure_ascii=False) + "\n").encode() for row in rows)

    def save(self, folder: Path) -> None:
        """report.json and samples/."""
        self.save_samples(folder / "samples")
        write_json(folder / "report.json", self.to_json())

    @classmethod
    def load(cls, folder: Path) -> EvalReport:
        samples = {}
        for path in sorted((folder / "samples").glob("*.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as f:
                samples[path.name.removesuffix(".jsonl.gz")] = [json.loads(line) for line in f]
        return cls.from_json(json.loads((folder / "report.json").read_text()), samples)


def metric_of(task: str, scores: Mapping[str, int | float | str | None]) -> str | None:
    """The metric that counts for a task: the seven-task average's, else acc, acc_norm, or the first number there."""
    wanted = [SEVEN[task]] if task in SEVEN else ["acc", "acc_norm"]
    numbers = [k for k, v in scores.items() if isinstance(v, float) and not k.endswith("_stderr")]
    return next((name for name in [*wanted, *numbers] if scores.get(name) is not None), None)


def average(tasks: Mapping[str, TaskScore]) -> float | None:
    """Unweighted mean over the seven tasks, acc_norm for hellaswag, arc_challenge and openbookqa, acc for the others.

    None when one of the seven is missing. Source: `convert_json2csv_zeroshot` of the released code.
    """
    if not all(task in tasks for task in SEVEN):
        return None
    return sum(float(tasks[task].metrics[metric] or 0) for task, metric in SEVEN.items()) / len(SEVEN)

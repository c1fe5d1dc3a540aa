"""What a run says of its compressed model in one sentence, by fixed rules: docs/evaluation.md states them.

The constants were frozen with SmolLM2's outcomes (tests/statistics/outcomes.json) before another model was looked at; a
change of one raises RULES.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from slm_exp.core.format import with_error
from slm_exp.evaluation.protocol import mixed
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Estimated, JudgedTask, Measurement, Verdict
from slm_exp.runs.statistics.paired import LEVEL, Difference
from slm_exp.runs.statistics.runs import (
    LARGEST,
    Measured,
    exp_of,
    files,
    paired_difference,
    ratio_of,
    task_scores,
    text_scores,
)
from slm_exp.runs.statistics.scores import Z95, chance_of, standard_error

RULES = 1
OUTCOMES = ("destroyed", "clearly worse", "cannot be told apart", "better", "random weights")
DESTROYED, WORSE, SAME, BETTER, RANDOM = OUTCOMES
DESTROYED_RATIO = 10.0
"""From so many times the dense model's perplexity on, a model is destroyed whatever its tasks say."""
MUTE_ERRORS = 2.0
"""A task is mute unless the dense model lies more than so many standard errors above chance."""
KEPT_OVER_CHANCE = 0.25
"""Where no text was measured: less of the dense model's distance from chance, at 95 %, is destroyed."""


@dataclass(frozen=True)
class Text:
    """Both models' mean loss, and by chunk where it is known, in nats."""

    dense: float
    compressed: float
    chunks: tuple[np.ndarray, np.ndarray] | None = None
    """[1, N] each."""


@dataclass(frozen=True)
class Answers:
    """Both models' scores on the same documents, [1, N] each, and what guessing gives."""

    dense_1N: np.ndarray
    compressed_1N: np.ndarray
    chance: float

    @property
    def mute(self) -> bool:
        """Whether the dense model cannot be told from guessing, so that nothing can be lost here that is seen."""
        stderr = standard_error(self.dense_1N[0].tolist())
        return stderr is None or float(self.dense_1N.mean()) <= self.chance + MUTE_ERRORS * stderr


@lru_cache(maxsize=4096)
def verdict_of(run: Run) -> Verdict:
    """As the record has it; of a record without one, from what lies in the run's folder. Empty: nothing to compare."""
    return run.record.verdict or judge_run(run)


def judge_run(run: Run) -> Verdict:
    """Read both models' samples and judge. Costs milliseconds for a smoke test, seconds for 20,000 documents."""
    dense, small = Measured(run, "dense"), Measured(run)
    if not (measures(dense.evaluation) and measures(small.evaluation)) or mixed(
            {"dense": dense.evaluation.protocol, "compressed": small.evaluation.protocol}):
        return Verdict()
    texts = {corpus: text for corpus in counted_texts(small.evaluation) if (text := _text(dense, small, corpus))}
    members = {name for task in dense.evaluation.tasks if not dense.run.samples("dense", task).exists()
               for path in files(dense, task) if (name := path.name.removesuffix(".jsonl.gz"))}
    tasks = [task for task in dense.evaluation.tasks if task not in members]
    answers = {task: found for task in tasks if (found := _answers(dense, small, task))}
    return judge(texts, answers, run.record.model.random)


def measures(side: Measurement) -> bool:
    return bool(side.tasks or side.perplexity)


def counted_texts(side: Measurement) -> list[str]:
    """Each text once: the same one cut or begun otherwise (NAME_bos, NAME_2048) says the same again."""
    about = (side.protocol.get("fields") or {}).get("perplexity") or {}
    sources = {name: (about.get(name) or {}).get("source", name) if isinstance(about, dict) else name
               for name in side.perplexity}
    return list({source: name for name, source in reversed(sources.items())}.values())[::-1]


def judge(texts: Mapping[str, Text], answers: Mapping[str, Answers], random: bool = False) -> Verdict:
    """The verdict on what was measured. Pure: the same numbers give the same verdict."""
    ratios = {name: _ratio([text]) for name, text in texts.items()}
    ratio = _ratio(list(texts.values())) if texts else None
    heard = {name: each for name, each in answers.items() if not each.mute}
    lost = _estimated(paired_difference([(a.dense_1N, a.compressed_1N) for a in heard.values()]),
                      sum(a.dense_1N.size for a in heard.values())) if heard else None
    by_text, by_tasks = _direction(ratio, 1.0, lower_is_better=True), _direction(lost, 0.0)
    if random:
        outcome = RANDOM
    elif ratio.value >= DESTROYED_RATIO if ratio else heard and _at_chance(list(heard.values())):
        outcome = DESTROYED
    elif by_text == WORSE or (by_text == BETTER and by_tasks != WORSE):
        outcome = by_text
    else:
        outcome = by_tasks
    judged = {name: JudgedTask(chance=each.chance, mute=each.mute, n=each.dense_1N.size)
              for name, each in answers.items()}
    said = _sentence(outcome, ratio, lost, len(heard), len(answers), by_text)
    return Verdict(outcome=outcome, sentence=said, rules=RULES, perplexity_ratio=ratio, texts=ratios,
                   tasks_difference=lost, tasks=judged)


def _direction(found: Estimated | None, level: float, lower_is_better: bool = False) -> str:
    """What one kind of evidence says alone: clearly worse, better, or nothing."""
    if found is None or found.p is None or found.p >= LEVEL:
        return SAME
    return BETTER if (found.value < level) == lower_is_better else WORSE


def _at_chance(heard: Sequence[Answers]) -> bool:
    """Whether what is left of the distance from chance is, at 95 %, less than KEPT_OVER_CHANCE of the dense model's."""
    chance = sum(a.chance for a in heard) / len(heard)
    dense, small = (sum(float(of.mean()) for of in side) / len(heard) - chance
                    for side in ([a.dense_1N for a in heard], [a.compressed_1N for a in heard]))
    errors = [standard_error(a.compressed_1N[0].tolist()) or 0.0 for a in heard]
    return small + Z95 * math.hypot(*errors) / len(heard) < KEPT_OVER_CHANCE * dense


def _ratio(texts: Sequence[Text]) -> Estimated:
    """Of the perplexities, over several texts the geometric mean."""
    if all(text.chunks for text in texts):
        chunks = [text.chunks for text in texts if text.chunks]
        return _estimated(ratio_of(paired_difference(chunks)), sum(dense_1N.size for dense_1N, _ in chunks))
    return Estimated(value=exp_of(sum(text.compressed - text.dense for text in texts) / len(texts)))


def _estimated(found: Difference, n: int) -> Estimated:
    return Estimated(value=found.value, stderr=found.stderr, low=found.low, high=found.high, p=found.p, n=n)


def _sentence(outcome: str, ratio: Estimated | None, lost: Estimated | None, heard: int, asked: int,
              by_text: str) -> str:
    if outcome == RANDOM:
        return "random weights: no number of this run says anything about quality"
    parts = []
    if ratio:
        parts.append(f"perplexity is {times(ratio)} the dense model's")
    if ratio and (outcome == DESTROYED or outcome == by_text != SAME):  # it decided alone
        pass
    elif lost:
        points = with_error(100 * lost.value, None if lost.stderr is None else 100 * lost.stderr, sign=True)
        said = "task differs" if heard == 1 else "tasks differ"
        parts.append(f"{heard} {said} by {points} points (n = {lost.n})")
    elif asked:
        parts.append(f"{'every' if asked > 1 else 'the'} task is mute")
    return f"{outcome}{': ' if parts else ''}{', and '.join(parts)}"


def times(ratio: Estimated) -> str:
    """`2.15 ± 0.04 times`, `213 times`."""
    if ratio.value >= DESTROYED_RATIO:
        return f"{ratio.value:,.0f} times" if ratio.value < 1e6 else f"{ratio.value:.0e} times"
    return f"{with_error(ratio.value, ratio.stderr, digits=2)} times"


def _text(dense: Measured, small: Measured, corpus: str) -> Text | None:
    before, after = (m.evaluation.perplexity.get(corpus) for m in (dense, small))
    if not before:
        return None
    if not after:  # infinite, which JSON has not
        return Text(math.log(before), LARGEST)
    a, b = text_scores(dense, corpus), text_scores(small, corpus)
    return Text(math.log(before), math.log(after), (a[1][None], b[1][None]) if a and b and a[0] == b[0] else None)


def _answers(dense: Measured, small: Measured, task: str) -> Answers | None:
    """None where documents differ or are not at hand, or the metric is no share of right answers."""
    before, after, chance = task_scores(dense, task), task_scores(small, task), chance_of(files(dense, task))
    if before is None or after is None or chance is None or before[0] != after[0]:
        return None
    both = np.stack([before[1], after[1]])
    return Answers(both[:1], both[1:], chance) if both.min() >= 0 and both.max() <= 1 else None


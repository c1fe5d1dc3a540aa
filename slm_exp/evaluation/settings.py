"""The settings of a measurement, and what follows from them alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from slm_exp.core.errors import require, require_one_of
from slm_exp.core.hub import offline
from slm_exp.core.registry import Component, knob
from slm_exp.evaluation.perplexity import BOS_TOO, missing_corpora
from slm_exp.evaluation.report import SEVEN


class Case(NamedTuple):
    """One shape of generation to time."""

    batch: int
    prompt: int
    """Tokens in, of every row."""
    new: int
    """Tokens out, of every row, neither more nor fewer."""

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.prompt}x{self.new}"


PAPERS = Case(1, 12, 128)


@dataclass
class Settings(Component):
    """Fields of the group `evaluation`."""

    tasks: Any = field(default_factory=list)
    """lm-eval task names, one or a list; documents of the seven come with the assets, others from the hub."""
    fewshot: dict[str, int] = field(default_factory=dict)
    """Examples before each question, e.g. {mmlu: 5}; a task that is not named has what lm-eval defines, mostly none."""
    limit: int | None = None
    """The first N documents of each task; null takes all."""
    batch_size: int | None = knob(None)
    """Sequences per forward pass; null chooses."""
    processes: int = knob(1)
    """Processes of this machine that evaluate one model together: a GPU each, or a share of the cores. Their batches
    are those of one process, so are the numbers; `text`, speed and the tasks of backend=hflm are not divided."""
    backend: str = knob("fast")
    """`fast` computes what a document's choices share once; `hflm` is lm-eval's own model class. Same numbers."""
    add_bos: bool | None = None
    """Start every request with BOS; null leaves it to the tokenizer, as stock lm-eval does."""
    corpora: dict[str, str] = field(default_factory=dict)
    """Perplexity: name -> .txt or .jsonl text, .npy token file, hub set (wikitext2, ptb, c4), or bundled prose that
    nothing else uses (heldout:children, heldout:news, heldout:encyclopaedia). A NAME_2048 is cut into 2,048 tokens."""
    ppl_seq_len: int = 128
    """Tokens per chunk for perplexity, but of NAME_2048."""
    ppl_bos: str = "once"
    """BOS `once` at the very start, at the start of `every_chunk`, or `never`; `both` gives a corpus a second number,
    NAME_bos, with BOS before every chunk. Token files are taken as they are."""
    text: bool = False
    """Let both models continue 32 openings of held-out prose, greedily: loops, distinct n-grams, whether it ends."""
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

    def __post_init__(self) -> None:
        several = isinstance(self.tasks, (list, tuple))
        self.tasks = list(self.tasks) if several else [] if self.tasks is None else [self.tasks]
        super().__post_init__()

    def check(self) -> None:
        require(all(isinstance(task, str) for task in self.tasks), "evaluation.tasks", self.tasks, "names of tasks")
        for name, n in self.fewshot.items():
            require(name in self.tasks, f"evaluation.fewshot.{name}", n, "a task or group of evaluation.tasks")
            require(n >= 0, f"evaluation.fewshot.{name}", n, "a number >= 0")
        self.at_least(1, "limit", "batch_size", "processes", "speed_grid_runs")
        require(len(set(self.tasks)) == len(self.tasks), "evaluation.tasks", self.tasks, "each task once")
        require_one_of("evaluation.backend", self.backend, ("fast", "hflm"))
        require_one_of("evaluation.ppl_bos", self.ppl_bos, ("once", "every_chunk", "never", "both"))
        self.at_least(2, "ppl_seq_len")
        twice = [name for name in self.corpora if self.ppl_bos == "both" and name + BOS_TOO in self.corpora]
        require(not twice, "evaluation.corpora", list(self.corpora), f"no {', '.join(n + BOS_TOO for n in twice)}",
                "evaluation.ppl_bos=both gives these names to the numbers with BOS before every chunk.")
        self.at_least(0, "speed_runs")
        if self.times:
            require(0 <= self.speed_discard < self.speed_runs, "evaluation.speed_discard", self.speed_discard,
                    f"0 to {self.speed_runs - 1}, fewer than evaluation.speed_runs = {self.speed_runs}")
        for name, values in (("batches", self.speed_batches), ("prompts", self.speed_prompts), ("new", self.speed_new)):
            require(bool(values) and min(values) >= 1, f"evaluation.speed_{name}", values, "numbers >= 1, one at least")
        for name, bounds in self.dense_range.items():
            where = f"evaluation.dense_range.{name}"
            pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2
            numbers = pair and all(isinstance(bound, (int, float)) for bound in bounds)
            require(numbers and bounds[0] <= bounds[1], where, bounds, "two numbers [low, high]")
            seven = name == "average" and set(SEVEN) <= set(self.tasks)
            corpus = name in self.corpora or (self.ppl_bos == "both" and name.removesuffix(BOS_TOO) in self.corpora)
            require(seven or name in self.tasks or corpus, where, bounds,
                    "average (of the seven tasks), or one of evaluation.tasks or evaluation.corpora")

    @property
    def measures(self) -> bool:
        """Whether a model's report holds anything."""
        return bool(self.tasks or self.corpora or self.text)

    @property
    def times(self) -> bool:
        """Whether generations are timed."""
        return self.speed_runs > 0

    @property
    def file_passes(self) -> int:
        """Over the files of a model whose layers stay there, at least: more where states of all texts take too much
        memory. Tasks: three to compare the fast forward pass with a plain one, and one for all requests."""
        return len(self.wanted_corpora()) + (4 if self.tasks else 0)

    def wanted_corpora(self) -> dict[str, str]:
        """`corpora`, without those that may be left out and cannot be had here.

        A run_id hangs on it: so Hugging Face's switches decide, and no look at the network, which may fail once.
        """
        left_out = offline() and self.corpora_at_hand
        return {n: w for n, w in self.corpora.items() if not (left_out and missing_corpora({n: w}))}

    def cases(self) -> list[Case]:
        """The generations to time: the papers' case first, then the grid of batches, prompts and lengths."""
        grid = product(self.speed_batches, self.speed_prompts, self.speed_new)
        return list(dict.fromkeys([PAPERS, *(Case(*shape) for shape in grid)]))

"""What a measurement has to compute, counted from the settings and a model's sizes. Loads no torch and no data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_exp.calibration.heldout import TOKENS
from slm_exp.core.cost import Work
from slm_exp.evaluation.perplexity import HELD_OUT, chunk_tokens
from slm_exp.evaluation.settings import Settings
from slm_exp.models.sizes import Sizes

CHARS_PER_TOKEN = 4.5
"""Of an ordinary tokenizer on these texts; `model=tiny` reads bytes."""
HUB_TOKENS = {"wikitext2": 287_000, "ptb": 98_000, "c4": 540_000}
"""Tokens of the hub's perplexity sets, about."""
PER_LAYER_S = 3e-4
"""Seconds that a layer takes to start for one token, whatever its size."""


class TaskTokens(NamedTuple):
    """What one document of a task costs, in tokens of SmolLM2's tokenizer: means over its documents."""

    documents: int
    read: float
    """Tokens that the fast backend reads."""
    predicting: float
    """Tokens whose logits it computes."""
    plain: float
    """Tokens that lm-eval's own class reads, every choice anew, with all their logits."""


# python benchmarks/plan.py --documents
FIRST = {  # the first 20 documents
    "boolq": TaskTokens(3270, 154.8, 1.0, 309.6), "piqa": TaskTokens(1838, 40.5, 29.4, 60.6),
    "hellaswag": TaskTokens(10042, 71.2, 47.2, 158.7), "winogrande": TaskTokens(1267, 20.4, 9.9, 41.2),
    "arc_easy": TaskTokens(2376, 36.5, 13.7, 114.8), "arc_challenge": TaskTokens(1172, 58.5, 17.8, 188.3),
    "openbookqa": TaskTokens(500, 18.2, 6.1, 60.6),
}  # fmt: skip
ALL = FIRST | {  # all documents, where they differ
    "boolq": TaskTokens(3270, 136.3, 1.0, 302.8), "piqa": TaskTokens(1838, 46.5, 36.2, 70.6),
    "hellaswag": TaskTokens(10042, 160.3, 114.1, 313.3), "winogrande": TaskTokens(1267, 22.4, 10.3, 43.0),
}  # fmt: skip
FEW = 200
"""Up to so many documents of a task are taken to be like its first 20."""


def measuring(cfg: Settings, sizes: Sizes, layers: float, random: bool) -> tuple[Work, list[str]]:
    """The report of a model of so many layers (`random`: its tokenizer reads bytes), and what could not be counted."""
    work, notes = Work(), []
    per_token = CHARS_PER_TOKEN if random else 1.0
    for task in cfg.tasks:
        tokens = (FIRST if cfg.limit is not None and cfg.limit <= FEW else ALL).get(task)
        if tokens is None or cfg.fewshot.get(task):
            notes.append(f"evaluation.tasks: how long {task} takes is not known")
            continue
        documents = min(cfg.limit or tokens.documents, tokens.documents)
        fast = cfg.backend == "fast"
        read = documents * per_token * (tokens.read if fast else tokens.plain)
        logits = documents * per_token * (tokens.predicting if fast else tokens.plain)
        work += Work(blocks=layers * sizes.block_flops(read, read / documents), head=sizes.head_flops(logits),
                     fixed=0.0006 * documents * (5 if task == "hellaswag" else 2))  # fmt: skip
    if cfg.tasks:
        work += Work(harness=1, fixed=1.0)
    for name, where in cfg.wanted_corpora().items():
        shape = _corpus_tokens(where, chunk_tokens(name, cfg.ppl_seq_len), per_token)
        if shape is None:
            notes.append(f"evaluation.corpora.{name}: its length is not known")
            continue
        total, chunk = shape
        once = Work(blocks=layers * sizes.block_flops(total, chunk), head=1.3 * sizes.head_flops(total))
        work += once * (2 if cfg.ppl_bos == "both" and not where.endswith(".npy") else 1)
    return work, notes


def generating(cfg: Settings, sizes: Sizes, layers: float, weight_bytes: float) -> Work:
    """Timed generations, of the dense model (`weight_bytes`) and the compressed one (`layers`).

    A token reads every weight once, and starts every layer.
    """
    cases = len(cfg.speed_batches) * len(cfg.speed_prompts) * len(cfg.speed_new)
    tokens = 128 * cfg.speed_runs + max(cfg.speed_new) * cfg.speed_grid_runs * max(0, cases - 1)
    return Work(read=tokens * weight_bytes * (1 + layers / sizes.n_layers),
                fixed=tokens * (sizes.n_layers + layers) * PER_LAYER_S)  # fmt: skip


def _corpus_tokens(where: str, seq_len: int, per_token: float) -> tuple[float, float] | None:
    """Tokens, and tokens of a chunk; None where the file cannot be read."""
    try:
        if where.endswith(".npy"):
            n, t = np.load(where, mmap_mode="r", allow_pickle=False).shape
            return n * t, t
        if where in HELD_OUT:
            return TOKENS, seq_len
        if where in HUB_TOKENS:
            return HUB_TOKENS[where] * per_token, seq_len
        return Path(where).stat().st_size / CHARS_PER_TOKEN * per_token, seq_len
    except Exception:  # what the run says in a line; numpy and zipfile raise a dozen kinds
        return None

"""How much each stage has to compute, counted from the config. Imports no torch.

Counts follow the code that does the work: block forwards as `search` counts them, documents as lm-eval asks them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_exp.core.cost import Count, Tokens, Work
from slm_exp.evaluation.base import SEVEN

if TYPE_CHECKING:
    from slm_exp.methods.base import Method
    from slm_exp.models.sizes import Sizes
    from slm_exp.pipeline.config import RunConfig
    from slm_exp.search.state import SearchState

GRAM_BYTES = 2**29  # of similarity.layers
BYTES_OF_GRAMS = 1.2
"""Grams and the copies made while they are centred."""
CHARS_PER_TOKEN = 4.5
"""Of an ordinary tokenizer on these texts; `model=tiny` reads bytes."""
HUB_TOKENS = {"wikitext2": 287_000, "ptb": 98_000, "c4": 540_000}
"""Tokens of the hub's perplexity sets, about."""
ALPACA_ROWS = 51_760
BUNDLED_TOKENS = 165_000
"""In the bundled stories, about."""


class Asked(NamedTuple):
    """What one document of a task costs, in tokens of SmolLM2's tokenizer: means over its documents."""

    documents: int
    nodes: float
    """Tokens that the fast backend reads."""
    predicting: float
    """Tokens whose logits it computes."""
    plain: float
    """Tokens that lm-eval's own class reads, every choice anew, with all their logits."""


# python benchmarks/plan.py --documents
FIRST = {  # the first 20 documents
    "boolq": Asked(3270, 154.8, 1.0, 309.6), "piqa": Asked(1838, 40.5, 29.4, 60.6),
    "hellaswag": Asked(10042, 71.2, 47.2, 158.7), "winogrande": Asked(1267, 20.4, 9.9, 41.2),
    "arc_easy": Asked(2376, 36.5, 13.7, 114.8), "arc_challenge": Asked(1172, 58.5, 17.8, 188.3),
    "openbookqa": Asked(500, 18.2, 6.1, 60.6),
}  # fmt: skip
ALL = {  # all documents
    "boolq": Asked(3270, 136.3, 1.0, 302.8), "piqa": Asked(1838, 46.5, 36.2, 70.6),
    "hellaswag": Asked(10042, 160.3, 114.1, 313.3), "winogrande": Asked(1267, 22.4, 10.3, 43.0),
    "arc_easy": Asked(2376, 36.5, 13.7, 114.8), "arc_challenge": Asked(1172, 58.5, 17.8, 188.3),
    "openbookqa": Asked(500, 18.2, 6.1, 60.6),
}  # fmt: skip
FEW = 200
"""Up to so many documents of a task are taken to be like its first 20."""


PER_LAYER_S = 3e-4
"""Seconds that a layer takes to start for one token, whatever its size."""


def calibration_tokens(cfg: RunConfig) -> Tokens:
    """Sequences and tokens of each; of a token file by its header."""
    if cfg.calibration.name == "tokens" and cfg.calibration.path:
        import numpy as np

        shape = np.load(Path(cfg.calibration.path).expanduser(), mmap_mode="r", allow_pickle=False).shape
        return Tokens(*shape) if len(shape) == 2 else Tokens(1, 1)
    return Tokens(cfg.calibration.n_samples, cfg.calibration.seq_len)


def similarity(cfg: RunConfig, sizes: Sizes, tokens: Tokens) -> Work:
    """The layer similarity matrix: every layer once (more where the Gram matrices do not fit), and their Grams."""
    rows, parts, b = _minibatches(cfg, tokens)
    passes = math.ceil(parts / max(1, GRAM_BYTES // int(sizes.n_layers * b * b * 8)))
    wide = sizes.n_layers * (2 * rows * b * sizes.hidden + 12 * rows * b) + 2 * sizes.n_layers**2 * rows * b
    return Work(blocks=passes * sizes.n_layers * sizes.block_flops(tokens.total, tokens.t), wide=wide)


def _minibatches(cfg: RunConfig, tokens: Tokens) -> tuple[int, int, float]:
    """Rows, minibatches and rows of each."""
    rows = tokens.n * max(1, tokens.t - int(cfg.similarity.skip_first_token))
    parts = max(1, min(math.ceil(rows / cfg.similarity.batch), rows // 4))
    return rows, parts, rows / parts


def plan(cfg: RunConfig, sizes: Sizes, tokens: Tokens, count: Count) -> Work:
    """What a method's block forwards, losses and scores come to."""
    out = Work(blocks=count.blocks * sizes.block_flops(tokens.total, tokens.t),
               head=count.heads * sizes.head_flops(tokens.total))  # fmt: skip
    if cfg.similarity.uses_kernel():
        rows, _, b = _minibatches(cfg, tokens)
        out += Work(wide=(count.scores + 1) * rows * b * (2 * sizes.hidden + 12))
    return out


def search_bounds(start: SearchState, n_layers: int) -> tuple[int, int]:
    """Block forwards of a threshold search from a state on, the dense pass left out: (if all pass, if none does).

    Either way every layer below the window is asked about once; what passes shortens the candidates that follow.
    """
    most = least = 0
    state = start
    while candidate := state.candidate:
        least += candidate.blocks(n_layers)
        state = state.accept()
    state = start
    while candidate := state.candidate:
        most += candidate.blocks(n_layers)
        state = state.reject()
    return least, most


def method(cfg: RunConfig, n: int, removed: int | None) -> Count:
    """Block forwards, losses and scores of a method that removes so many of `n` layers (None: nobody knows yet).

    A method that is not known here counts as one that looks at the dense states once.
    """
    m = cfg.method
    gone = removed if removed is not None else 0
    final = n + (n - gone)  # the dense pass and the compressed model, which runs anew from its first cut up
    if m.name == "slm":
        count = _slm(m, n, removed)
    elif m.name in ("sleb", "blockpruner", "finercut"):
        count = _greedy(m, n, gone)
    elif m.name == "shortened_ppl":
        each = [n - 1 - i for i in m.removable(n)]  # type: ignore[attr-defined]
        count = Count(sum(each) + final, len(each))
    elif m.name == "shortened_taylor":
        count = Count(3 * n + final, 2)
    elif m.name == "llm_drop":
        count = Count(n / 2 + final)
    elif m.name == "laco":
        count = Count(n * n / 2 + final, scores=n, note="laco tries thresholds until the size is met")
    elif m.name in ("shortgpt", "angular", "cka_patch", "shortened_magnitude", "first", "last", "random", "from_plan"):
        count = Count(final)
    else:
        count = Count(final, note=f"method={m.name} is taken to look at the dense model's states once")
    if m.compensate:
        count = Count(count.blocks + 2 * n, count.heads, count.scores + 1, count.note)
    return count


def _slm(m: Method, n: int, removed: int | None) -> Count:
    from slm_exp.search.state import SearchState
    from slm_exp.search.target import BUDGET

    start = SearchState.start(n, m.protect_first, m.protect_last)  # type: ignore[attr-defined]
    if m.target_layers is None and m.target_ratio is None:
        least, most = search_bounds(start, n)
        return Count(n + most, scores=max(0, start.high - start.floor),
                     note=f"the search takes {n + least} to {n + most} block forwards, fewer the more it merges")
    budget = min(m.max_evaluations or BUDGET, 2 ** max(0, start.high - start.floor))  # type: ignore[attr-defined]
    each = 0.57 * n  # 6,450 block forwards for 379 candidates of 30 layers
    note = f"up to {budget} candidates are scored for a size (method.max_evaluations)"
    return Count(n + budget * each, scores=budget, note=note)


def _greedy(m: Any, n: int, gone: int) -> Count:
    """Part by part, the one that costs least: candidates run from their own part upwards, then the head."""
    halves = m.name != "sleb"
    parts = len(m.removable(n)) * (2 if halves else 1)
    share = 1 - getattr(m, "exclude_first", 0.0)
    low = 1 - share / 2  # candidates start this far up, on average
    removals = gone if not halves else m.target_sublayers or max(1, round((m.target_ratio or 0) * n * 1.5))
    blocks = heads = 0.0
    for k in range(removals):
        left = max(0.0, parts * share - k)
        height = n - k / (2 if halves else 1)
        blocks += left * height * (1 - low)
        heads += left * (2 if m.name == "finercut" and m.metric != "perplexity" else 1)
    return Count(blocks + 2 * n, heads)


def evaluation(cfg: RunConfig, sizes: Sizes, layers: float, random: bool) -> tuple[Work, list[str]]:
    """One model's measurements, and what could not be counted."""
    e, notes = cfg.evaluation, []
    stretch = CHARS_PER_TOKEN if random else 1.0
    work = Work()
    for task in e.tasks:
        if task not in SEVEN:
            notes.append(f"evaluation.tasks: how long {task} takes is not known")
            continue
        about = (FIRST if e.limit is not None and e.limit <= FEW else ALL)[task]
        docs = min(e.limit or about.documents, about.documents)
        read = docs * stretch * (about.nodes if e.backend == "fast" else about.plain)
        logits = docs * stretch * (about.predicting if e.backend == "fast" else about.plain)
        work += Work(blocks=layers * sizes.block_flops(read, read / docs), head=sizes.head_flops(logits),
                     fixed=0.0006 * docs * (5 if task == "hellaswag" else 2))  # fmt: skip
    if e.tasks:
        work += Work(harness=1, fixed=1.0)
    corpora = e.wanted_corpora() if hasattr(e, "wanted_corpora") else e.corpora
    for name, where in corpora.items():
        found = _corpus(where, e.ppl_seq_len, stretch)
        if found is None:
            notes.append(f"evaluation.corpora.{name}: its length is not known")
            continue
        once = Work(blocks=layers * sizes.block_flops(found[0], found[1]), head=1.3 * sizes.head_flops(found[0]))
        work += once * (2 if e.ppl_bos == "both" and not where.endswith(".npy") else 1)
    return work, notes


def generation(cfg: RunConfig, sizes: Sizes, layers: float, bytes_: float) -> Work:
    """Timed generations, dense and compressed: a token reads every weight once, and starts every layer."""
    e: Any = cfg.evaluation
    cases = len(e.speed_batches) * len(e.speed_prompts) * len(e.speed_new)
    tokens = 128 * e.speed_runs + max(e.speed_new) * e.speed_grid_runs * max(0, cases - 1)
    return Work(read=tokens * bytes_ * (1 + layers / sizes.n_layers),
                fixed=tokens * (sizes.n_layers + layers) * PER_LAYER_S)  # fmt: skip


def _corpus(where: str, seq_len: int, stretch: float) -> tuple[float, float] | None:
    """Tokens, and tokens of a chunk."""
    try:
        if where.endswith(".npy"):
            import numpy as np

            n, t = np.load(where, mmap_mode="r", allow_pickle=False).shape
            return n * t, t
        if where in HUB_TOKENS:
            return HUB_TOKENS[where] * stretch, seq_len
        return Path(where).stat().st_size / CHARS_PER_TOKEN * stretch, seq_len
    except (OSError, ValueError):
        return None


def width(cfg: RunConfig, sizes: Sizes, layers: float, tokens: Tokens) -> Work:
    """Scores of heads and channels (gradients in the dearest case), and the narrowed model's score."""
    if not cfg.width.prunes:
        return Work()
    gradients = cfg.width.name == "llm_pruner"
    passes = (6 if gradients else 1) * layers + 2 * layers + sizes.n_layers
    return Work(blocks=passes * sizes.block_flops(tokens.total, tokens.t))


def recovery(cfg: RunConfig, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
    """A refit or a training, and what could not be counted."""
    r: Any = cfg.recovery
    if r.name == "none":
        return Work(), []
    if r.name == "reconstruct":
        total = r.n_samples * r.seq_len
        cuts = max(1.0, sizes.n_layers - layers) if r.layers == "cuts" else layers
        refits = cuts * r.passes * (2 if r.attention else 1)
        blocks = sizes.n_layers + layers + cuts * (2 * r.passes + 1)
        return Work(blocks=blocks * sizes.block_flops(total, r.seq_len),
                    wide=refits * (2 * total * sizes.mlp**2 + 20 * sizes.mlp**3)), []
    if not hasattr(r, "epochs"):
        return Work(), [f"recovery={r.name}: how long it takes is not known"]
    examples = _examples(r)
    steps = r.max_steps or (None if examples is None else max(1, int(r.epochs * examples / r.batch_size)))
    if steps is None:
        return Work(), [f"recovery.data={r.data}: how many examples there are is not known"]
    total = steps * r.batch_size * r.seq_len
    forwards = (2.5 if r.name == "lora" else 3) + r.gradient_checkpointing
    blocks = layers * forwards * sizes.block_flops(total, r.seq_len)
    if "distill" in r.name:  # the dense model runs along
        blocks += sizes.n_layers * sizes.block_flops(total, r.seq_len)
    work = Work(blocks=blocks, head=forwards * sizes.head_flops(total))
    return work, [f"recovery stops after {r.max_minutes:g} minutes"] if r.max_minutes else []


def _examples(r: Any) -> float | None:
    if r.data == "hub" and r.path is None:
        return ALPACA_ROWS - min(r.held_out, ALPACA_ROWS / 5)
    if r.data == "bundled":
        return BUNDLED_TOKENS / r.seq_len * 0.8
    if r.data == "jsonl" and r.path and Path(r.path).is_file() and r.path.endswith((".jsonl", ".json")):
        with open(r.path, "rb") as f:
            return 0.8 * sum(1 for line in f if line.strip())
    return None

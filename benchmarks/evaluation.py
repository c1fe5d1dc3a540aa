"""The fast backend against lm-eval's HFLM, as interleaved pairs in one process.

    python benchmarks/evaluation.py --limit 100                  # seven tasks, 100 documents each, embedded SmolLM2
    python benchmarks/evaluation.py --limit 20 --pairs 1         # minutes instead of an hour
    python benchmarks/evaluation.py --count --limit 100          # only how many tokens each reads; loads no weights
    python benchmarks/evaluation.py --tasks mmlu --shots 5 --limit 2 --pairs 1           # two questions a subject
    python benchmarks/evaluation.py --tasks gsm8k_cot gsm8k_choice --limit 4 --pairs 1   # answers generated, and chosen

Both get the same requests, tokenisation included in the time. HFLM runs with the best of --batch-sizes, found on the
first documents. Wall time wants a quiet machine; a pair's ratio is what counts, and CPU seconds stand beside it.
Every log-likelihood is compared, and every document whose prediction differs is listed with its margin; generated
answers are compared as text. Exit status 1 where a log-likelihood is off by more than 1e-3 and 1e-5 of its value, a
prediction differs without being a tie, or a text differs. Tokens forwarded are counted at the embeddings, padding
included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from slm_exp.evaluation.backends.harness import language_model, load_tasks
from slm_exp.evaluation.backends.trees import Request, grow
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.task_index import quiet
from slm_exp.launch.compose import compose_run
from slm_exp.models.base import ModelHandle

ABSOLUTE, RELATIVE = 1e-3, 1e-5


def open_model(path: str | None) -> ModelHandle:
    overrides = ["model=hf", f"model.path={path}"] if path else []
    cfg = compose_run(["tracking=none", "evaluation=none", *overrides])
    return cfg.model.open(torch.device("cpu"), Path(cfg.cache.dir))


def requests_of(tasks: list[str], limit: int, shots: int | None = None) -> tuple[dict[str, Any], list[Any]]:
    with quiet():
        fewshot = {} if shots is None else dict.fromkeys(tasks, shots)
        loaded = load_tasks(tasks, limit, fewshot=fewshot).objects["tasks"]
        for task in loaded.values():
            task.build_all_requests(limit=limit)
    return loaded, [i for task in loaded.values() for i in task.instances]


class Asked(NamedTuple):
    answers: list[Any]
    """(log-likelihood, greedy), or a text."""
    wall: float
    cpu: float
    forwarded: int
    """Tokens that went through the model, padding included."""


def ask(handle: ModelHandle, backend: str, batch_size: int | None, requests: list[Any]) -> Asked:
    """A model class made anew, asked everything."""
    forwarded = 0

    def count_tokens(module: Any, args: Any, out: torch.Tensor) -> None:
        nonlocal forwarded
        forwarded += out.shape[:2].numel()

    answers: dict[int, Any] = {}
    hook = handle.model.get_input_embeddings().register_forward_hook(count_tokens)
    with quiet():
        lm = language_model(handle.model, handle.tokenizer, batch_size, backend=backend)  # type: ignore[arg-type]
    wall, cpu = time.perf_counter(), time.process_time()
    for kind in ("loglikelihood", "generate_until"):
        mine = [i for i, request in enumerate(requests) if request.request_type == kind]
        if mine:
            answers |= zip(mine, getattr(lm, kind)([requests[i] for i in mine], disable_tqdm=True), strict=True)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    hook.remove()
    return Asked([answers[i] for i in range(len(requests))], *seconds, forwarded)


def best_batch_size(handle: ModelHandle, tasks: list[str], sizes: list[int], limit: int, shots: int | None) -> int:
    """HFLM's fastest by CPU seconds on the first documents of every task."""
    if len(sizes) == 1:
        return sizes[0]
    _, requests = requests_of(tasks, limit, shots)
    seconds = {size: ask(handle, "hflm", size, requests).cpu for size in sizes}
    print("HFLM, CPU seconds by batch size: " + ", ".join(f"{k}: {v:.1f}" for k, v in seconds.items()), flush=True)
    return min(seconds, key=lambda size: seconds[size])


def count(handle: ModelHandle, requests: list[Any]) -> None:
    """Tokens read by HFLM (padding apart), by trees, and positions that need logits."""
    from lm_eval.api.model import TemplateLM

    tok_encode = lambda text, **_: handle.tokenizer.encode(text)  # type: ignore[union-attr]  # noqa: E731
    reader = type("Reader", (TemplateLM,), dict.fromkeys(TemplateLM.__abstractmethods__) | {"tok_encode": None})()
    reader.tok_encode = tok_encode
    asked = []
    for i, request in enumerate(requests):
        if request.request_type == "generate_until":
            asked.append(Request(i, tuple(tok_encode(request.args[0])), (0,)))
        else:
            context, answer = reader._encode_pair(*request.args)
            asked.append(Request(i, (*context, *answer[:-1]), tuple(answer)))
    trees = grow(asked)
    plain = sum(map(len, {r.tokens for r in asked}))
    trunks = {tree.trunk for tree in trees if tree.trunk}
    nodes = sum(map(len, [*trees, *trunks]))
    predicting = sum(len({int(n) for _, nodes, _ in tree.predictions() for n in nodes}) for tree in trees)
    print(f"{len(asked)} requests in {len(trees)} trees after {len(trunks)} shared beginnings: HFLM reads {plain} "
          f"tokens, trees {nodes} ({plain / nodes:.2f} times fewer); logits at {plain} and {predicting} "
          "positions")


def compare(tasks: dict[str, Any], requests: list[Any], plain: Any, fast: Any) -> bool:
    """Print how far apart two sets of answers are. True where they are equal as far as promised."""
    said = [i for i, request in enumerate(requests) if request.request_type == "generate_until"]
    apart = [i for i in said if plain[i] != fast[i]]
    if said:
        print(f"answers generated: {len(said)}, that differ: {len(apart)}")
    for i in apart:
        print(f"  {requests[i].task_name} {requests[i].doc_id}: {plain[i]!r}\n    and {fast[i]!r}")
    tasks = {name: task for name, task in tasks.items() if task.OUTPUT_TYPE == "multiple_choice"}
    chosen = [i for i, request in enumerate(requests) if request.task_name in tasks]
    if not chosen:
        return not apart
    requests, plain, fast = ([rows[i] for i in chosen] for rows in (requests, plain, fast))
    a, b = (np.array([score for score, _ in answers]) for answers in (plain, fast))
    off = np.abs(a - b)
    wrong = int(((off > ABSOLUTE) & (off > RELATIVE * np.abs(a))).sum())
    print(f"log-likelihoods: {len(a)}, largest difference {off.max():.1e}, relative {(off / np.abs(a)).max():.1e}, "
          f"outside 1e-3 and 1e-5: {wrong}; greedy flags that differ: "
          f"{sum(x[1] != y[1] for x, y in zip(plain, fast, strict=True))}")  # fmt: skip
    differ, unexcused, start = 0, 0, 0
    for name, task in tasks.items():
        rows = sorted(range(start, start + len(task.instances)), key=lambda i: (requests[i].doc_id, requests[i].idx))
        start += len(task.instances)
        for doc_id in dict.fromkeys(requests[i].doc_id for i in rows):
            mine = [i for i in rows if requests[i].doc_id == doc_id]
            lengths = [len(choice) for choice in task.doc_to_choice(requests[mine[0]].doc)]
            for metric, scale in (("acc", np.ones(len(mine))), ("acc_norm", np.array(lengths, dtype=float))):
                one, two = a[mine] / scale, b[mine] / scale
                if one.argmax() != two.argmax():
                    best = np.sort(one)[::-1]
                    tie = 2 * max(ABSOLUTE, RELATIVE * float(np.abs(a[mine]).max())) / scale.min()
                    differ, unexcused = differ + 1, unexcused + int(best[0] - best[1] >= tie)
                    print(f"  {name} {doc_id} {metric}: {one.argmax()} and {two.argmax()}, margin "
                          f"{best[0] - best[1]:.1e}{'' if best[0] - best[1] < tie else '   NO TIE'}")  # fmt: skip
    print(f"predictions that differ: {differ}, of them no ties: {unexcused}")
    return not wrong and not unexcused and not apart


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder (default: the embedded SmolLM2-135M)")
    parser.add_argument("--tasks", nargs="+", default=list(SEVEN))
    parser.add_argument("--shots", type=int, help="examples before each question (default: the task's own)")
    parser.add_argument("--limit", type=int, default=20, help="documents per task, of mmlu per subject")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="HFLM's, the best is taken")
    parser.add_argument("--count", action="store_true")
    args = parser.parse_args()
    handle = open_model(args.model)
    tasks, requests = requests_of(args.tasks, args.limit, args.shots)
    count(handle, requests)
    if args.count:
        return 0
    batch_size = best_batch_size(handle, args.tasks, args.batch_sizes, min(10, args.limit), args.shots)
    ratios: list[tuple[float, float]] = []
    equal = True
    for i in range(args.pairs):
        got = {}
        for backend in ("hflm", "fast") if i % 2 == 0 else ("fast", "hflm"):
            got[backend] = ask(handle, backend, batch_size if backend == "hflm" else None, requests)
        slow, quick = got["hflm"], got["fast"]
        ratios.append((slow.wall / quick.wall, slow.cpu / quick.cpu))
        print(f"pair {i + 1}: HFLM at batch {batch_size} {slow.wall:.1f} s ({slow.cpu:.1f} s CPU), fast "
              f"{quick.wall:.1f} s ({quick.cpu:.1f} s CPU): {ratios[-1][0]:.2f} times faster, by CPU "
              f"{ratios[-1][1]:.2f}; tokens forwarded {slow.forwarded} and {quick.forwarded}, "
              f"{slow.forwarded / quick.forwarded:.2f} times fewer", flush=True)
        equal &= compare(tasks, requests, slow.answers, quick.answers)
    wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"{args.limit} documents a task, {torch.get_num_threads()} threads, {args.pairs} pairs: "
          f"median {wall:.2f} times faster (CPU seconds {cpu:.2f})")  # fmt: skip
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())

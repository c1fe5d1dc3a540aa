"""The search against the released procedure written plainly, as interleaved pairs in one process.

    python benchmarks/search.py                                  # bundled calibration text, threshold 0.9
    python benchmarks/search.py --tokens X.npy --rule mean       # an array [N, T] of token ids
    python benchmarks/search.py --screen                         # with method.screen_dtype=bfloat16
    python benchmarks/search.py --early-stop                     # with method.early_stop=true
    python benchmarks/search.py --path                           # block forwards of a whole path over separate searches
    python benchmarks/search.py --cases --tokens X.npy Y.npy     # do screened searches give the same groups?
    python benchmarks/search.py --table --tokens X.npy           # four thresholds x three rules, one run of each

Times are wall time and want a quiet machine; a pair's ratio is what counts. Memory is measured in a process of its
own: the highest resident size during the search, less that before it, over the bytes of the weights.
The floor of a search is the time of one block alone x the block forwards that the search takes; it is measured in turns
with the searches, in processor seconds, which other work on the machine changes little, and `search / floor` says what
everything else costs. --floor measures nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "reference")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from slm_exp.core.cache.store import StageStore  # noqa: E402
from slm_exp.core.registry import available  # noqa: E402
from slm_exp.core.types import CalibrationTokens, MergePlan  # noqa: E402
from slm_exp.engine.runner import BlockRunner, Slot  # noqa: E402
from slm_exp.launch.compose import compose_run  # noqa: E402
from slm_exp.methods.base import PlanTask  # noqa: E402
from slm_exp.methods.slm import SLM  # noqa: E402
from slm_exp.models.base import ModelHandle  # noqa: E402
from slm_exp.search.path import follow  # noqa: E402
from slm_exp.search.scoring import ScoringEngine  # noqa: E402
from slm_exp.search.state import SearchState  # noqa: E402
from slm_exp.search.threshold import search  # noqa: E402

RULES = ("top_layer", "sum_of_deltas", "mean")
THRESHOLDS = (0.9, 0.8, 0.7, 0.6)


def open_model(path: str | None) -> ModelHandle:
    overrides = ["model=hf", f"model.path={path}"] if path else []
    cfg = compose_run(["tracking=none", "evaluation=none", *overrides])
    return cfg.model.open(torch.device("cpu"), Path(cfg.cache.dir))


def tokens_of(file: str | None, handle: ModelHandle) -> CalibrationTokens:
    if file is None:
        return compose_run([]).calibration.draw(handle, 0)
    return CalibrationTokens(np.load(file, allow_pickle=False), file)


def task_of(handle: ModelHandle, tokens: CalibrationTokens, rule: str) -> PlanTask:
    """What a search reads, with nothing in a cache."""
    return PlanTask(
        handle, tokens, available("similarity")["flat_cosine"](), available("kernel")["linear"](),
        available("merge_rule")[rule](), None, StageStore(None),  # type: ignore[arg-type]
    )  # fmt: skip


def ours(handle: ModelHandle, tokens: CalibrationTokens, rule: str, threshold: float, screen: bool,
         early_stop: bool = False) -> MergePlan:
    """One search that finds nothing in a cache."""
    task = task_of(handle, tokens, rule)
    method = SLM(threshold=threshold, commit_open_window=False, screen_dtype="bfloat16" if screen else None,
                 early_stop=early_stop)
    return method.plan(task)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def cpu_timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """In processor seconds of all threads."""
    started = time.process_time()
    return run(), time.process_time() - started


def worst_score(plan: MergePlan, plain: Any) -> float:
    """Largest difference between scores of the same candidates; infinite when the candidates differ."""
    theirs = [(low, high, score) for low, high, score in plain.scores if low < high]
    if [(t.low, t.high) for t in plan.trace] != [(low, high) for low, high, _ in theirs]:
        return float("inf")
    pairs = zip(plan.trace, theirs, strict=True)
    return max(abs(t.score - score) for t, (*_, score) in pairs if t.score is not None)


def block_seconds(handle: ModelHandle, tokens: CalibrationTokens, dtype: torch.dtype | None) -> float:
    """Of one block alone over the calibration set: the median over the layers, each on the dense stream. Weights are
    in the dtype already."""
    runner, times = BlockRunner(handle, tokens.tokens_NT, dtype), []
    h_NTD = runner.embed()
    for i in range(handle.n_layers):
        slot = Slot(i, {n: p.to(runner.dtype) for n, p in handle.layers[i].named_parameters()})
        runner.block(slot, h_NTD)  # the first is compared with the library's
        out, seconds = cpu_timed(lambda: runner.block(slot, h_NTD))  # noqa: B023
        times.append(seconds)
        h_NTD = out
    return statistics.median(times)


def floor(handle: ModelHandle, tokens: CalibrationTokens, args: argparse.Namespace) -> str:
    """Seconds of a search over those of its block forwards alone, in turns: median (min to max)."""
    ratios = []
    for _ in range(args.pairs):
        plan, took = cpu_timed(lambda: ours(handle, tokens, args.rule, args.threshold, args.screen, args.early_stop))
        alone = block_seconds(handle, tokens, torch.bfloat16 if args.screen else None)
        ratios.append(took / (plan.block_forwards * alone))
    return (f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {plan.block_forwards} block "
            f"forwards, one alone {1e3 * alone:.1f} ms")


def pairs(handle: ModelHandle, tokens: CalibrationTokens, args: argparse.Namespace) -> None:
    from released import search as released_search

    ratios, seconds, same, worst = [], [], True, 0.0
    for i in range(args.pairs):
        run_plain = lambda: released_search(handle.model, tokens.tokens_NT, args.threshold, args.rule)  # noqa: E731
        run_ours = lambda: ours(handle, tokens, args.rule, args.threshold, args.screen, args.early_stop)  # noqa: E731
        if i % 2:
            (plan, fast), (plain, slow) = timed(run_ours), timed(run_plain)
        else:
            (plain, slow), (plan, fast) = timed(run_plain), timed(run_ours)
        ratios.append(slow / fast)
        seconds.append((slow, fast))
        same &= [tuple(g) for g in plan.groups] == sorted(plain.groups)
        worst = max(worst, worst_score(plan, plain))
        print(f"  pair {i + 1}: plain {slow:.1f} s, search {fast:.1f} s, {slow / fast:.2f} times", file=sys.stderr)
    growth = memory_growth(args)
    plain_s, ours_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    shape = " x ".join(map(str, tokens.tokens_NT.shape))
    print(f"\n{shape} tokens, {args.rule}, threshold {args.threshold}, "
          f"{'bfloat16 screen' if args.screen else 'float32'}{', early stop' * args.early_stop}, "
          f"{torch.get_num_threads()} threads, {args.pairs} pairs")
    rows = [
        ("times faster, median (min to max)",
         f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"),
        ("seconds, plain and search", f"{plain_s:.1f} and {ours_s:.1f}"),
        ("same groups", "yes" if same else "NO"),
        ("largest score difference", f"{worst:.1e}" + (" (screened scores included)" if args.screen else "")),
        ("evaluations, plain and search", f"{len(plain.scores)} and {plan.evaluations}"),
        ("block forwards, plain and search", f"{plain.layers_run} and {plan.block_forwards}"),
        ("seconds of the search / its floor", floor(handle, tokens, args)),
        ("peak memory growth / weights", f"{growth['growth'] / growth['weights']:.2f} "
                                         f"({growth['growth'] / 1e6:.0f} of {growth['weights'] / 1e6:.0f} MB)"),
    ]  # fmt: skip
    print("\n".join(f"| {name:<34} | {value} |" for name, value in rows))


def path(handle: ModelHandle, tokens: CalibrationTokens, args: argparse.Namespace) -> None:
    """Block forwards of the path of a range, and of one search for each of its plans that shares nothing."""
    n, start = handle.n_layers, SearchState.start(handle.n_layers)
    print("| early stop | plans | candidates | block forwards, path and separate searches | path / separate |\n"
          + "|---" * 5 + "|")  # fmt: skip
    for early_stop in (False, True):
        engine = ScoringEngine(task_of(handle, tokens, args.rule), top=start.high)
        found = follow(engine, start, n, *args.range, early_stop=early_stop)
        spent = engine.block_forwards
        if not early_stop:  # what the path needed is known now: these run nothing
            separate = sum(n + sum(step.state.candidate.blocks(n) for step in search(engine, start, plan.low))  # type: ignore[union-attr]
                           for plan in found.plans)
        print(f"| {early_stop} | {len(found.plans)} | {found.evaluations} | {spent} and {separate} | "
              f"{spent / separate:.3f} |", flush=True)


def table(handle: ModelHandle, tokens: CalibrationTokens, args: argparse.Namespace) -> None:
    """Every threshold x rule once: what both procedures decide, and the ratio of that one pair."""
    from released import search as released_search

    print("| rule | threshold | groups | final score | same groups | largest score difference | evaluations | "
          "block forwards | times faster |\n" + "|---" * 9 + "|")  # fmt: skip
    for rule in RULES:
        for threshold in THRESHOLDS:
            plain, slow = timed(lambda: released_search(handle.model, tokens.tokens_NT, threshold, rule))  # noqa: B023
            plan, fast = timed(lambda: ours(handle, tokens, rule, threshold, args.screen))  # noqa: B023
            groups = " ".join(f"{g.start}..{g.stop - 1}" for g in plan.groups) or "none"
            same = [tuple(g) for g in plan.groups] == sorted(plain.groups)
            print(f"| {rule} | {threshold} | {groups} | {plan.final_score:.4f} | {'yes' if same else 'NO'} | "
                  f"{worst_score(plan, plain):.1e} | {len(plain.scores)} / {plan.evaluations} | "
                  f"{plain.layers_run} / {plan.block_forwards} | {slow / fast:.2f} |", flush=True)  # fmt: skip


def cases(handle: ModelHandle, args: argparse.Namespace) -> int:
    """Screened against unscreened groups on every tokens x threshold x rule. Exit status 1 where they differ."""
    print("| tokens | rule | threshold | same groups | repeats | time of screened / float32 |\n" + "|---" * 6 + "|")
    differ = 0
    for file in args.tokens or [None]:
        tokens = tokens_of(file, handle)
        for rule in RULES:
            for threshold in THRESHOLDS:
                exact, slow = timed(lambda: ours(handle, tokens, rule, threshold, False))  # noqa: B023
                screened, fast = timed(lambda: ours(handle, tokens, rule, threshold, True))  # noqa: B023
                same = exact.groups == screened.groups and exact.final_score == screened.final_score
                differ += not same
                print(f"| {Path(file or 'bundled').name} | {rule} | {threshold} | {'yes' if same else 'NO'} | "
                      f"{screened.evaluations - len(screened.trace)} | {fast / slow:.2f} |", flush=True)  # fmt: skip
    print(f"{differ} cases differ")
    return int(differ > 0)


def memory_growth(args: argparse.Namespace) -> dict[str, int]:
    """Highest resident bytes during one search less those before it, from a fresh process."""
    command = [sys.executable, __file__, "--measure-memory", "--rule", args.rule, "--threshold", str(args.threshold)]
    command += ["--screen"] * args.screen + ["--early-stop"] * args.early_stop
    command += ["--tokens", args.tokens[0]] if args.tokens else []
    command += ["--model", args.model] if args.model else []
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


def measure_memory(handle: ModelHandle, tokens: CalibrationTokens, args: argparse.Namespace) -> None:
    weights = sum(p.nbytes for p in handle.model.parameters())
    _ = sum(float(p.sum()) for p in handle.model.parameters())  # weights mapped from a file become resident
    with torch.inference_mode():
        handle.model(torch.as_tensor(tokens.tokens_NT[:1]).long())  # threads and library buffers exist
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = resident("VmRSS")
    ours(handle, tokens, args.rule, args.threshold, args.screen, args.early_stop)
    print(json.dumps({"growth": resident("VmHWM") - before, "weights": weights}))


def resident(field: str) -> int:
    """Bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", help="npy files of token ids [N, T] (default: the bundled text)")
    parser.add_argument("--model", help="a model folder (default: the embedded SmolLM2-135M)")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--rule", default="top_layer", choices=RULES)
    parser.add_argument("--screen", action="store_true", help="method.screen_dtype=bfloat16")
    parser.add_argument("--early-stop", action="store_true", help="method.early_stop=true")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--path", action="store_true", help="count the block forwards of a path and of its searches")
    parser.add_argument("--range", type=float, nargs=2, default=(0.7, 0.95), help="thresholds of the path")
    parser.add_argument("--floor", action="store_true", help="the search against its floor alone")
    parser.add_argument("--cases", action="store_true", help="compare groups with and without the screen")
    parser.add_argument(
        "--table", action="store_true", help="compare all thresholds and rules with the plain procedure"
    )
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    handle = open_model(args.model)
    if args.floor:
        shown = floor(handle, tokens_of(args.tokens[0] if args.tokens else None, handle), args)
        print(f"processor seconds of the search / its floor: {shown}")
        return 0
    if args.cases:
        return cases(handle, args)
    tokens = tokens_of(args.tokens[0] if args.tokens else None, handle)
    if args.measure_memory:
        measure_memory(handle, tokens, args)
    elif args.path:
        path(handle, tokens, args)
    elif args.table:
        table(handle, tokens, args)
    else:
        pairs(handle, tokens, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

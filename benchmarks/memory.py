"""Peak memory of every method, merge rule, width pruner, recovery and evaluation, over the weights.

    python benchmarks/memory.py                                          # SmolLM2 in float32
    python benchmarks/memory.py --only width,recovery model=hf model.path=FOLDER model.dtype=auto

Every line is a whole run, without evaluation or checkpoint (but for those that measure these), in a process of its own
that is forked when all is imported and no weights are there. `allowed`, GiB too, is FACTOR times the weights and a GiB,
imports included, and what a narrower model or a training holds besides (`pipeline/memory.py`). `times` is what the peak
takes above the imports, over the weights: states of the calibration set and what a member holds are in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_exp.core.registry import available

GIB = 2**30
TRAINED = ["recovery.data=bundled", "recovery.max_steps=1", "recovery.batch_size=4", "recovery.micro_batch_size=1",
           "recovery.seq_len=64", "recovery.held_out=2"]
FITTED = ["recovery.n_samples=8", "recovery.seq_len=64"]
SHORT = {"evopress": ["method.starts=4", "method.children=4", "method.generations=1"], "laco": ["method.window=2"],
         "joint": ["method.steps=4", "method.fit_samples=8", "method.fit_seq_len=64"],
         "regression": ["merge_rule.n_samples=8", "merge_rule.seq_len=64"]}
"""What takes long by its defaults, in fewer steps and tokens."""


def cases() -> Iterator[tuple[str, str, list[str]]]:
    """(group, member, overrides)."""
    for name, method in available("method").items():
        targets: tuple[str, ...] = getattr(method, "targets", ())
        size = "target_layers=28" if "target_layers" in targets else "target_sublayers=2"
        if targets:
            yield "method", name, [f"method={name}", f"method.{size}", *SHORT.get(name, [])]
    for name in available("merge_rule"):
        yield "merge_rule", name, ["method=angular", "method.target_layers=27", "method.merge=true",
                                   f"merge_rule={name}", *SHORT.get(name, [])]
    yield "similarity", "after=reconstruct", ["method=angular", "method.target_layers=27", "similarity=token_cosine",
                                              "similarity.after=reconstruct"]
    for name in available("width"):
        if name != "none":
            ratio = [] if name == "nm" else ["width.ratio=0.2"]
            yield "width", name, ["method.threshold=1.0", f"width={name}", *ratio]
    for name, recovery in available("recovery").items():
        if name not in ("none", "chain"):
            more = TRAINED if "max_steps" in vars(recovery)["__dataclass_fields__"] else FITTED
            yield "recovery", name, ["method=shortgpt", "method.target_layers=27", f"recovery={name}", *more]
    dropped = ["method=last", "method.target_layers=27"]
    measured = {"smoke": ["evaluation=smoke", "evaluation.limit=2"],
                "speed": ["evaluation=speed", "evaluation.speed_runs=3", "evaluation.speed_discard=1"],
                "perplexity": ["evaluation.corpora={news: 'heldout:news'}", "evaluation.ppl_seq_len=512"],
                "tasks": ["evaluation.tasks=[arc_easy,piqa]", "evaluation.limit=16"],
                "hflm": ["evaluation.tasks=[arc_easy,piqa]", "evaluation.limit=16", "evaluation.backend=hflm"],
                "text": ["evaluation.text=true"]}
    for name, settings in measured.items():
        yield "evaluation", name, [*dropped, *settings]
    ends = ["method.threshold_range=[0.97,0.99]"]
    yield "path", "thresholds", ends
    yield "path", "recovery=family", [*ends, "recovery=family", *TRAINED]
    yield "save", "save", [*dropped, "save_model=true"]


def child(folder: Path, group: str, overrides: list[str], result: Any) -> None:
    """One run, or a path; sends (peak bytes, bytes of weights, of the verifying process, what is allowed)."""
    import torch

    from slm_exp.cli.follow import follow_and_write
    from slm_exp.launch.compose import compose_run
    from slm_exp.models.base import dtype_name
    from slm_exp.models.sizes import BYTES
    from slm_exp.pipeline.memory import held, needed
    from slm_exp.pipeline.run import run
    from slm_exp.runs import checkpoint
    from slm_exp.runs.reload import peak_bytes

    cfg = compose_run(["tracking=none", "evaluation=none", "save_model=false", "calibration.n_samples=2",
                       "calibration.seq_len=16", "runtime.memory=resident", f"cache.dir={folder}/cache", *overrides])
    verify, verified = checkpoint.verify_checkpoint, {}
    checkpoint.verify_checkpoint = lambda *args: verified.update(verify(*args)) or verified
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if group == "path":
        with contextlib.redirect_stdout(io.StringIO()):
            follow_and_write(cfg, folder / cfg.run_id)
    else:
        run(cfg, folder / cfg.run_id)
    peak, dense = peak_bytes(), cfg.model.open(torch.device("cpu"), folder / "cache")
    weights = dense.n_params * BYTES[dtype_name(dense.config, cfg.model.dtype)]
    result.send((peak, weights, verified.get("peak_bytes"), needed(weights, held(cfg, weights, dense.sizes))))
    shutil.rmtree(folder / cfg.run_id)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="groups of members or members, with commas between")
    args, overrides = parser.parse_known_args()
    import lm_eval.evaluator  # noqa: F401 all that runs import
    import peft  # noqa: F401
    import psutil
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from slm_exp.cli import follow  # noqa: F401
    from slm_exp.evaluation.backends import harness  # noqa: F401
    from slm_exp.pipeline import run, stages  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads would not outlive the fork
    context, base = multiprocessing.get_context("fork"), psutil.Process().memory_info().rss
    print(f"imports {base / GIB:.2f} GiB\n{'group':<12}{'member':<22}{'peak GiB':>9}{'allowed':>9}{'times':>7}")
    with tempfile.TemporaryDirectory(prefix="slm_exp-memory-") as folder:  # stages that are no member's are shared
        for group, name, more in [("", "first load", ["method=last", "method.target_layers=27"]), *cases()]:
            if args.only and group and not {group, name} & set(args.only.split(",")):
                continue
            gc.collect()
            ours, theirs = context.Pipe()
            process = context.Process(target=child, args=(Path(folder), group, [*more, *overrides], theirs))
            process.start()
            theirs.close()
            try:
                peak, weights, verified, allowed = ours.recv()
            except EOFError:
                print(f"{group:<12}{name:<22} failed", flush=True)
                continue
            over = "" if peak <= allowed else "  MORE THAN IT SAYS"
            beside = f"  verifying process {verified / GIB:.2f} GiB" if verified else ""
            print(f"{group:<12}{name:<22}{peak / GIB:>9.2f}{allowed / GIB:>9.2f}{(peak - base) / weights:>7.2f}{over}"
                  f"{beside}", flush=True)
            process.join()


if __name__ == "__main__":
    main()

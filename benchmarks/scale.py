"""What models of real sizes take: a random checkpoint is made, cut on the CPU under a memory limit, and removed.

    python benchmarks/scale.py                          # a narrow model: a minute
    python benchmarks/scale.py --shape llama2_7b        # 13.5 GB on disk, hours on a few cores; `make scale`
    python benchmarks/scale.py --shape moe wide6        # a mixture of experts; six layers of a 70B model

Weights are random in bfloat16: numbers mean nothing, sizes are real. Every stage prints its seconds, seconds per block
forward, passes over the layers' files, bytes read from them and peak memory. The limit holds for the process and what
it starts: by a control group of its own where this user may make one, which counts page cache and memory maps too; else
by `ulimit -v`, which counts addresses: maps that are never touched as well, page cache not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "dtype": "bfloat16"}


def sizes(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int = 32000) -> dict[str, Any]:
    """The fields of a config that sizes follow from."""
    return {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "vocab_size": vocab}


SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {**LLAMA, **sizes(1024, 2816, 12, 16, 16, 8000)},
    "llama2_7b": {**LLAMA, **sizes(4096, 11008, 32, 32, 32)},
    "channels": {**LLAMA, **sizes(512, 11008, 4, 8, 8, 8000)},  # Llama-2-7B's, on a narrow stream: for a refit
    "wide6": {**LLAMA, **sizes(8192, 28672, 6, 64, 8)},
    "moe": {**LLAMA, **sizes(1024, 1792, 12, 16, 4, 8000), "model_type": "mixtral", "num_local_experts": 8,
            "num_experts_per_tok": 2},
}
GIB = 2**30


def make(folder: Path, shape: dict[str, Any]) -> None:
    """Write a checkpoint, one layer a file. Layers share their random numbers, shifted: drawing them would take longer
    than writing. Two of four do more than the others, so that a search accepts about half of its candidates."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    from slm_exp.models.base import empty_model

    about = dict(shape)
    config = AutoConfig.for_model(about.pop("model_type"), max_position_embeddings=4096, **about)
    model, generator = empty_model(config), torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}

    def tensor(name: str, shape: tuple[int, ...], at: int) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        if shape not in drawn:
            drawn[shape] = torch.randn(shape, generator=generator, dtype=torch.float32).bfloat16()
        t = torch.roll(drawn[shape], 131 * at + len(name), -1)
        return t if "embed" in name else t.mul_((1.5 if at % 4 < 2 else 0.3) / shape[-1] ** 0.5)

    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(config.num_hidden_layers + 1)]
    for name, p in model.named_parameters():
        at = int(name.split(".")[2]) + 1 if ".layers." in name else 0
        parts[at][name] = tuple(p.shape)
    where = {}
    for at, names in enumerate(parts):
        file = f"model-{at + 1:05}-of-{len(parts):05}.safetensors"
        made = revert_weight_conversion(model, {name: tensor(name, shape, at) for name, shape in names.items()})
        save_file({name: t.contiguous() for name, t in made.items()}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(made, file)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def work(folder: Path, how: str, tokens: tuple[int, int], stages: list[str], threshold: float) -> None:
    """Run the stages in this process and print a line of JSON for each."""
    import numpy as np
    import torch

    from slm_exp.core.cache.store import StageStore
    from slm_exp.core.files import write_json
    from slm_exp.core.registry import available
    from slm_exp.core.types import CalibrationTokens, MergePlan
    from slm_exp.merging.surgery import apply_plan
    from slm_exp.models.hf import HF
    from slm_exp.models.streaming import StreamedLayers
    from slm_exp.recovery.base import RecoveryTask
    from slm_exp.runs.checkpoint import save_checkpoint
    from slm_exp.runs.reload import peak_bytes
    from slm_exp.search.task import PlanTask
    from slm_exp.similarity.layers import layer_similarity

    def member(group: str, name: str, **fields: Any) -> Any:
        return available(group)[name](**fields)

    handle = HF(path=str(folder), dtype="auto").open(torch.device("cpu"), folder)
    handle = handle.stream() if how == "stream" else handle
    ids = np.random.default_rng(0).integers(0, handle.config.vocab_size, tokens).astype(np.int32)
    calibration = CalibrationTokens(ids, "random", tuple(map(str, range(len(ids)))))
    score, kernel = member("similarity", "flat_cosine"), member("kernel", "linear")
    matrix, rule = member("similarity", "cka", batch=32), member("merge_rule", "top_layer")
    n = handle.n_layers
    task = PlanTask(handle, calibration, score, kernel, rule, None, StageStore(None), 0)
    plan = MergePlan(n, ((n // 2, n // 2 + max(2, n // 4)),), rule="top_layer")  # type: ignore[arg-type]
    about: dict[str, Any] = {}

    def plan_of(name: str, **fields: Any) -> None:
        found = member("method", name, **fields).plan(task)
        about.update(blocks=found.block_forwards, evaluations=found.evaluations, layers=found.n_layers_out,
                     accepted=sum(t.accepted for t in found.trace))

    def from_plan() -> None:
        write_json(folder.parent / "plan.json", plan.to_json())
        plan_of("from_plan", path=str(folder.parent / "plan.json"))

    def refit() -> None:
        path = folder.parent / "fit.npy"
        np.save(path, np.random.default_rng(1).integers(0, handle.config.vocab_size, (4, tokens[1])).astype(np.int32))
        recipe = member("recovery", "reconstruct", path=str(path), passes=1, ridges=[0.1, 1.0])
        result = recipe.recover(RecoveryTask(apply_plan(handle, plan, rule), handle, plan, calibration, folder.parent))
        about.update(tensors=len(result.tensors))

    def save() -> None:
        verified = save_checkpoint(apply_plan(handle, plan, rule), folder.parent / "model", plan, calibration)
        about.update(verified)
        shutil.rmtree(folder.parent / "model")

    steps: dict[str, Callable[[], None]] = {
        "load": lambda: handle.model.eval() and None,
        "similarity": lambda: layer_similarity(handle, calibration, kernel, matrix) and None,
        "shortgpt": lambda: plan_of("shortgpt", target_layers=3 * n // 4),
        "slm": lambda: plan_of("slm", threshold=threshold), "refit": refit, "from_plan": from_plan,
        "save": save}
    for name in ["load", *stages]:
        layers: Any = handle.layers if handle.loaded else None
        files = layers.residence.files if isinstance(layers, StreamedLayers) else None
        about, before = {}, files.bytes_read if files else 0
        started, cpu = time.perf_counter(), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        steps[name]()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        read = files.bytes_read - before if files else 0
        print("STAGE", json.dumps({"stage": name, "seconds": seconds, "cpu": cpu, "peak": peak_bytes(),
                                   "read": read, "passes": read / files.layer_bytes() if files else 0,
                                   **about}), flush=True)


def limited(limit: float) -> tuple[Callable[[], None], str, Callable[[], None]]:
    """What the child does first to come under a limit of so many bytes, how that is, and what cleans up."""
    if not limit:
        return (lambda: None), "no limit", (lambda: None)
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        root, name = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if kinds == "memory" else ("/sys/fs/cgroup",
                                                                                                   "memory.max")
        group = Path(root + path) / f"slm-scale-{os.getpid()}"
        if kinds not in ("", "memory") or not Path(root + path).is_dir():
            continue
        try:
            group.mkdir()
            (group / name).write_text(str(int(limit)))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return (partial(_join, group), f"{limit / GIB:.3g} GiB by a control group, page cache and maps counted",
                group.rmdir)
    return (partial(resource.setrlimit, resource.RLIMIT_AS, (int(limit), int(limit))),
            f"{limit / GIB:.3g} GiB of addresses by ulimit -v: maps count untouched, page cache does not",
            lambda: None)


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def run(folder: Path, how: str, limit: float, args: argparse.Namespace) -> None:
    """One process for one way of holding the model, and its table."""
    weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    enter, by, leave = limited(limit)
    print(f"\n{how}, {args.tokens} tokens, {by}; weights {weights / GIB:.2f} GiB")
    print(f"{'stage':<12}{'seconds':>9}{'s/block':>9}{'passes':>8}{'read GiB':>10}{'peak GiB':>10}{'/weights':>9}")
    command = [sys.executable, __file__, "--child", how, "--folder", str(folder), "--tokens", args.tokens,
               "--threshold", str(args.threshold), "--stages", *args.stages]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL if not args.verbose else None,
                             text=True, preexec_fn=enter)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("STAGE"):
            s = json.loads(line.removeprefix("STAGE"))
            block = f"{s['seconds'] / s['blocks']:9.2f}" if s.get("blocks") else f"{'-':>9}"
            shown = ("blocks", "evaluations", "accepted", "layers", "logits_off")
            more = " ".join(f"{k}={s[k]:.4g}" for k in shown if k in s)
            if s.get("peak_bytes"):
                more += f" verifying process: {s['peak_bytes'] / GIB:.2f} GiB"
            print(f"{s['stage']:<12}{s['seconds']:9.1f}{block}{s['passes']:8.2f}{s['read'] / GIB:10.2f}"
                  f"{s['peak'] / GIB:10.2f}{s['peak'] / weights:9.2f}  {more}", flush=True)
    status = child.wait()
    with suppress(OSError):  # what a killed one started may live a moment longer
        leave()
    if status:
        print(f"ended with status {status}" + (" (killed: out of memory?)" if status == -9 else ""))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", nargs="+", default=["narrow"], choices=list(SHAPES))
    parser.add_argument("--memory", nargs="+", default=["stream", "resident"], choices=["stream", "resident"])
    parser.add_argument("--tokens", default="2x64", help="sequences x length")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, where disk or time are short")
    parser.add_argument("--threshold", type=float, default=0.9, help="of the search")
    parser.add_argument("--stages", nargs="+", default=["similarity", "shortgpt", "slm", "refit", "from_plan", "save"])
    parser.add_argument("--limit", type=float, default=4.0, help="GiB for the streamed run; 0 is none")
    parser.add_argument("--resident-limit", type=float, default=24.0)
    parser.add_argument("--folder", help="scratch; null is the system's", default=None)
    parser.add_argument("--keep", help="a folder where checkpoints stay, and are looked for", default=None)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    n, t = map(int, args.tokens.split("x"))
    if args.child:
        work(Path(args.folder), args.child, (n, t), args.stages, args.threshold)
        return
    from slm_exp.core.runtime import available_memory
    from slm_exp.models.base import empty_model

    for name in args.shape:
        from transformers import AutoConfig

        shape = SHAPES[name] | ({"num_hidden_layers": args.layers} if args.layers else {})
        about = dict(shape)
        config = AutoConfig.for_model(about.pop("model_type"), **about)
        need = 2 * sum(p.numel() for p in empty_model(config).parameters())
        with ExitStack() as stack:
            if args.keep:
                where = Path(args.keep, f"{name}-{config.num_hidden_layers}")
            else:
                scratch = tempfile.TemporaryDirectory(prefix="slm_exp-scale-", dir=args.folder)
                where = Path(stack.enter_context(scratch))
            folder, made = where / "dense", where / "dense" / "model.safetensors.index.json"
            folder.mkdir(parents=True, exist_ok=True)
            free, saves = shutil.disk_usage(where).free, "save" in args.stages
            room = (saves + (not made.exists())) * need
            print(f"{name}: {room / 1e9:.1f} GB in {where} ({free / 1e9:.0f} GB free): the weights"
                  f"{' and as much again for what is saved' * saves}; {'kept' if args.keep else 'removed'} afterwards",
                  flush=True)
            if free < 1.1 * room:
                raise SystemExit("there is not enough room; give another --folder.")
            if not made.exists():
                started = time.perf_counter()
                make(folder, shape)
                print(f"made in {time.perf_counter() - started:.0f} s", flush=True)
            for how in args.memory:
                room, wanted = available_memory(), 1.15 * need + GIB
                if how == "resident" and room < wanted:
                    print(f"\nresident: skipped; it takes {wanted / GIB:.1f} GiB and {room / GIB:.1f} are free here")
                    continue
                run(folder, how, GIB * (args.limit if how == "stream" else args.resident_limit), args)


if __name__ == "__main__":
    main()

"""Loading, saving and verifying a model beside reading and writing the same bytes once, in turns.

    python benchmarks/checkpoint.py                              # SmolLM2
    python benchmarks/checkpoint.py --rounds 5 model=hf model.path=FOLDER model.dtype=auto

Bytes are read from a warm cache into one buffer, and written to the folder's disk and flushed; `whole` is a load and a
save with its verification, over a read and a write. Imports are left out: this process has them, and the verifying one
makes them while the checkpoint is written; what is left of its start is in `verify`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from search import timed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slm_exp.core.types import MergePlan  # noqa: E402
from slm_exp.launch.compose import compose_run  # noqa: E402
from slm_exp.models.base import ModelHandle  # noqa: E402
from slm_exp.runs import checkpoint  # noqa: E402
from slm_exp.runs.checkpoint import save_checkpoint  # noqa: E402

CHUNK = 16 << 20


def read(files: list[Path]) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):  # type: ignore[attr-defined]
                pass


def write(files: list[Path], folder: Path) -> None:
    for path in files:
        with path.open("rb") as old, (folder / path.name).open("wb") as new:
            while chunk := old.read(CHUNK):
                new.write(chunk)
            new.flush()
            os.fsync(new.fileno())
        (folder / path.name).unlink()


def load(folder: Path) -> ModelHandle:
    """A model with every page of its weights in memory: files may be mapped."""
    cfg = compose_run(["tracking=none", "model=hf", f"model.path={folder}", "model.dtype=auto"])
    handle = cfg.model.open(torch.device("cpu"), folder)
    for p in handle.model.parameters():
        p.view(-1)[:: 4096 // p.element_size()].sum()
    return handle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure (default: the system's for temporary files)")
    args, overrides = parser.parse_known_args()
    cfg = compose_run(["tracking=none", *overrides])
    first = cfg.model.open(torch.device("cpu"), Path(cfg.cache.dir))
    plan = MergePlan(first.n_layers, ())
    spent: dict[str, list[float]] = {name: [] for name in ("read", "write", "load", "save", "verify")}
    verifying = checkpoint.verify_checkpoint

    def verify(*given: object) -> dict[str, object]:
        started = time.perf_counter()
        try:
            return verifying(*given)  # type: ignore[arg-type]
        finally:
            spent["verify"].append(time.perf_counter() - started)

    checkpoint.verify_checkpoint = verify  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="slm_exp-checkpoint-") as where:
        folder = Path(where) / "model"
        save_checkpoint(first, folder, plan)
        spent["verify"].clear()
        files = sorted(folder.glob("*.safetensors"))
        for _ in range(args.rounds):
            spent["read"].append(timed(lambda: read(files))[1])
            spent["write"].append(timed(lambda: write(files, Path(where)))[1])
            handle, took = timed(lambda: load(folder))
            spent["load"].append(took)
            _, saved = timed(lambda: save_checkpoint(handle, Path(where) / "again", plan))  # noqa: B023
            spent["save"].append(saved - spent["verify"][-1])
        size = sum(path.stat().st_size for path in files)
    median = {name: statistics.median(times) for name, times in spent.items()}
    both = median["read"] + median["write"]
    print(f"{size / 1e6:.0f} MB, {args.rounds} rounds, {torch.get_num_threads()} threads\n")
    print("| | seconds | over | ratio |\n|---|---:|---|---:|")
    for name, over in (("read", ""), ("write", ""), ("load", "read"), ("save", "write"), ("verify", "read")):
        ratio = f"{median[name] / median[over]:.2f}" if over else ""
        print(f"| {name} | {median[name]:.2f} | {over or '-'} | {ratio or '-'} |")
    whole = median["load"] + median["save"] + median["verify"]
    print(f"| whole | {whole:.2f} | read and write | {whole / both:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every table of the papers with every row, end to end, on a random model of Llama-2-7B's shape: what would be refused,
or stay empty, on the real one shows here. Its numbers mean nothing.

    make rehearse                                             # all
    python benchmarks/rehearse.py OUT --only rules,agreement  # some

The model has 32 layers of 64 channels and a vocabulary of 512, so that 96 % of the parameters are in layers as in the
7B models, and sizes, layer ranges and published layer sets are the real ones; it is a folder that no file here names.
Sets that only the hub has are replaced by the package's own prose (`calibration.path`, `evaluation.corpora` in every
record say so); documents, samples, training steps, speed runs and batches are few. Finished runs are kept: the same
command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from slm_exp.launch.compose import compose_run
from slm_exp.launch.workers import cores
from slm_exp.tables.definition import Table, read_table
from slm_exp.tables.definition import parameters as defaults
from slm_exp.tables.facts import published_of
from slm_exp.tables.grid import Grid, fill
from slm_exp.tables.paper import ORDER, write_paper
from slm_exp.tables.records import find_runs

TEXT = "stands_in_for_the_hub"
SMALL = ["calibration.seq_len=48", "evaluation.limit=1"]
TRAINED = [f"recovery.{o}" for o in ("data=bundled", "max_steps=2", "seq_len=64", "batch_size=2", "micro_batch_size=2",
                                     "held_out=4", "warmup_steps=1")]
OWN = 0.2
"""How much of a projection is its layer's own; the rest is shared."""
MAY_BE_EMPTY = ("as published", "memory (GB)", "speedup")
"""Columns: of published sets of a model that is named; a GPU's; of the dense model over itself."""


def make_model(folder: Path) -> Path:
    """A random Llama of the 7B model's proportions as an ordinary folder; made once.

    Its layers are neighbours: each projection is that of one random layer and OWN of another's. With independent layers
    the deltas of the rule sum_of_deltas are larger than the weights, scores collapse at the first merge, and 400
    candidates reach no plan of 21 layers.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from slm_exp.models.tiny import byte_tokenizer, random_weights

    at = folder / "llama2-7b-narrow"
    if not (at / "model.safetensors").is_file():
        config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=32,
                             num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096,
                             tie_word_embeddings=False, bos_token_id=256, eos_token_id=257)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        random_weights(model, 0)
        first, *others = model.model.layers
        with torch.no_grad():
            for layer in others:
                for p, base in zip(layer.parameters(), first.parameters(), strict=True):
                    if p.ndim == 2:
                        p.mul_(OWN).add_(base, alpha=(1 - OWN**2) ** 0.5)
        model.save_pretrained(at)
        byte_tokenizer().save_pretrained(at)
    return at


def make_text(folder: Path) -> Path:
    """The package's prose as rows with `text`, and as plain text beside."""
    import slm_exp.calibration

    prose = Path(slm_exp.calibration.__file__ or "").with_name("prose.txt").read_text(encoding="utf-8").splitlines()
    rows = [line for line in prose if len(line) > 60]
    path = folder / f"{TEXT}.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    path.with_suffix(".txt").write_text("\n".join(rows[:6]), encoding="utf-8")
    return path


def parameters(folder: Path, tau: float) -> dict[str, Any]:
    """Of all tables: Llama-2-7B's facts, few documents, and what is not here replaced."""
    model, text = make_model(folder), make_text(folder)
    plain = text.with_suffix(".txt")
    return {
        "model": "hf", "extra": [f"model.path={model}", f"calibration.path={text}"],
        "last": SMALL, "samples": [3, 4], "draws": [0, 1],
        "texts": [*(f"evaluation.corpora.{name}={plain}" for name in ("wikitext2", "ptb")),
                  *(f"evaluation.corpora.{name}_2048={text}" for name in ("wikitext2", "ptb")),
                  "evaluation.ppl_bos=both"],
        "thresholds": [tau], "at_size": {26: [tau]}, "curve": [29, 26, 23, 20],
        "llm_pruner": [0.203125], "llm_pruner_slm": [0.349375], "flap": [0.2], "flap_slm": [0.2, 0.35],
        "wanda_sp": [0.2], "compared": [25, 23], "published": published_of("llama2_7b"), "trained": TRAINED,
        "timed": ["evaluation.speed_batches=[1]", "evaluation.speed_prompts=[12]", "evaluation.speed_new=[4,128]",
                  "evaluation.speed_runs=2", "evaluation.speed_discard=1"],
        "cases": ["1x12x4"],
    }


def tables_for(folder: Path, only: Sequence[str] = (), tau: float | None = None, **changed: Any) -> list[Table]:
    """The tables, at a threshold that leaves about 26 layers (found by one search), or at `tau`."""
    params = parameters(folder, tau or 0.9) | changed
    if tau is None:
        made = compose_run([*_always(folder), "model=hf", *params["extra"], "calibration=bookcorpus", "evaluation=none",
                            "method=slm", "method.target_layers=26", "calibration.n_samples=4", SMALL[0]])
        found = _run(made, folder, [])["plan"]["threshold"]
        params |= {"thresholds": [round(found, 4)], "at_size": {26: [round(found, 4)]}}
    tables = []
    for name in only or ORDER:
        own = {} if name == "calibration" else {"last": [*SMALL, "calibration.n_samples=4"]}
        own |= {"last": ["calibration.n_samples=4", SMALL[0]]} if name in ("agreement", "speed") else {}
        known = defaults(name)
        tables.append(read_table(name, {key: value for key, value in (params | own).items() if key in known}))
    return tables


def _always(folder: Path) -> list[str]:
    return ["tracking=none", "save_model=false", "runtime=cpu", "runtime.threads=1", f"cache.dir={folder / 'cache'}"]


def _run(cfg: Any, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    from slm_exp.pipeline.run import run

    return run(cfg, folder / "runs" / cfg.run_id, overrides)


def work(folder: Path, cell: Sequence[str]) -> tuple[str, float]:
    """Run one cell; why it failed, or nothing, and its seconds."""
    start = time.monotonic()
    try:
        _run(compose_run([*cell, *_always(folder)]), folder, cell)
    except Exception as error:  # every row is tried
        return f"{' '.join(cell)}: {error}", time.monotonic() - start
    return "", time.monotonic() - start


def empty(table: Table, grid: Grid) -> list[str]:
    """Places without a number, or whose run is missing."""
    rows = [(label, row, line) for block, (label, lines) in zip(table.blocks, grid.blocks, strict=True)
            for row, (_, line) in zip(block.rows, lines, strict=True)]
    return [f"{table.name}: {label}, {row.label}, {column}" for label, row, line in rows
            for column, e in zip(grid.columns, line, strict=True)
            if e.missing is not None or (e.value is None and row.which != "dense"
                                         and not column.startswith(MAY_BE_EMPTY))]


def rehearse(folder: Path, tables: Sequence[Table], workers: int) -> int:
    """Run every cell of the tables, write them; 1 where a run failed or a place stayed empty."""
    folder.mkdir(parents=True, exist_ok=True)
    start, bad = time.monotonic(), 0
    with ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext() as pool:
        for table in tables:
            began = time.monotonic()
            done = list((pool.map if pool else map)(work, [folder] * len(table.cells()), table.cells()))
            for why, _ in done:
                if why:
                    print(f"FAILED {table.name}: {why}", flush=True)
                    bad = 1
            print(f"{table.name:<14}{len(done):>4} runs{time.monotonic() - began:>8.0f} s", flush=True)
    runs = find_runs([folder / "runs"])
    for table in tables:
        for place in empty(table, fill(table, runs, marks=False)):
            print(f"EMPTY {place}")
            bad = 1
    for one in write_paper(tables, runs, folder / "paper", {}):
        print(f"{one.table.name:<14}{one.filled:>4} of {one.rows} rows{'  ' + one.why if one.why else ''}")
        bad |= one.filled < one.rows
    minutes = (time.monotonic() - start) / 60
    print(f"{'FAILED' if bad else 'all filled'}, {minutes:.1f} minutes: {folder / 'paper' / 'index.html'}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("outputs/rehearsal"))
    parser.add_argument("--only", default="", help="tables, separated by commas")
    parser.add_argument("--workers", type=int, default=cores())
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out.mkdir(parents=True, exist_ok=True)
    only = [name for name in args.only.split(",") if name]
    if unknown := set(only) - set(ORDER):
        parser.error(f"--only {sorted(unknown)[0]}; expected some of {', '.join(ORDER)}")
    out = args.out.resolve()
    return rehearse(out, tables_for(out, only), args.workers)


if __name__ == "__main__":
    sys.exit(main())

"""Measure a run's saved model again with the stock `lm_eval` command and compare every accuracy.

    python benchmarks/stock_lm_eval.py outputs/<run_id>

lm-eval gets the saved checkpoint, its own task files, and the documents of the assets as JSON lines; nothing of
slm_exp takes part in the measurement. Prints the command it runs; exit status 1 if a number differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval

from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.documents import local_documents

STOCK = {
    "boolq": "super_glue/boolq/default.yaml", "piqa": "piqa/piqa.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml", "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml", "openbookqa": "openbookqa/openbookqa.yaml",
}


def write_task(folder: Path, task: str) -> None:
    """A task file of the stock name: the stock one, with its data replaced by a local file of all documents."""
    documents = local_documents(task, limit=None)
    if documents is None:
        raise SystemExit("the assets are not installed")
    with open(folder / f"{task}.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in documents.rows)
    lines = {
        "include": Path(lm_eval.__file__).parent / "tasks" / STOCK[task], "task": task, "dataset_path": "json",
        "dataset_name": "null", "training_split": "null",
        "dataset_kwargs": f"{{data_files: {{{documents.split}: {folder / task}.jsonl}}}}",
    }
    if documents.split == "test":
        lines["validation_split"] = "null"
    (folder / f"{task}.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))


def measure(model: Path, tasks: list[str], limit: int | None, dtype: str, device: str) -> dict[str, Any]:
    """lm-eval's own results for a checkpoint folder: task -> {"acc,none": ...}."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for task in tasks:
            write_task(folder, task)
        command = [
            "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype={dtype}",
            "--tasks", ",".join(tasks), "--include_path", str(folder), "--batch_size", "4", "--device", device,
            "--output_path", str(folder / "out"), *(["--limit", str(limit)] if limit else []),
        ]
        print("$", " ".join(command), flush=True)
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        subprocess.run([sys.executable, "-m", *command], check=True, env=env, stdout=subprocess.DEVNULL)
        (found,) = (folder / "out").rglob("results*.json")
        return dict(json.loads(found.read_text())["results"])


def main(run: Path) -> int:
    record = json.loads((run / "record.json").read_text())
    ours = record["eval"]["compressed"]
    tasks = [task for task in ours["tasks"] if task in SEVEN]
    fields = ours["protocol"]["fields"]
    device = record.get("device", "cpu")
    theirs = measure(run / "model", tasks, fields["limit"], fields["dtype"], "cuda" if "cuda" in str(device) else "cpu")
    differ = 0
    print(f"{'task':14} {'metric':9} {'this run':>9} {'lm_eval':>9}")
    for task in tasks:
        for metric in ("acc", "acc_norm"):
            if metric in ours["tasks"][task]:
                mine, stock = ours["tasks"][task][metric], theirs[task][f"{metric},none"]
                differ += mine != stock
                print(f"{task:14} {metric:9} {mine:9.4f} {stock:9.4f}{'' if mine == stock else '   DIFFERS'}")
    print(f"{differ} of the numbers differ" if differ else "all equal")
    return int(differ > 0)


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))

"""The patch figure of the paper's kind: layer similarity on requests of the evaluation tasks, by our estimator.

    python benchmarks/patches.py outputs/patches model=smollm2_135m
    python benchmarks/patches.py outputs/patches model=vicuna_7b runtime=cuda --kernels linear,rbf --tasks piqa,boolq

The released cka.sh takes the first 32 requests (not documents) of each task. Here the same requests, of each task one
after another, are cut into rows of `--length` tokens; every token but the first of a row counts, by unbiased CKA in
minibatches of 256 (slm_exp/similarity/layers.py). Beside it the biased estimator, which is what the released one comes
to, on `--few` of those tokens. OUT gets a PDF a kernel, matrices.npz, and requests.npy, which repeats the draw in any
run: calibration=tokens calibration.path=OUT/requests.npy.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from slm_exp.core.types import CalibrationTokens, LayerSimilarity
from slm_exp.evaluation.report import SEVEN
from slm_exp.kernels.base import Kernel
from slm_exp.launch.api import load
from slm_exp.launch.compose import compose_run
from slm_exp.models.base import ModelHandle
from slm_exp.reporting.heatmap import heatmap
from slm_exp.similarity.layers import layer_similarity

REQUESTS = 32
"""Of each task, as cka.sh takes them: a question with four answers is four."""


def request_rows(handle: ModelHandle, task: str, length: int) -> np.ndarray:
    """The first REQUESTS requests of a task, context and continuation, as rows of ids [N, length]."""
    from slm_exp.evaluation.backends.harness import load_tasks

    of_task = load_tasks([task], REQUESTS, handle.random).objects["tasks"][task]
    of_task.build_all_requests(limit=REQUESTS, rank=0, world_size=1)
    texts = ["".join(request.args) for request in of_task.instances[:REQUESTS]]
    assert handle.tokenizer is not None
    ids = handle.tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids[: len(ids) // length * length], dtype=np.int32).reshape(-1, length)


def neighbours(similarity: LayerSimilarity) -> str:
    """Mean similarity of layers next to each other, of those eight apart, and of the first with the last."""
    m = similarity.matrix_LL
    return (f"next {np.diagonal(m, 1).mean():.3f}  eight apart {np.diagonal(m, 8).mean():.3f}  "
            f"first and last {m[0, -1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", help="model=..., runtime=...")
    parser.add_argument("--tasks", default=",".join(SEVEN))
    parser.add_argument("--kernels", default="linear")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--few", type=int, default=64)
    args = parser.parse_intermixed_args()
    study = load(*args.overrides, "evaluation=none", "tracking=none")
    handle, similarity = study.dense, study.cfg.similarity
    rows = [request_rows(handle, task, args.length) for task in args.tasks.split(",")]
    tokens = CalibrationTokens(np.concatenate(rows), f"{REQUESTS} requests of each of {args.tasks}",
                               tuple(f"{task}:{i}" for task, of in zip(args.tasks.split(","), rows, strict=True)
                                     for i in range(len(of))))  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    np.save(args.out / "requests.npy", tokens.tokens_NT)
    matrices = {}
    print(f"{handle.name}: {tokens.source}, {tokens.tokens_NT.shape[0]} rows of {args.length} tokens")
    for name in args.kernels.split(","):
        kernel: Kernel = compose_run(["model=tiny", f"kernel={name}"]).kernel
        found = layer_similarity(handle, tokens, kernel, similarity)
        n = -(-args.few // (args.length - 1))
        few = CalibrationTokens(tokens.tokens_NT[:: max(1, len(tokens.tokens_NT) // n)][:n], tokens.source)
        biased = layer_similarity(handle, few, kernel, replace(similarity, estimator="biased"))
        print(f"{name:<11}{'ours':<8}{neighbours(found)}")
        print(f"{'':<11}{'biased':<8}{neighbours(biased)}  ({args.few} tokens)")
        heatmap(found, None, f"{handle.name}, requests of {len(rows)} tasks").savefig(
            args.out / f"patches-{name}.pdf", metadata={"CreationDate": None})
        matrices |= {name: found.matrix_LL, f"{name}_biased": biased.matrix_LL}
    np.savez(args.out / "matrices.npz", **matrices)


if __name__ == "__main__":
    main()

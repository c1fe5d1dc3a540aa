"""Perplexity of a checkpoint as it is and quantised afterwards: the table of docs/handover.md.

    python benchmarks/quantised.py outputs/RUN_ID/model --tokens X.npy [--gguf model-q8_0.gguf]

Every way that is installed (torchao, optimum-quanto, and a GGUF file made by llama.cpp's converter, read back by
transformers), 8 bits of weights each; one that is not says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from slm_exp.evaluation.perplexity import perplexity


def load(folder: str, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **kwargs).eval()


def torchao(folder: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

    model = load(folder, dtype=torch.float32)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def through_transformers(folder: str, reload: bool = False) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    how = TorchAoConfig(Int8WeightOnlyConfig())
    model = load(folder, dtype=torch.float32, quantization_config=how)
    if not reload:
        return model
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        return load(saved)


def quanto(folder: str) -> Any:
    from optimum.quanto import freeze, qint8, quantize  # type: ignore[import-not-found]

    model = load(folder, dtype=torch.float32)
    quantize(model, weights=qint8)
    freeze(model)
    return model


def gguf(file: Path, _: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", required=True, help="npy of token ids [N, T]")
    parser.add_argument("--gguf", type=Path, help="the checkpoint converted by llama.cpp")
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokens = np.load(args.tokens)
    ways: dict[str, Callable[[str], Any]] = {
        "float32": partial(load, dtype=torch.float32),
        "torchao, `quantize_(model, Int8WeightOnlyConfig())`": torchao,
        "transformers, `quantization_config=TorchAoConfig(Int8WeightOnlyConfig())`": through_transformers,
        "the same, saved with `save_pretrained` and loaded again": partial(through_transformers, reload=True),
        "optimum-quanto, `quantize(model, weights=qint8); freeze(model)`": quanto,
        **({"GGUF q8_0, read by transformers": partial(gguf, args.gguf)} if args.gguf else {}),
    }
    print(f"| {len(tokens)} x {tokens.shape[1]} tokens | perplexity |\n|---|---|")
    for name, way in ways.items():
        try:
            print(f"| {name} | {perplexity(way(args.checkpoint), tokens):.2f} |", flush=True)
        except ImportError as error:
            print(f"| {name} | not installed: {error.name} |", flush=True)
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    print({n: installed.get(n) for n in ("torch", "transformers", "torchao", "optimum-quanto")})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

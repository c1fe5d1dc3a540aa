"""Where a width decision hurts: its units zeroed by hand in the dense model, in all layers or in some, and perplexity.

    python benchmarks/width_parts.py --tokens X.npy --perplexity Y.npy --methods magnitude,llm_pruner --chunks 8

Nothing of merging/width.py runs: columns of o and of the MLP's last projection are set to zero in the loaded model, and
back. So the column `all` has to be the perplexity of the narrowed model (of flap's without its biases). `inside` leaves
the first four and the last two layers whole, as LLM-Pruner's published runs do. `loudest` counts how many of layer 0's
three channels that write most into the stream (largest input x norm of the column) are removed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from slm_exp.core.types import CalibrationTokens, MergePlan  # noqa: E402
from slm_exp.core.widths import WidthDecision  # noqa: E402
from slm_exp.evaluation.perplexity import perplexity  # noqa: E402
from slm_exp.launch.compose import compose_run  # noqa: E402
from slm_exp.models.base import ModelHandle  # noqa: E402
from slm_exp.width.base import WidthTask  # noqa: E402

Columns = dict[str, torch.Tensor]


def removed(handle: ModelHandle, width: WidthDecision, kinds: Sequence[str], layers: range) -> Columns:
    """By parameter name, the input columns that a decision takes from the projections into the stream."""
    layout, config, out = handle.layout, handle.config, {}
    per = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for i in layers:
        heads = set(width.kept.query_heads[i])
        channels = set(width.channels(i))
        gone = {"attention": [h * per + c for h in range(config.num_attention_heads) if h not in heads
                              for c in range(per)],
                "mlp": [c for c in range(config.intermediate_size) if c not in channels]}  # fmt: skip
        for kind in kinds:
            name = layout.o if kind == "attention" else layout.mlp_out
            out[f"{layout.layer_list}.{i}.{name}.weight"] = torch.tensor(gone[kind], dtype=torch.long)
    return out


@contextlib.contextmanager
def zeroed(model: torch.nn.Module, columns: Columns) -> Iterator[None]:
    """Those columns at zero inside the block."""
    before = {name: model.get_parameter(name)[:, at].clone() for name, at in columns.items()}
    with torch.no_grad():
        for name, at in columns.items():
            model.get_parameter(name)[:, at] = 0
        yield
        for name, at in columns.items():
            model.get_parameter(name)[:, at] = before[name]


def loudest(handle: ModelHandle, tokens: CalibrationTokens, layer: int = 0, n: int = 3) -> list[int]:
    """The channels of a layer's MLP that write most into the stream over the calibration tokens."""
    linear: Any = handle.layers[layer].get_submodule(handle.layout.mlp_out)
    seen: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax((0, 1))))
    with torch.inference_mode():
        handle.model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False)
    hook.remove()
    return (seen[0] * linear.weight.norm(dim=0)).argsort(descending=True)[:n].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", help="npy of token ids: the calibration (default: the bundled text)")
    parser.add_argument("--perplexity", required=True, help="npy of token ids the perplexity is measured on")
    parser.add_argument("--methods", default="magnitude,minitron,llm_pruner,flap", help="width pruners, with commas")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the decoder layers")
    parser.add_argument("--chunks", type=int, help="only the first chunks of the perplexity tokens")
    parser.add_argument("overrides", nargs="*", help="e.g. model=hf model.path=FOLDER")
    args = parser.parse_args()
    common = ["tracking=none", "evaluation=none", "method.threshold=1.0", *args.overrides]
    common += ["calibration=tokens", f"calibration.path={args.tokens}"] if args.tokens else []
    cfg = compose_run(common)
    handle = cfg.model.open(cfg.runtime.prepare(cfg.seed), Path(cfg.cache.dir))
    tokens, text = cfg.calibration.draw(handle, cfg.seed), np.load(args.perplexity, allow_pickle=False)[: args.chunks]
    n, loud = handle.n_layers, loudest(handle, tokens)
    print(f"{handle.name}: dense {perplexity(handle.model, text):.2f} on {len(text)} x {text.shape[1]} tokens; "
          f"{args.ratio} of the decoder layers removed\n")
    print("| width | all | inside | attention only | MLPs only | layer 0's MLP only | loudest |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    both, everywhere = ("attention", "mlp"), range(n)
    parts = [(both, everywhere), (both, range(4, n - 2)), (both[:1], everywhere), (both[1:], everywhere),
             (both[1:], range(1))]  # fmt: skip
    for name in args.methods.split(","):
        pruner = compose_run([*common, f"width={name}", f"width.ratio={args.ratio}"]).width
        width = pruner.decide(WidthTask(handle, tokens, MergePlan(n).slots, args.ratio, cfg.seed, n_dense=n))
        assert width is not None
        cells = []
        for kinds, layers in parts:
            with zeroed(handle.model, removed(handle, width, kinds, layers)):
                cells.append(f"{perplexity(handle.model, text):.4g}")
        gone = set(loud) - set(width.channels(0))
        print(f"| {name} | {' | '.join(cells)} | {len(gone)} of {len(loud)} |", flush=True)


if __name__ == "__main__":
    main()

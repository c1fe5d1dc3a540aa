"""Two checkpoints, tensor by tensor: what docs/handover.md says of files that another program made.

    python benchmarks/same_tensors.py outputs/RUN_ID/model FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, without an output layer that repeats the embedding: some programs write it, some do not."""
    found = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del found["lm_head.weight"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, help="folders of safetensors")
    ours, theirs = (tensors(folder) for folder in parser.parse_args().folders)
    alike = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    unlike = sorted({*ours, *theirs} - {*alike})
    equal = sum(torch.equal(ours[n], theirs[n]) for n in alike)
    apart = max((float((ours[n].float() - theirs[n].float()).abs().max()) for n in alike), default=0.0)
    print(f"{equal} of {len(alike)} tensors bit for bit equal, largest difference {apart:.1e}")
    print("missing or of another shape:", ", ".join(unlike) or "none")
    return int(bool(unlike))


if __name__ == "__main__":
    sys.exit(main())

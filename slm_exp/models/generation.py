"""What transformers would refuse to write again of config and generation config. Imports transformers."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig

from slm_exp.core.errors import ConfigError

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@contextlib.contextmanager
def savable(generation: GenerationConfig | None) -> Iterator[None]:
    """transformers refuses to save some published generation configs (sampling settings without do_sample)."""
    if generation is None:
        yield
        return
    before = {name: getattr(generation, name) for name in ("do_sample", *SAMPLING)}
    try:
        try:
            generation.validate(strict=True)
        except ValueError:
            for name in SAMPLING if before["do_sample"] is False else ():  # greedy: it never read them
                setattr(generation, name, None)
            generation.do_sample = before["do_sample"] is not False
        yield
    finally:
        for name, value in before.items():
            setattr(generation, name, value)


def dry_save(folder: Path, config: PretrainedConfig) -> None:
    """Write config and generation config once, as a checkpoint would hold them, and forget them. Raises ConfigError:
    transformers refuses one; names the file and the remedy. Else a run would end so, at its end."""
    with tempfile.TemporaryDirectory(prefix="slm_exp-dry-") as where:
        name, remedy = "config.json", f"Move generation settings to {FILE}; take out what is no config's."
        try:
            copy.deepcopy(config).save_pretrained(where)
            if (folder / FILE).is_file():
                name, remedy = FILE, "Correct it, or delete it."
                generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
                with savable(generation):
                    generation.save_pretrained(where)
        except Exception as cause:
            reason = " ".join(str(cause).split())[:300]
            raise ConfigError(f"model.path = {folder}: {name} would be refused when the model is saved "
                              f"({type(cause).__name__}: {reason}). {remedy}") from cause

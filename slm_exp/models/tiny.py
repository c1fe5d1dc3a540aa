"""`model=tiny`: a random model of any known family, made in memory. For tests and dry runs; needs no files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slm_exp.core.errors import require, require_one_of
from slm_exp.core.files import digest
from slm_exp.core.registry import Fields, register
from slm_exp.models.base import ModelHandle, ModelSource
from slm_exp.models.layouts import FAMILIES, layout_for
from slm_exp.models.sketch import Sketch, sketch_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

N_BYTES = 256
SPECIALS = ("<s>", "</s>")
RECIPE = 1  # part of the digest: raise it when random_weights changes what it draws


@register("model", "tiny")
@dataclass
class Tiny(ModelSource):
    """A random model; equal fields give bit-equal weights. Its numbers mean nothing."""

    family: str = "llama"
    """A file's name in models/families: llama, mistral, qwen2, qwen3, gemma2, phi3, mixtral, gpt2, ..."""
    layers: int = 8
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    vocab: int = N_BYTES + len(SPECIALS)
    """At least 258: the bytes, then the two special tokens."""
    tied: bool = True
    """Input and output embeddings are one tensor."""
    sliding_window: int | None = None
    """Tokens of a local attention window: in every layer, in the layers that the family's pattern says, or (qwen) the
    upper half."""
    seed: int = 0

    def check(self) -> None:
        super().check()
        require_one_of("model.family", self.family, FAMILIES)
        require(1 <= self.layers <= 1000, "model.layers", self.layers, "a whole number from 1 to 1000")
        require(1 <= self.kv_heads <= self.heads and self.heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads,
                f"a divisor of model.heads = {self.heads}")
        require(self.hidden >= 1 and self.hidden % (2 * self.heads) == 0, "model.hidden", self.hidden,
                f"a multiple of 2 x model.heads = {2 * self.heads}", "RoPE turns pairs of channels.")
        gigabytes = self.weights_bytes() / 1e9
        require(gigabytes <= 8, "model=tiny", f"{gigabytes:.3g} GB of random weights", "at most 8 GB",
                "Lower model.layers, model.hidden or model.vocab.")
        require(0 <= self.seed < 2**63, "model.seed", self.seed, "a whole number from 0 to 2^63 - 1")
        require(self.vocab >= N_BYTES + len(SPECIALS), "model.vocab", self.vocab, "a whole number >= 258")
        windowed = bool(FAMILIES[self.family].window)
        require(self.sliding_window is None or (windowed and self.sliding_window >= 1),
                "model.sliding_window", self.sliding_window, "null, or a number >= 1 with a family other than llama",
                "" if windowed else f"{self.family} has no local attention.")
        self.refuse_elsewhere("is made in memory")

    def needs_resident(self) -> str | None:
        return "model=tiny is made in memory and has no files"

    def identity(self) -> Fields:
        named = ("family", "layers", "hidden", "heads", "kv_heads", "vocab", "tied", "sliding_window", "seed")
        return {"name": self.name, "recipe": RECIPE, **{n: getattr(self, n) for n in named}, "dtype": self._dtype()}

    def weights_bytes(self) -> int:
        return 4 * (2 * self.vocab * self.hidden + 10 * self.layers * self.hidden**2)

    def sketch(self, cache_dir: Path, device_type: str) -> Sketch:
        return sketch_of(f"tiny-{self.family}", digest(self.identity()), self._sizes(), self._dtype(), device_type,
                         random=True)  # fmt: skip

    def open(self, device: torch.device, cache_dir: Path) -> ModelHandle:
        config = self._config()

        def load() -> PreTrainedModel:
            import torch
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            random_weights(model, self.seed)
            for p in model.parameters():  # `model.to(dtype)` would round RoPE's frequencies too; loading never does
                p.data = p.data.to(getattr(torch, self._dtype()))
            return model.to(device)

        return ModelHandle(name=f"tiny-{self.family}", config=config, layout=layout_for(config),
                           digest=digest(self.identity()), device=device, load_model=load,
                           load_tokenizer=byte_tokenizer, random=True,
                           note="random weights: these numbers mean nothing")

    def _dtype(self) -> str:
        return "float32" if self.dtype == "auto" else self.dtype

    def _config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        window: Fields = {}
        kind = FAMILIES[self.family].window
        if kind == "whole" and (self.sliding_window is not None or self.family == "mistral"):
            window = {"sliding_window": self.sliding_window}
        elif kind == "upper":
            window = {
                "use_sliding_window": self.sliding_window is not None,
                "sliding_window": self.sliding_window,
                "max_window_layers": self.layers // 2 if self.sliding_window else self.layers,
            }
        about = {**self._sizes(), **window}
        return AutoConfig.for_model(about.pop("model_type"), max_position_embeddings=8192, bos_token_id=N_BYTES,
                                    eos_token_id=N_BYTES + 1, pad_token_id=N_BYTES + 1, dtype=self._dtype(), **about)

    def _sizes(self) -> Fields:
        """The fields of a config that sizes follow from."""
        return {
            "model_type": self.family, "vocab_size": self.vocab, "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.hidden // self.heads,
            "tie_word_embeddings": self.tied, **FAMILIES[self.family].tiny,
        }  # fmt: skip


def random_weights(model: PreTrainedModel, seed: int) -> None:
    """Fill a float32 CPU model in place, in the order of its parameters, from one generator.

    Unlike an untrained initialisation, layers differ from each other, norm gains from 1 and biases from 0, so that
    a test can tell which layer a tensor came from; each layer moves the residual stream moderately.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 and name.endswith(".weight"):  # a norm's gain
                p.copy_(1 + 0.2 * noise)
            elif p.ndim == 1:
                p.copy_(0.1 * noise)
            elif "embed" in name or ".wte." in name or ".wpe." in name:
                p.copy_(noise)
            else:
                p.copy_(noise * (0.8 / p.shape[-1] ** 0.5))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, `<s>` and `</s>` after them. Decoding gives back any text; adds no special tokens itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = (AddedToken(s, special=True, normalized=False) for s in SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos,
                                   clean_up_tokenization_spaces=False, model_max_length=8192)

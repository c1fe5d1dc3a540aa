"""lm-eval's own Hugging Face class around a model in memory, refusing numbers that mean nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from slm_exp.core.errors import DataError
from slm_exp.engine.progress import advancing

log = logging.getLogger(__name__)


class CheckedHFLM(HFLM):  # type: ignore[misc]
    """HFLM on a model and a tokenizer that are left as they are; NaN and infinite logits are an error.

    The batch size belongs to this class: lm-eval ignores the one given to its evaluate functions.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None = None,
                 add_bos: bool | None = None) -> None:  # fmt: skip
        own = copy.deepcopy(tokenizer)  # HFLM gives it a pad token, and checkpoints must not
        default = 16 if model.device.type == "cuda" else 4  # on a CPU padding costs more than larger batches win
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size or default, add_bos_token=add_bos)
        self._advance: Callable[[int], None] = lambda rows: None

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *args, **kwargs)
        refuse_broken(logits.amax())
        self._advance(len(inps))
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        refuse = LogitsProcessorList([_RefuseBroken()])
        return super()._model_generate(*args, **kwargs, logits_processor=refuse)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        self.warn_of_cuts(requests)
        rows = len({(*context, *answer[:-1]) for _, context, answer in requests})
        with advancing(f"log-likelihoods of {len(requests)} requests", rows, "sequence", disable_tqdm) as self._advance:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs)

    def warn_of_cuts(self, requests: Any) -> None:
        """Say how many (text, context tokens, continuation tokens) do not fit into the model."""
        cut = sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        if cut:
            log.warning("%d of %d requests are longer than the model's %d tokens and lose their beginning.",
                        cut, len(requests), self.max_length)


class _RefuseBroken(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        refuse_broken(scores.amax(dim=-1))
        return scores


def refuse_broken(highest: Tensor) -> None:
    """Raise DataError unless the highest logits are finite: NaN and +inf show in the maximum, which costs no memory."""
    if not torch.isfinite(highest).all():
        raise DataError("the model gives NaN or infinite logits, so it has no accuracy. Try model.dtype=float32"
                        " or bfloat16 (float16 overflows easily), or a plan that merges less.")


def make_room(error: BaseException, device: torch.device, alone: str = "") -> None:
    """After memory ran out free what the device holds in reserve; any other error is raised again. Raises DataError:
    `alone` says what does not fit even by itself."""
    if not out_of_memory(error):
        raise error
    if alone:
        raise DataError(f"{alone} does not fit into memory ({error}). Use a smaller model.dtype or another "
                        "device.") from error
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)

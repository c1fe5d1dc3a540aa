"""What a model writes after an opening, greedily, many at once."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slm_exp.core.errors import DataError
from slm_exp.engine.progress import advancing
from slm_exp.evaluation.backends.decoding import Prompt, continue_greedily, stop_ids
from slm_exp.evaluation.free_text import NEW, health, openings
from slm_exp.evaluation.report import FreeText, Row

ROWS = 16
"""Openings that are continued together at most."""


def write_freely(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None = None
                 ) -> tuple[FreeText, list[Row]]:  # fmt: skip
    """What a model writes after every opening: the means, and {doc_id, prompt, text, tokens, ended} of each.
    Raises DataError: NaN or infinite logits, or a model that keeps no keys and values to go on from.
    Cost: 32 openings of about 50 tokens, and up to NEW tokens after each.
    """
    prompts = openings()
    ends, asked = stop_ids(model, tokenizer.eos_token_id), [tuple(tokenizer(prompt).input_ids) for prompt in prompts]
    answers: list[list[int]] = []
    what = f"free text after {len(asked)} openings, at most"
    with advancing(what, NEW * len(asked), "token") as advance:
        for start in range(0, len(asked), batch_size or ROWS):
            some = [Prompt(tokens, NEW, lambda _: False) for tokens in asked[start : start + (batch_size or ROWS)]]
            try:
                answers += continue_greedily(model, some, ends, done=advance)
            except (AttributeError, RuntimeError) as error:
                raise DataError(f"evaluation.text: {type(model).__name__} cannot write freely ({error}). Use "
                                "evaluation.text=false.") from error
    ended = [answer[-1] in ends for answer in answers]
    texts = [answer[:-1] if end else answer for answer, end in zip(answers, ended, strict=True)]
    rows: list[Row] = [
        {"doc_id": i, "prompt": prompt, "text": tokenizer.decode(text), "tokens": len(text), "ended": end}
        for i, (prompt, text, end) in enumerate(zip(prompts, texts, ended, strict=True))]  # fmt: skip
    return health(texts, ended), rows

"""One model, one report: tasks, their seven-task average, perplexities, and the protocol they were measured by."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import DataError
from slm_exp.evaluation.base import SEVEN, EvalReport, Evaluation
from slm_exp.evaluation.protocol import protocol

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle


def measure(cfg: Evaluation, handle: ModelHandle) -> EvalReport:
    """Measure a model. The same settings give the same protocol whatever the batch size, backend or device.

    Raises:
        DataError: documents or texts that are missing or too short, a model without a tokenizer where text has to
            be read, NaN or infinite logits.
    """
    from slm_exp.evaluation.harness import TaskResults, load_tasks, run_tasks
    from slm_exp.evaluation.perplexity import load_corpora, perplexity

    corpora = load_corpora(cfg.wanted_corpora(), handle, cfg.ppl_seq_len, cfg.ppl_bos)
    found = TaskResults({}, {}, {}, {}, {})
    if cfg.tasks:
        if handle.tokenizer is None:
            raise DataError(f"{handle.name} has no tokenizer, and tasks are text. Use evaluation=none, or corpora of "
                            "token files.")
        loaded = load_tasks(cfg.tasks, cfg.limit, handle.random)  # what is missing is said before weights load
        found = run_tasks(handle.model, handle.tokenizer, cfg.tasks, cfg.limit, cfg.batch_size, cfg.add_bos,
                          handle.random, cfg.backend, loaded)
    values = {name: perplexity(handle.model, corpus.tokens_NT, cfg.batch_size, name)
              for name, corpus in corpora.items()}
    fields: dict[str, Any] = {
        "lm_eval": version("lm-eval"), "tasks": found.protocol, "limit": cfg.limit, **found.settings,
        "dtype": str(handle.model.dtype).removeprefix("torch.") if cfg.tasks or corpora else None,
        "perplexity": {name: corpus.protocol for name, corpus in corpora.items()},
    }
    return EvalReport(
        tasks=found.tasks, average=average(found.tasks), perplexity=values,
        protocol=protocol(fields, found.sources), samples=found.samples,
    )


def average(tasks: dict[str, dict[str, Any]]) -> float | None:
    """Unweighted mean over the seven tasks, acc_norm for hellaswag, arc_challenge and openbookqa, acc for the others.

    None when one of the seven is missing. Source: `convert_json2csv_zeroshot` of the released code.
    """
    if not all(task in tasks for task in SEVEN):
        return None
    return sum(float(tasks[task][metric]) for task, metric in SEVEN.items()) / len(SEVEN)

"""One model, one report: tasks, their seven-task average, perplexities, and the protocol they were measured by."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from slm_exp.core.errors import DataError
from slm_exp.evaluation.perplexity import load_corpora, perplexity
from slm_exp.evaluation.protocol import Protocol
from slm_exp.evaluation.report import EvalReport, average
from slm_exp.evaluation.settings import Settings
from slm_exp.models.base import ModelHandle


def measure(cfg: Settings, handle: ModelHandle) -> EvalReport:
    """Measure a model. The same settings give the same protocol whatever the batch size, backend or device.

    Raises:
        DataError: documents or texts that are missing or too short, a model without a tokenizer where text has to
            be read, NaN or infinite logits.
    """
    corpora = load_corpora(cfg.wanted_corpora(), handle, cfg.ppl_seq_len, cfg.ppl_bos)
    loaded = results = None
    if cfg.tasks:
        from slm_exp.evaluation.backends.harness import load_tasks, run_tasks  # lm-eval takes seconds to import

        if handle.tokenizer is None:
            raise DataError(f"{handle.name} has no tokenizer, and tasks are text. Use evaluation=none, or corpora of "
                            "token files.")
        # before weights load, so that missing documents stop early
        loaded = load_tasks(cfg.tasks, cfg.limit, handle.random, cfg.fewshot)
    values = {name: perplexity(handle.model, corpus.tokens_NT, cfg.batch_size, name)
              for name, corpus in corpora.items()}
    if loaded is not None and handle.tokenizer is not None:
        results = run_tasks(handle.model, handle.tokenizer, loaded, cfg.limit, cfg.batch_size, cfg.add_bos, cfg.backend)
    fields: dict[str, Any] = {
        "lm_eval": version("lm-eval"),
        "tasks": {name: asdict(task) for name, task in results.protocol.items()} if results else {},
        "limit": cfg.limit,
        **(results.settings if results else {}),
        "dtype": str(handle.model.dtype).removeprefix("torch.") if results or corpora else None,
        "perplexity": {name: corpus.protocol for name, corpus in corpora.items()},
    }
    tasks = results.tasks if results else {}
    return EvalReport(tasks, average(tasks), values, Protocol.of(fields, results.sources if results else {}),
                      results.samples if results else {})

"""README.md of a checkpoint, ready for the hub: a header that its validator takes, and what a reader wants to know."""

from __future__ import annotations

import math
import shlex

from huggingface_hub import EvalResult, ModelCardData

from slm_exp.core.types import MergePlan
from slm_exp.core.widths import WidthDecision
from slm_exp.evaluation.report import metric_of
from slm_exp.models.base import ModelHandle
from slm_exp.models.layerwise import has_own_code
from slm_exp.runs.schema import Measurement, Record

CARD = """\
---
{front}
---

# {title}

Made from {base}{note} by merging or removing decoder layers.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({load})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

## How it was made

{facts}

{run}{results}## Limits

{limits}

## Licence

These weights derive from {base}; its licence and terms of use hold for them too{files}.
"""


def model_card(compressed: ModelHandle, plan: MergePlan, record: Record) -> str:
    """README.md of a checkpoint: header, use, how it was made, results with their protocol, limits, licence."""
    source = str(compressed.lineage.get("base", compressed.name))
    hub = compressed.origin.base_model or (source if "/" in source else "")
    own_code = has_own_code(compressed.config)
    title = f"{source}, {plan.n_layers_out} of {plan.n_layers} layers"
    command = shlex.join(["python", "-m", "slm_exp", *record.words])
    files = ", ".join(f"`{path.name}`" for path in compressed.licences)
    return CARD.format(
        front=_header(compressed, plan, record, hub, title), title=title,
        base=f"**[{source}](https://huggingface.co/{hub})**" if hub else f"**{source}**",
        note=f" ({compressed.note})" if compressed.note else "",
        load='"path/to/this/folder", trust_remote_code=True' if own_code else '"path/to/this/folder"',
        facts="\n".join(f"- {fact}" for fact in _facts(compressed, plan, record, own_code)),
        run=f"Run {record.run_id}:\n\n```sh\n{command}\n```\n\n" if record.run_id else "",
        results=_results(record), limits="\n".join(f"- {limit}" for limit in _limits(compressed, record)),
        files=f": {files}" if files else "")


def _header(compressed: ModelHandle, plan: MergePlan, record: Record, hub: str, title: str) -> str:
    """The YAML that the hub reads. A licence that is not known is `unknown`, as the hub calls it."""
    origin = compressed.origin
    tags = ["slm_exp", *(["layer-merging"] if plan.groups else []), *(["depth-pruning"] if plan.dropped else []),
            *(["width-pruning"] if plan.width else []), *([f"method:{plan.method}"] if plan.method else [])]
    about = ModelCardData(
        base_model=hub or None, license=origin.license or "unknown", license_name=origin.license_name or None,
        license_link=origin.license_link or None, language=list(origin.language) or None, library_name="transformers",
        pipeline_tag="text-generation", tags=tags, model_name=title,
        eval_results=eval_results(record.eval.compressed) or None)
    if not about.eval_results:
        del about.model_name
    return about.to_yaml().strip()


def eval_results(measured: Measurement) -> list[EvalResult]:
    """What was measured, as the hub's model-index has it: one entry a task (by the metric that counts) or a corpus."""
    protocol = {"protocol": str(measured.protocol["hash"])} if measured.protocol.get("hash") else {}
    out = []
    for task, scores in measured.tasks.items():
        metric = metric_of(task, scores) or ""
        if isinstance(value := scores.get(metric), int | float) and math.isfinite(value):
            out.append(EvalResult("text-generation", task, task, metric, round(value, 6), task_name="Text generation",
                                  dataset_args={"documents": scores.get("n"), **protocol}))
    out += [EvalResult("text-generation", name, name, "perplexity", round(value, 4), task_name="Text generation",
                       dataset_args=protocol or None)
            for name, value in measured.perplexity.items() if value is not None and math.isfinite(value)]
    return out


def _facts(compressed: ModelHandle, plan: MergePlan, record: Record, own_code: bool) -> list[str]:
    before, after = record.params.before, compressed.n_params
    size = f"{after:,} parameters" + (f", {before:,} before ({1 - after / before:.1%} removed)" if before else "")
    merged = ", ".join(f"{g.start}..{g.stop - 1}" for g in plan.groups) or "none"
    dropped = ", ".join(map(str, plan.dropped)) or "none"
    zeros = ", ".join(f"{part.kind} of {part.layer}" for part in plan.sublayers)
    score = "" if plan.final_score is None else f"; score {plan.final_score:.4f} against the dense model"
    threshold = "" if plan.threshold is None else f", threshold {plan.threshold:g}"
    return [
        f"Size: {size}.", f"Layers merged into one: {merged}. Layers removed: {dropped}.",
        *([f"Sublayers whose output is zero (of the original layers): {zeros}. The checkpoint holds them; an engine "
           "that skips them could leave them out."] if plan.sublayers else []),
        f"Method {plan.method or 'given plan'}, merge rule {plan.rule or 'none'}, similarity "
        f"{plan.similarity or 'none'}{threshold}{score}.",
        *(["The residual stream after every cut is rescaled (magnitude compensation, arXiv:2507.18212)."]
          if "compensation" in plan.effect() else []),
        *_width_facts(plan.width, own_code),
        *([f"Recovered by {recovered['name']}."] if (recovered := compressed.lineage.get("recovery")) else []),
        "The whole decision is in `plan.json`.",
    ]


def _results(record: Record) -> str:
    """A table of both models on the same documents; nothing where nothing was measured."""
    dense, short = record.eval.both
    rows = []
    for task, scores in short.tasks.items():
        metric = metric_of(task, scores) or ""
        values = (side.scores(task).get(metric) for side in (dense, short))
        rows.append((f"{task} ({metric}, {scores.get('n')} documents)",
                     *(f"{100 * value:.1f}" if isinstance(value, int | float) else "–" for value in values)))
    rows += [(f"perplexity of {name}", *("–" if (value := side.perplexity.get(name)) is None else f"{value:.2f}"
                                         for side in (dense, short))) for name in short.perplexity]
    if not rows:
        return ""
    table = "\n".join(f"| {what} | {before} | {after} |" for what, before, after in rows)
    protocol = f" Protocol {short.protocol['hash']}." if short.protocol.get("hash") else ""
    return (f"## Results\n\n| | dense | this model |\n|---|---:|---:|\n{table}\n\n"
            f"By slm_exp; accuracies in per cent.{protocol}\n\n")


def _limits(compressed: ModelHandle, record: Record) -> list[str]:
    short = record.eval.compressed
    few = min((int(scores.get("n") or 0) for scores in short.tasks.values()), default=0)
    return [
        *(["Random weights: this model means nothing."] if compressed.random else []),
        "Removing layers costs more knowledge and fluency than choices among given answers show: look at generated "
        "text and perplexity before any use.",
        *(["Not evaluated after compression."] if not (short.tasks or short.perplexity) else []),
        *([f"Measured on {few} documents a task: a standard error of about {50 / few**0.5:.0f} points each."]
          if 0 < few < 1000 else []),
        "Safety, languages, code and long texts were not looked at; what the base model's card warns of holds too.",
        *([] if compressed.lineage.get("recovery") else ["Not trained after the cut."]),
    ]


def _width_facts(width: WidthDecision | None, own_code: bool) -> list[str]:
    """What the card says of narrowed layers; nothing where there are none."""
    if not width:
        return []
    if width.mask:
        n, m = width.mask.n, width.mask.m
        return [f"{n}:{m} masks: of every {m} neighbouring weights of a projection's row {m - n} are zero. The weights "
                "are stored dense: neither smaller nor faster in plain transformers."]
    share = "" if width.reached is None else f"{width.reached:.1%} of the decoder layers' parameters, "
    own = ("**Layers have widths of their own**, which no ordinary config describes. The folder brings the code that "
           "builds them (`modeling_layerwise.py`): load it with `trust_remote_code=True`, or with `model=hf "
           "model.path=...` of slm_exp, which has that code itself.")
    return [f"Width pruned by {width.method or 'hand'}, {width.order} the layers: {share}whole attention heads and MLP "
            "channels.", *([own] if own_code else [])]

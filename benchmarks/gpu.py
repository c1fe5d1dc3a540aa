"""What a GPU makes of it: every part in interleaved pairs on random models of real shapes, made on the device.

    make gpu                                            # every part on Llama-2-7B's shape, search on all three
    python benchmarks/gpu.py search evaluation          # some parts
    python benchmarks/gpu.py --tiny --device cpu        # the rehearsal: every part on tiny shapes, half a minute

Parts, each at most 5 minutes on one GPU of 80 GB: search (against the released procedure written plainly, on both
sides with block forwards; ended early; screened in bfloat16 on a float32 model; the floor is the search's operations
over the best rate of a matrix product measured here), path (4 x 32 tokens, and 20,000 block forwards at 10 x 128),
baselines (shortgpt to finercut), evaluation (fast against HFLM at its best batch, on made-up documents of the seven
tasks' lengths), refit, lora (against plain peft), speed (dense against 26 and 21 of 32 layers and a fifth narrower),
stream (layers read from their files against resident ones).

Takes nothing from a network: no weights, no texts. Numbers of quality mean nothing, for the weights are random. Writes
gpu.json and gpu.md with device, driver, versions and commit into --out. A part that cannot run says why and the others
go on; exit status 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "reference")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from slm_exp.core.cache.store import StageStore  # noqa: E402
from slm_exp.core.files import digest, write_json, write_text  # noqa: E402
from slm_exp.core.registry import available  # noqa: E402
from slm_exp.core.types import CalibrationTokens, MergePlan  # noqa: E402
from slm_exp.merging.surgery import apply_plan  # noqa: E402
from slm_exp.models.handle import ModelHandle  # noqa: E402
from slm_exp.models.layouts import layout_for  # noqa: E402
from slm_exp.models.sizes import sizes_of  # noqa: E402
from slm_exp.search.task import PlanTask  # noqa: E402

LIMIT_S = 300.0
"""Of one part. Pairs that would begin after it are left out."""
BLOCKS = 20_000
"""About a whole threshold path of 32 layers."""


def shape(family: str, hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
          ) -> dict[str, Any]:
    return {"model_type": family, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
            "tie_word_embeddings": False, "max_position_embeddings": 4096, **more}


SHAPES = {
    "llama2_7b": shape("llama", 4096, 11008, 32, 32, 32, 32000),
    "mistral_7b": shape("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=None),
    "qwen3_1_7b": shape("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128),
}
TINY = {
    "llama2_7b": shape("llama", 32, 64, 6, 4, 4, 320),
    "mistral_7b": shape("mistral", 32, 64, 4, 4, 2, 320, sliding_window=None),
    "qwen3_1_7b": shape("qwen3", 32, 64, 4, 4, 2, 320, head_dim=8),
}
DOCUMENTS = {
    "boolq": (2, True, 140, 1), "piqa": (2, True, 14, 17), "hellaswag": (4, True, 30, 12),
    "winogrande": (2, False, 17, 5), "arc_easy": (4, True, 26, 3), "arc_challenge": (4, True, 30, 6),
    "openbookqa": (4, True, 9, 2)}
"""Of the seven tasks, medians of the first 100 documents in SmolLM2's tokens: choices, whether they share a context,
tokens of it and of a choice."""


@dataclass
class Row:
    """One line of the table."""

    shape: str
    what: str
    ours: float | None = None
    """Seconds, unless `note` says otherwise; the median of pairs."""
    beside: float | None = None
    """What it is compared with."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.beside / self.ours if self.ours and self.beside else None


@dataclass
class Part:
    """What became of a part."""

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int | None = None
    error: str = ""


@dataclass
class Bench:
    """The machine, the sizes, and the one model in memory."""

    device: torch.device
    tiny: bool
    pairs: int
    ended: float = 0.0
    """When the part's time is over."""
    _held: tuple[tuple[str, torch.dtype], ModelHandle] | None = None

    @property
    def shapes(self) -> dict[str, dict[str, Any]]:
        return TINY if self.tiny else SHAPES

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    def handle(self, name: str, dtype: torch.dtype = torch.bfloat16) -> ModelHandle:
        """A random model of a shape; the one before is dropped first."""
        if self._held is None or self._held[0] != (name, dtype):
            self.drop()
            self._held = (name, dtype), random_handle(name, self.shapes[name], self.device, dtype)
        return self._held[1]

    def drop(self) -> None:
        self._held = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """What a call gives, and its seconds until the device has done it."""
        self.wait()
        started = time.perf_counter()
        out = run()
        self.wait()
        return out, time.perf_counter() - started

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_turns(self, calls: Sequence[Callable[[], Any]]) -> tuple[list[Any], list[float]]:
        """What each call gives last, and the median of its seconds; the order turns round from pair to pair."""
        seconds: list[list[float]] = [[] for _ in calls]
        out: list[Any] = [None] * len(calls)
        for i in range(self.pairs):
            if i and time.perf_counter() > self.ended:
                break
            for k in range(len(calls)) if i % 2 == 0 else reversed(range(len(calls))):
                out[k], took = self.timed(calls[k])
                seconds[k].append(took)
        return out, [statistics.median(s) for s in seconds]

    def tokens(self, handle: ModelHandle, n: int, length: int, seed: int = 0) -> CalibrationTokens:
        ids = np.random.default_rng(seed).integers(0, handle.config.vocab_size, (n, length)).astype(np.int32)
        return CalibrationTokens(ids, "random", tuple(map(str, range(n))))

    def task(self, handle: ModelHandle, tokens: CalibrationTokens) -> PlanTask:
        def member(group: str, name: str) -> Any:
            return available(group)[name]()

        return PlanTask(handle, tokens, member("similarity", "flat_cosine"), member("kernel", "linear"),
                        member("merge_rule", "top_layer"), None, StageStore(None))

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of the best matrix product here."""
        n = self.size(8192, 256)
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        a @ b
        return 2 * n**3 / min(self.timed(lambda: a @ b)[1] for _ in range(10))


def random_handle(name: str, about: dict[str, Any], device: torch.device, dtype: torch.dtype) -> ModelHandle:
    """A model of a shape with random weights, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(about)
    config = AutoConfig.for_model(fields.pop("model_type"), bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields,
                                  dtype=str(dtype).removeprefix("torch."))

    def load() -> Any:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter, p in model.named_parameters():
                if p.ndim > 1:  # each layer moves the stream moderately
                    p.normal_(0, 1 if "embed" in parameter else 0.8 / p.shape[-1] ** 0.5, generator=generator)
        return model

    return ModelHandle(name, config, layout_for(config), digest({"shape": about, "dtype": str(dtype)}), device,
                       load_model=load, load_tokenizer=lambda: word_tokenizer(config.vocab_size), random=True)


def word_tokenizer(vocab: int) -> Any:
    """One token for each word `w4`, `w5`, ..., so that a made-up text has as many tokens as it should."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = ["<pad>", "<s>", "</s>", "<unk>"]
    known = {word: i for i, word in enumerate([*named, *(f"w{i}" for i in range(len(named), vocab))])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=4096)


def words(rng: np.random.Generator, n: int, vocab: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(4, vocab, n))


# --- the parts


def search(bench: Bench) -> Iterator[Row]:
    rate = bench.rate(torch.bfloat16)
    yield Row("", f"matrix product in bfloat16, TFLOP/s: {rate / 1e12:.4g}")
    for name in bench.shapes:
        yield from _searches(bench, name, torch.bfloat16, rate)
    name = "qwen3_1_7b"  # the plain procedure holds three models in float32
    yield from _searches(bench, name, torch.float32, bench.rate(torch.float32), screen=True)


def _searches(bench: Bench, name: str, dtype: torch.dtype, rate: float, screen: bool = False) -> Iterator[Row]:
    from released import search as released_search

    from slm_exp.methods.slm import SLM

    handle = bench.handle(name, dtype)
    tokens = bench.tokens(handle, bench.size(10, 4), bench.size(128, 16))
    task = bench.task(handle, tokens)
    threshold = half_accepted(task)
    ids = torch.as_tensor(tokens.tokens_NT, device=bench.device).long()

    def ours(**fields: Any) -> Callable[[], MergePlan]:
        bare = PlanTask(task.handle, task.tokens, task.similarity, task.kernel, task.rule, None, StageStore(None))
        return lambda: SLM(threshold=threshold, commit_open_window=False, **fields).plan(bare)

    calls: dict[str, Callable[[], Any]] = {"search": ours(), "search, early_stop": ours(early_stop=True)}
    if screen:
        calls["search, screened"] = ours(screen_dtype="bfloat16")
        calls["search, screened, early_stop"] = ours(screen_dtype="bfloat16", early_stop=True)
    free = torch.cuda.mem_get_info(bench.device)[0] if bench.device.type == "cuda" else None
    weights = sum(p.nbytes for p in handle.model.parameters())
    if free is None or free > 2.3 * weights:
        calls["plain"] = lambda: released_search(handle.model, ids, threshold, "top_layer")
    found, seconds = bench.in_turns(list(calls.values()))
    of = dict(zip(calls, zip(found, seconds, strict=True), strict=True))
    plain = of.pop("plain", None)
    for what, (plan, took) in of.items():
        floor = plan.block_forwards * sizes_of(handle.config.to_dict()).block_flops(ids.numel(), ids.shape[1]) / rate
        same = "" if plain is None else (
            "same groups" if [tuple(g) for g in plan.groups] == sorted(plain[0].groups) else "OTHER groups")
        run = f"{plan.block_forwards} block forwards" + (f", plain {plain[0].layers_run}" if plain else
                                                         ", plain does not fit into memory")
        yield Row(f"{name} {str(dtype).removeprefix('torch.')}", what, took, plain and plain[1],
                  f"{run}; {took / floor:.2f} x its floor; {same}".rstrip("; "))
    accepted = sum(t.accepted for t in of["search"][0].trace)
    yield Row(name, f"threshold {threshold:.4f}: {accepted} of {len(of['search'][0].trace)} candidates accepted")


def half_accepted(task: PlanTask) -> float:
    """A threshold at which about half of the candidates of a search are accepted."""
    from slm_exp.methods.slm import SLM
    from slm_exp.search.scoring import ScoringEngine
    from slm_exp.search.threshold import search as decide

    engine, start = ScoringEngine(task), SLM().start(task.handle.n_layers)
    low, high = -1.0, 1.0
    for _ in range(16):
        steps = decide(engine, start, (low + high) / 2)
        accepted = sum(step.accepted for step in steps) / max(1, len(steps))
        if abs(accepted - 0.5) < 0.05:
            break
        low, high = ((low + high) / 2, high) if accepted > 0.5 else (low, (low + high) / 2)
    return (low + high) / 2


def path(bench: Bench) -> Iterator[Row]:
    from slm_exp.engine.runner import Slot
    from slm_exp.methods.slm import SLM
    from slm_exp.search.path import follow
    from slm_exp.search.scoring import ScoringEngine

    name = "llama2_7b"
    handle = bench.handle(name)
    task, n = bench.task(handle, bench.tokens(handle, bench.size(4, 3), bench.size(32, 8))), handle.n_layers
    budget = bench.size(2000, 20)

    def run(early_stop: bool) -> Callable[[], Any]:
        def go() -> Any:
            engine = ScoringEngine(task, top=SLM().start(n).high)
            found = follow(engine, SLM().start(n), n, 0.5, 1.0, max_evaluations=budget, early_stop=early_stop)
            return found, engine.block_forwards

        return go

    found, seconds = bench.in_turns([run(False), run(True)])
    for what, (plans, blocks), took in zip(("path", "path, early_stop"), found, seconds, strict=True):
        yield Row(name, what, took, None, f"{plans.evaluations} candidates, {len(plans.plans)} plans, {blocks} block "
                                          f"forwards{'' if plans.complete else f'; ended after {budget} candidates'}")
    engine = ScoringEngine(bench.task(handle, bench.tokens(handle, bench.size(10, 4), bench.size(128, 16))))
    h_NTD, done, wanted = engine.runner.embed(), 0, bench.size(BLOCKS, 40)
    engine.runner.block(Slot(0), h_NTD)
    bench.wait()
    started = time.perf_counter()
    while done < wanted and time.perf_counter() < bench.ended:
        for i in range(n):
            engine.runner.block(Slot(i), h_NTD)
        bench.wait()
        done += n
    took = (time.perf_counter() - started) * wanted / done
    flops = sizes_of(handle.config.to_dict()).block_flops(h_NTD.shape[0] * h_NTD.shape[1], h_NTD.shape[1])
    yield Row(name, f"{wanted} block forwards of {h_NTD.shape[0]} x {h_NTD.shape[1]}", took, None,
              f"{done} measured; {took / wanted * bench.rate(torch.bfloat16) / flops:.2f} x the floor")


def baselines(bench: Bench) -> Iterator[Row]:
    name = "llama2_7b"
    handle = bench.handle(name)
    task = bench.task(handle, bench.tokens(handle, bench.size(10, 4), bench.size(128, 16)))
    flops = sizes_of(handle.config.to_dict()).block_flops(task.tokens.tokens_NT.size, task.tokens.tokens_NT.shape[1])
    rate = bench.rate(torch.bfloat16)
    for method in ("shortgpt", "angular", "shortened_taylor", "shortened_ppl", "sleb", "laco", "llm_drop",
                   "blockpruner", "finercut"):
        if time.perf_counter() > bench.ended:
            yield Row(name, method, note="left out: the part's time was over")
            continue
        whole = {"protect_first": 0, "protect_last": 0} if bench.tiny else {}  # so few layers have none to protect
        chosen: Any = available("method")[method](target_ratio=0.2, **whole)
        plan, took = bench.timed(lambda: chosen.plan(task))  # noqa: B023
        yield Row(name, method, took, None, f"{plan.block_forwards} block forwards; "
                                            f"{took / (plan.block_forwards * flops / rate):.2f} x their floor")


def evaluation(bench: Bench) -> Iterator[Row]:
    from lm_eval.api.instance import Instance

    from slm_exp.evaluation.backends.fast import FastLM
    from slm_exp.evaluation.backends.hflm import CheckedHFLM

    name = "llama2_7b"
    handle, rng = bench.handle(name), np.random.default_rng(0)
    requests: list[Any] = []
    per_task, vocab = bench.size(300, 2), handle.config.vocab_size
    for task, (choices, shared, before, after) in DOCUMENTS.items():
        for doc in range(per_task):
            context = words(rng, max(1, int(before * rng.uniform(0.5, 1.5))), vocab)
            for k in range(choices):
                own = context if shared else words(rng, before, vocab)
                answer = words(rng, max(1, int(after * rng.uniform(0.5, 1.5))), vocab)
                requests.append(Instance("loglikelihood", {}, (own, f" {answer}"), k, metadata=(task, doc, 1)))

    def ask(kind: Any, batch: int | None, some: list[Any]) -> Callable[[], Any]:
        return lambda: kind(handle.model, handle.tokenizer, batch).loglikelihood(some, disable_tqdm=True)

    few = requests[:: max(1, len(requests) // bench.size(700, 12))]
    sizes = [1, 2] if bench.tiny else [16, 32, 64, 128, 256]
    took = {size: bench.timed(ask(CheckedHFLM, size, few))[1] for size in sizes}
    best = min(took, key=lambda size: took[size])
    (fast, plain), (ours, theirs) = bench.in_turns([ask(FastLM, None, requests), ask(CheckedHFLM, best, requests)])
    off = max(abs(a[0] - b[0]) / max(1.0, abs(b[0])) for a, b in zip(fast, plain, strict=True))
    yield Row(name, f"{len(requests)} log-likelihoods", ours, theirs,
              f"HFLM at batch {best}; largest relative difference {off:.1e}")


def refit(bench: Bench) -> Iterator[Row]:
    from slm_exp.recovery.base import RecoveryTask
    from slm_exp.recovery.reconstruct import Reconstruct
    from slm_exp.recovery.refit import refit as run

    name = "llama2_7b"
    handle = bench.handle(name)
    n = handle.n_layers
    fit = bench.tokens(handle, bench.size(24, 5), bench.size(256, 16), seed=1)
    plan = MergePlan(n, dropped=tuple(range(n // 2, n // 2 + n // 4)))
    short = apply_plan(handle, plan, available("merge_rule")["top_layer"]())  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="slm_exp-gpu-") as where:
        task = RecoveryTask(short, handle, plan, fit, Path(where))
        for layers in ("cuts", "sublayers"):
            if time.perf_counter() > bench.ended:
                break
            (tensors, steps), took = bench.timed(lambda: run(task, fit, Reconstruct(layers=layers)))  # noqa: B023
            yield Row(name, f"recovery.layers={layers}", took, None,
                      f"{len(steps)} layers, {len(tensors)} tensors; {fit.tokens_NT.shape[0]} x "
                      f"{fit.tokens_NT.shape[1]} tokens, {len(plan.dropped)} layers gone")


def lora(bench: Bench) -> Iterator[Row]:
    from peft import LoraConfig, get_peft_model

    from slm_exp.merging.sharing import shared_copy
    from slm_exp.recovery.base import RecoveryTask
    from slm_exp.recovery.lora import Lora

    name, rng = "llama2_7b", np.random.default_rng(0)
    handle = bench.handle(name)
    n, length, micro = handle.n_layers, bench.size(256, 16), bench.size(8, 2)
    steps, plan = bench.size(8, 2), MergePlan(n, dropped=(n // 2, n // 2 + 1))
    short = apply_plan(handle, plan, available("merge_rule")["top_layer"]())  # type: ignore[arg-type]
    tokens = bench.tokens(handle, 2, 8)

    with tempfile.TemporaryDirectory(prefix="slm_exp-gpu-") as where:
        texts = Path(where) / "texts.jsonl"
        rows = [words(rng, length, handle.config.vocab_size) for _ in range(2 * micro * steps)]
        texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        recipe = Lora(data="jsonl", path=str(texts), seq_len=length, max_steps=steps, batch_size=2 * micro,
                      micro_batch_size=micro, held_out=0, warmup_steps=1, dropout=0.0)

        def ours() -> Any:
            with tempfile.TemporaryDirectory(dir=where) as folder:
                return recipe.recover(RecoveryTask(short, handle, plan, tokens, Path(folder)))

        def plain() -> None:
            names = [part.rpartition(".")[2] for part in handle.layout.projections]
            config = LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
            model = get_peft_model(shared_copy(short.model, {}), config).train()
            adapters = [p for p in model.parameters() if p.requires_grad]
            optimiser, ids = torch.optim.AdamW(adapters, lr=1e-4), handle.tokenizer(rows).input_ids  # type: ignore[misc]
            for step in range(steps):
                for half in range(2):
                    start = (2 * step + half) * micro
                    batch = torch.tensor(ids[start : start + micro], device=bench.device)
                    with torch.autocast(bench.device.type, torch.bfloat16):
                        (model(batch, labels=batch, use_cache=False).loss / 2).backward()
                optimiser.step()
                optimiser.zero_grad()

        _, (took, beside) = bench.in_turns([ours, plain])
    yield Row(name, f"{steps} steps of {2 * micro} x {length} tokens", took, beside,
              "ours has checkpoints and data besides; beside it plain peft, whose logits are whole")


def speed(bench: Bench) -> Iterator[Row]:
    from slm_exp.evaluation.backends.speed import measure_speed
    from slm_exp.evaluation.settings import PAPERS, Case, Settings
    from slm_exp.merging.width import apply_width
    from slm_exp.width.base import WidthTask

    name = "llama2_7b"
    handle = bench.handle(name)
    n, rule = handle.n_layers, available("merge_rule")["top_layer"]()

    class Cases(Settings):
        def cases(self) -> list[Case]:
            return [Case(1, 4, 3)] if bench.tiny else [PAPERS, Case(16, 12, 128), Case(1, 2048, 32)]

    cfg = Cases(speed_runs=bench.size(8, 1), speed_discard=bench.size(2, 0), speed_grid_runs=3)
    others: dict[str, Callable[[], ModelHandle]] = {
        f"{n - gone} of {n} layers": lambda gone=gone: apply_plan(  # type: ignore[misc]
            handle, MergePlan(n, dropped=tuple(range(n - 2 - gone, n - 2))), rule)  # type: ignore[arg-type]
        for gone in ((6, 11) if n == 32 else (1, 2))}
    pruner = available("width")["magnitude"](ratio=0.2)
    width = WidthTask(handle, bench.tokens(handle, 2, 8), MergePlan(n).slots, 0.2, n_dense=n)
    others["width 0.2"] = lambda: apply_width(handle, pruner.decide(width))  # type: ignore[attr-defined]
    for what, make in others.items():
        if time.perf_counter() > bench.ended:
            break
        for cell in measure_speed(cfg, handle, make())["cells"]:
            if cell.get("error"):
                yield Row(name, f"{what}, {cell['name']}", note=cell["error"])
                continue
            dense, less = cell["dense"], cell["compressed"]
            first, peak = less["first_token_s"]["median"], less.get("peak_bytes")
            yield Row(name, f"{what}, {cell['name']} (batch x prompt x new)", less["latency_s"]["median"],
                      dense["latency_s"]["median"],
                      f"{less['tokens_per_s']['median']:.4g} tokens/s, first token {1e3 * first:.3g} ms, dense "
                      f"{dense['tokens_per_s']['median']:.4g} and {1e3 * dense['first_token_s']['median']:.3g}"
                      + (f"; peak {peak / 1e9:.3g} GB, dense {dense['peak_bytes'] / 1e9:.3g}" if peak else ""))


def stream(bench: Bench) -> Iterator[Row]:
    import shutil

    from scale import make

    from slm_exp.methods.shortgpt import ShortGPT
    from slm_exp.models.hf import HF

    name = "llama2_7b"
    about = {**bench.shapes[name], "dtype": "bfloat16"}
    about.pop("max_position_embeddings")
    need = 2 * sizes_of(about).total
    with tempfile.TemporaryDirectory(prefix="slm_exp-gpu-") as where:
        if shutil.disk_usage(where).free < 1.2 * need:
            raise RuntimeError(f"{where} has no room for {need / 1e9:.1f} GB of weights; set TMPDIR")
        bench.drop()
        folder = Path(where) / "model"
        folder.mkdir()
        _, made = bench.timed(lambda: make(folder, about))
        files = sorted(folder.glob("*.safetensors"))
        _, read = bench.timed(lambda: [len(f.read_bytes()) for f in files])
        yield Row(name, f"reading {need / 1e9:.3g} GB of weights, cache warm", read,
                  note=f"{need / read / 1e9:.3g} GB/s; made and written in {made:.0f} s")
        source = HF(path=str(folder), dtype="auto")
        whole, loaded = bench.timed(lambda: source.open(bench.device, folder).model)
        yield Row(name, "load", loaded, read, "beside it: reading the bytes")
        whole = source.open(bench.device, folder)
        streamed = source.open(bench.device, folder).stream()
        tokens = bench.tokens(whole, bench.size(10, 4), bench.size(128, 16))
        n = whole.n_layers
        (a, b), (ours, resident) = bench.in_turns([
            lambda: ShortGPT(target_layers=n - 1).plan(bench.task(streamed, tokens)),
            lambda: ShortGPT(target_layers=n - 1).plan(bench.task(whole, tokens))])
        yield Row(name, "shortgpt, streamed", ours, resident,
                  f"beside it: resident; {'same plan' if a.dropped == b.dropped else 'OTHER plan'}")


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "search": search, "path": path, "baselines": baselines, "evaluation": evaluation, "refit": refit, "lora": lora,
    "speed": speed, "stream": stream}


# --- around them


def run(bench: Bench, names: Sequence[str], show: Callable[[str], None] = print) -> dict[str, Part]:
    """The parts one after the other; one that fails says why."""
    out: dict[str, Part] = {}
    for name in names:
        part, started = out.setdefault(name, Part()), time.perf_counter()
        bench.ended = started + LIMIT_S
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        try:
            for row in PARTS[name](bench):
                part.rows.append(row)
                show(f"{name}: {line(row)}")
        except Exception as error:  # the other parts are wanted all the same
            part.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            show(f"{name}: not run to its end: {part.error}\n{traceback.format_exc()}")
            bench.drop()
        part.seconds = time.perf_counter() - started
        if bench.device.type == "cuda":
            part.peak_bytes = torch.cuda.max_memory_allocated(bench.device)
    return out


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def line(row: Row) -> str:
    return " | ".join((row.shape, row.what, number(row.ours), number(row.beside), number(row.ratio), row.note))


def markdown(machine: dict[str, Any], parts: dict[str, Part]) -> str:
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = [f"{about}.", "", "| part | shape | what | ours, s | beside, s | times faster | note |",
             "|---|---|---|---:|---:|---:|---|"]
    for name, part in parts.items():
        lines += [f"| {name} | {line(row)} |" for row in part.rows]
        peak = "" if part.peak_bytes is None else f"; peak {part.peak_bytes / 1e9:.3g} GB"
        lines.append(f"| {name} | | whole part | {part.seconds:.1f} | | | {part.error and 'ended by ' + part.error}"
                     f"{peak} |")
    return "\n".join(lines) + "\n"


def machine_of(device: torch.device, tiny: bool) -> dict[str, Any]:
    def said(*command: str) -> str:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        return "unknown"

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = said(*query) if device.type == "cuda" else "none"
    versions = {}
    for package in ("torch", "transformers", "lm-eval", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    dirty = "" if said("git", "status", "--porcelain", "--untracked-files=no") == "" else " with changes"
    return {"device": name, "driver": driver.splitlines()[0], "python": platform.python_version(), **versions,
            "threads": torch.get_num_threads(), "commit": said("git", "rev-parse", "--short", "HEAD") + dirty,
            **({"shapes": "tiny, a rehearsal: its times mean nothing"} if tiny else {})}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or with --tiny cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", default="outputs/gpu", help="folder of gpu.json and gpu.md")
    args = parser.parse_args(arguments)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"part = {unknown[0]}; expected some of {', '.join(PARTS)}.")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device = cuda; no CUDA device is visible. To rehearse: benchmarks/gpu.py --tiny --device cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("--device = cpu; expected --tiny with it: the real shapes take hours there.")
    torch.manual_seed(0)
    machine = machine_of(device, args.tiny)
    parts = run(Bench(device, args.tiny, args.pairs), args.parts or list(PARTS))
    page = markdown(machine, parts)
    write_json(Path(args.out) / "gpu.json", {"machine": machine, "parts": {
        name: {**asdict(part), "rows": [{**asdict(row), "ratio": row.ratio} for row in part.rows]}
        for name, part in parts.items()}})
    write_text(Path(args.out) / "gpu.md", page)
    print(f"\n{page}\n{Path(args.out) / 'gpu.md'}")
    return int(any(part.error for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Recoveries by training: the right loss, the right tensors, and a kill that costs nothing but time."""

from __future__ import annotations

import errno
import gzip
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slm_exp.core.errors import ConfigError, DataError, SlmError
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens, MergePlan, Sublayer
from slm_exp.engine import head_loss as losses
from slm_exp.engine.batches import IGNORED, left_padded
from slm_exp.engine.head_loss import head_loss
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.engine.training import last_checkpoint
from slm_exp.merging.sharing import shared_copy
from slm_exp.merging.surgery import apply_plan
from slm_exp.recovery.base import RecoveryTask, with_tensors
from slm_exp.recovery.examples import checked, make_examples, packed, read_rows

QUICK: dict[str, Any] = {"data": "bundled", "seq_len": 32, "max_steps": 6, "batch_size": 4, "micro_batch_size": 2,
                         "warmup_steps": 1, "checkpoint_every": 3, "held_out": 8}  # fmt: skip
TRAINED = ("lora", "full", "distill", "feature_distill")


@pytest.fixture
def task(make_tiny: Any, tokens: CalibrationTokens, tmp_path: Path) -> RecoveryTask:
    dense, plan = make_tiny(layers=4), MergePlan(4, dropped=(2,))
    return RecoveryTask(apply_plan(dense, plan), dense, plan, tokens, tmp_path / "run")


def make(name: str, **fields: Any) -> Any:
    return available("recovery")[name](**QUICK | fields)


@pytest.mark.parametrize(("name", "lr"), [("lora", 1e-2), ("full", 1e-3), ("distill", 1e-4), ("feature_distill", 1e-3)])
def test_training_lowers_the_held_out_loss(name: str, lr: float, task: RecoveryTask) -> None:
    found = make(name, max_steps=8, lr=lr, checkpoint_every=4).recover(task)
    losses = [loss for _, loss in found.report["held_out_loss"]]
    assert min(losses[1:]) < losses[0]
    assert len(found.report["loss"]) == found.report["steps"] == 8
    assert found.report["examples"]["held_out"] == 8
    assert not (task.folder / "recovery").exists() or not any((task.folder / "recovery").iterdir())


def test_what_each_trains(task: RecoveryTask) -> None:
    everything = set(dict(task.handle.model.named_parameters()))
    projections = {f"model.layers.{i}.{p}.weight" for i in range(3) for p in task.handle.layout.projections}
    beside = {name for name in everything if name.startswith("model.layers.1.")}
    wanted = {"lora": projections, "full": everything, "distill": everything, "feature_distill": beside}
    assert {name: set(make(name, max_steps=1).recover(task).tensors) for name in TRAINED} == wanted


@pytest.mark.parametrize("name", TRAINED)
def test_removed_sublayers_stay_removed(name: str, make_tiny: Any, tokens: Any, tmp_path: Path) -> None:
    dense = make_tiny(layers=4)
    plan = MergePlan(4, dropped=(0,), sublayers=(Sublayer(2, "mlp"), Sublayer(3, "attention")))
    task = RecoveryTask(apply_plan(dense, plan), dense, plan, tokens, tmp_path)
    gone = {"model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"}
    found = make(name, max_steps=2, lr=1e-2).recover(task)
    assert found.tensors
    model = with_tensors(task.handle, found, {"recovery": {}}).model
    assert not any(model.get_parameter(n).any() for n in gone)
    trained = {n for n in found.tensors if not torch.equal(found.tensors[n], task.handle.model.get_parameter(n))}
    assert {"model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"} <= trained


def test_an_adapter_merged_is_the_adapter_run(task: RecoveryTask) -> None:
    from peft import PeftModel

    recovery = make("lora", lr=1e-2)
    found = recovery.recover(task)
    merged = with_tensors(task.handle, found, {"recovery": recovery.identity()}).model
    adapted = PeftModel.from_pretrained(shared_copy(task.handle.model), str(task.folder / "lora")).eval()
    ids = torch.as_tensor(task.tokens.tokens_NT).long()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(merged(ids).logits, task.handle.model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("part", [1, 2, 100])
@pytest.mark.parametrize(("ce", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.3, 2.0)])
def test_the_divergence_in_parts_is_that_of_whole_logits(
    part: int, ce: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS", 20 * part)
    generator = torch.Generator().manual_seed(0)
    h, w, t, v = (torch.randn(n, d, generator=generator) for n, d in ((5, 4), (20, 4), (5, 6), (20, 6)))
    labels = torch.randint(0, 20, (5,), generator=generator)
    h.requires_grad_(True)
    w.requires_grad_(True)
    own, theirs = h @ w.T, t @ v.T
    kl = torch.nn.functional.kl_div((own / temperature).log_softmax(1), (theirs / temperature).log_softmax(1),
                                    log_target=True, reduction="batchmean")
    wanted = kl + ce * torch.nn.functional.cross_entropy(own, labels)
    grads = torch.autograd.grad(3 * wanted, (h, w))
    found = head_loss(h, w, labels, ce, (t, v), temperature)
    torch.testing.assert_close(found, wanted)
    for ours, theirs_ in zip(torch.autograd.grad(3 * found, (h, w)), grads, strict=True):
        torch.testing.assert_close(ours, theirs_)


def test_features_of_a_model_that_lost_nothing_are_the_dense_ones(make_tiny: Any, tokens: Any, tmp_path: Path) -> None:
    dense = make_tiny(layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        dense.layers[2].get_submodule(name).weight.data.zero_()
    plan = MergePlan(4, dropped=(2,))
    task = RecoveryTask(apply_plan(dense, plan), dense, plan, tokens, tmp_path)
    recovery = make("feature_distill")
    ids = torch.as_tensor(tokens.tokens_NT).long()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    student = recovery.student(task)
    assert float(recovery.loss(task, student, batch)) < 1e-9
    dense.layers[2].mlp.down_proj.weight.data.normal_()
    loss = recovery.loss(task, student, batch)
    assert float(loss) > 1e-3
    loss.backward()
    assert {n for n, p in student.named_parameters() if p.grad is not None} == {
        n for n, _ in student.named_parameters() if n.startswith("model.layers.1.")}


@pytest.mark.parametrize("layers", ["cuts", "all"])
def test_overlapping_windows_are_windows_one_by_one(layers: str, make_tiny: Any, tokens: Any, tmp_path: Path) -> None:
    """The loss is the mean over windows run alone from the student's own states; a layer learns from each it is in."""
    dense = make_tiny(layers=6)
    plan = MergePlan(6, dropped=(2,), sublayers=(Sublayer(3, "mlp"),))
    task = RecoveryTask(apply_plan(dense, plan), dense, plan, tokens, tmp_path)
    ids = torch.as_tensor(tokens.tokens_NT).long()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    one, two = make("feature_distill", layers=layers, window=1), make("feature_distill", layers=layers, window=2,
                                                                     overlap=True)
    student = one.student(task)
    starts = [1, 2] if layers == "cuts" else [1, 2, 3, 4]
    assert {n.split(".")[2] for n, p in student.named_parameters() if p.requires_grad} == set(map(str, starts))
    same = make("feature_distill", layers=layers, window=1, overlap=True)
    torch.testing.assert_close(same.loss(task, student, batch), one.loss(task, student, batch))
    runner = BlockRunner(task.handle, ids.numpy(), fuse=False)
    dense_runner = BlockRunner(dense, ids.numpy(), fuse=False)
    wanted, given = [dense_runner.embed()], [runner.embed()]
    for i in range(6):
        wanted.append(dense_runner.block(Slot(i), wanted[-1]))
    for i in range(5):
        given.append(runner.block(Slot(i), given[-1]))
    ends = [1, 3, 4, 5, 6]  # the dense layer whose input the stream after each slot stands for
    terms = []
    for s in starts:
        h_NTD = given[s]
        for b in range(s, min(s + 2, 5)):
            h_NTD = runner.block(Slot(b), h_NTD)
            target = wanted[ends[b]][:, 1:]
            terms.append(float((h_NTD[:, 1:] - target).square().sum() / target.square().sum()))
    loss = two.loss(task, student, batch)
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    student.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    assert {n.split(".")[2] for n in grads} == set(map(str, starts))
    student.zero_grad()
    one.loss(task, student, batch).backward()
    lower = f"model.layers.{starts[0]}.mlp.down_proj.weight"
    assert not torch.allclose(grads[lower] * len(terms), student.get_parameter(lower).grad * len(starts), rtol=1e-3)
    assert ("overlap" in two.identity(), "overlap" in one.identity()) == (True, False)


def test_a_killed_training_goes_on_to_the_same_loss_curve(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("killed_training.py"))

    def go(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True,
                              check=False)

    first = go("whole", "0", "killed", "5")
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert list((tmp_path / "killed" / "recovery").glob("*/checkpoint-4"))
    again = go("killed", "0")
    assert again.returncode == 0, again.stderr
    whole, resumed = (json.loads(ran.stdout.splitlines()[-1]) for ran in (first, again))
    assert whole == resumed  # every loss, and the digest of the trained tensors


def test_a_checkpoint_cut_off_while_it_was_written_is_not_gone_on_from(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (10, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_full_disk_is_told_and_the_training_goes_on_from_the_last_whole_checkpoint(
    task: RecoveryTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    whole = make("full", max_steps=4, checkpoint_every=2).recover(replace(task, folder=task.folder / "whole"))
    write, room = safetensors.torch.save_file, 1

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= 1
        write(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(SlmError, match=r"no space left on the disk.*the same command then goes on"):
        make("full", max_steps=4, checkpoint_every=2).recover(task)
    room = 9
    found = make("full", max_steps=4, checkpoint_every=2).recover(task)
    assert found.report["loss"] == whole.report["loss"]
    assert found.report["digest"] == whole.report["digest"]


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_first_step(
    task: RecoveryTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda where: SimpleNamespace(free=1000))
    with pytest.raises(SlmError, match=r"0.00 GB free; recovery=full needs .* GB for 3 checkpoints"):
        make("full").recover(task)


def test_the_estimate_stands_in_the_report(task: RecoveryTask) -> None:
    found = make("full", max_steps=2, precision="float32").recover(task).report
    assert found["precision"] == "float32"
    assert found["estimate"]["steps"] == found["steps"] == 2
    assert found["estimate"]["memory_gb"] >= round(16 * found["trained_parameters"] / 1e9, 3)
    assert {"minutes", "seconds_per_step", "disk_gb"} < set(found["estimate"])


def test_the_tracker_gets_loss_and_learning_rate(task: RecoveryTask) -> None:
    heard: list[dict[str, Any]] = []

    class Ear:
        def log(self, section: dict[str, Any]) -> None:
            heard.append(section["recovery"])

    make("lora").recover(replace(task, track=Ear()))
    steps = [h for h in heard if "loss" in h]
    assert [h["step"] for h in steps] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "lr", "step"} <= set(h) for h in steps)
    assert any("held_out_loss" in h for h in heard)


def test_the_wall_clock_limit_ends_a_training_and_keeps_it_out_of_the_cache(task: RecoveryTask) -> None:
    recovery = make("full", max_steps=1000, max_minutes=1e-6)
    assert not recovery.stored()
    found = recovery.recover(task)
    assert found.report["steps"] == 1
    assert found.tensors


def test_instructions_by_the_template_with_the_prompt_masked(make_tiny: Any) -> None:
    tokenizer = make_tiny().tokenizer
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Go.", "output": "Gone."}]
    found = make_examples([checked(row, "row") for row in rows], tokenizer, 1000, 0, 0)
    texts = {tokenizer.decode(e["input_ids"]): tokenizer.decode([t for t in e["labels"] if t != IGNORED])
             for e in found.train}
    assert set(texts.values()) == {"3</s>", "Gone.</s>"}
    with_input = next(t for t, answer in texts.items() if answer == "3</s>")
    assert with_input.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>")
    assert "paired with an input" in with_input
    assert "### Input" not in next(t for t in texts if t != with_input)


def test_examples_without_a_token_to_learn_are_dropped_and_counted(make_tiny: Any) -> None:
    tokenizer = make_tiny().tokenizer
    rows = [{"instruction": "x" * n, "output": "answer"} for n in (1, 2, 3, 500)]
    found = make_examples(rows, tokenizer, 200, 1, 0)
    assert (len(found.train), len(found.held_out), found.dropped) == (3, 0, 1)
    with pytest.raises(DataError, match=r"0 examples .* raise it for long prompts"):
        make_examples(rows, tokenizer, 50, 1, 0)


def test_prose_is_packed_and_short_rows_are_filled_on_the_left(make_tiny: Any) -> None:
    windows = packed(["abc", "defg", "h"], make_tiny().tokenizer, 4)
    assert [w["input_ids"] for w in windows] == [[97, 98, 99, 257], [100, 101, 102, 103]] or len(windows) == 2
    batch = left_padded([{"input_ids": [1, 2], "labels": [IGNORED, 2]}, {"input_ids": [3] * 9, "labels": [3] * 9}], 7)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [7] * 14 + [1, 2]
    assert batch["labels"][0].tolist() == [IGNORED] * 15 + [2]
    assert batch["attention_mask"].sum(1).tolist() == [2, 9]
    assert batch["labels"][1].tolist() == [IGNORED] * 8 + [3] * 8  # the first token follows padding alone


def test_features_of_the_first_real_token_do_not_count(task: RecoveryTask) -> None:
    recovery = make("feature_distill")
    student, seen = recovery.student(task), []
    for first in (5, 200):  # alone in its row: whatever it is, nothing is compared
        ids = torch.tensor([[0, 0, 0, first]])
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[0, 0, 0, 1]])}
        seen.append(float(recovery.loss(task, student, {**batch, "labels": torch.tensor([[-100, -100, -100, first]])})))
    assert seen == [0, 0]


@pytest.mark.parametrize(("text", "message"), [
    ('{"instruction": "a", "outptu": "b"}', r"row 1: field 'output' is absent.*Did you mean outptu"),
    ('{"text": 3}', "field 'text' is a int"),
    ('[1, 2]', "row 1: a JSON int"),
    ('{"text": "a"', "not readable as JSON lines"),
])  # fmt: skip
def test_rows_without_the_needed_fields_are_refused(
    text: str, message: str, make_tiny: Any, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text + "\n")
    dense = make_tiny()
    with pytest.raises(DataError, match=message):
        make("lora", data="jsonl", path=str(file)).check_data(dense)
    assert not dense.loaded


def test_lists_lines_and_gzip_are_read_alike(make_tiny: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "output": ""}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = [read_rows("jsonl", str(file), make_tiny()) for file in sorted(tmp_path.iterdir())]
    assert found[0] == found[1] == found[2] == [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": ""}]


def test_the_hub_offline_is_refused_before_weights_load(make_tiny: Any) -> None:
    dense = make_tiny()
    for fields, message in (({"data": "hub"}, r"recovery\.path = yahma/alpaca-cleaned: not in the local"),
                            ({"data": "hub", "path": "a/b"}, "expected OWNER/NAME:FILE")):
        with pytest.raises((DataError, ConfigError), match=message):
            make("lora", **fields).check_data(dense)
    assert not dense.loaded


@pytest.mark.parametrize(("fields", "message"), [
    ({"data": "hib"}, "recovery.data = hib; expected one of bundled, hub, jsonl"),
    ({"data": "jsonl"}, "recovery.path = None; expected a file"),
    ({"path": "x.jsonl"}, "null with recovery.data=bundled"),
    ({"batch_size": 5}, "recovery.batch_size = 5; expected a multiple of recovery.micro_batch_size = 2"),
    ({"lr": 0}, "recovery.lr = 0; expected a number > 0"),
    ({"max_steps": 0}, "recovery.max_steps = 0; expected null or a whole number > 0"),
    ({"dropout": 1.0}, "recovery.dropout = 1.0; expected a share"),
])  # fmt: skip
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("lora", **fields)


def test_the_papers_recipe_is_the_default() -> None:
    lora = available("recovery")["lora"]()
    assert (lora.r, lora.alpha, lora.dropout, lora.lr, lora.epochs) == (8, 16.0, 0.05, 1e-4, 2.0)  # type: ignore[attr-defined]
    assert (lora.batch_size, lora.seq_len, lora.warmup_steps) == (64, 256, 100)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing_changes_no_loss(name: str, task: RecoveryTask) -> None:
    plain, saving = (make(name, gradient_checkpointing=on, max_steps=2).recover(task).report["loss"]
                     for on in (False, True))
    assert [loss for _, loss in saving] == pytest.approx([loss for _, loss in plain], rel=1e-5)

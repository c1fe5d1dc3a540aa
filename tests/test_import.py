"""`slm import`: the published EvoPress sets, LLM-Drop's lists, mergekit's slices; what is none of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_exp.cli import main as cli
from slm_exp.core.errors import ConfigError
from slm_exp.core.types import MergePlan, Sublayer
from slm_exp.launch.compose import conf_dir
from slm_exp.runs.foreign import read_foreign
from slm_exp.runs.mergekit import mergekit

RELEASED = {  # IST-DASLab/EvoPress@50888a0, 25 %
    "llama2_7b": ((10, 12, 13, 14, 23, 24, 25, 27), (9, 10, 11, 12, 13, 22, 23, 25)),
    "llama3_8b": ((4, 9, 11, 19, 20, 25, 26, 27), (4, 8, 9, 10, 19, 25, 26, 28)),
}


def written(folder: Path, text: Any, name: str = "file.txt") -> Path:
    (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder / name


def evopress(attention: tuple[int, ...], mlp: tuple[int, ...], n: int = 32) -> str:
    words = {(False, False): "none", (True, False): "attn", (False, True): "mlp", (True, True): "attn+mlp"}
    return "\n".join(words[i in attention, i in mlp] for i in range(n)) + "\n"


@pytest.mark.parametrize("model", RELEASED)
def test_the_published_sets_of_evopress_are_the_plans_that_ship(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, evopress(*RELEASED[model]))
    assert cli.main(["import", str(file)]) == 0
    plan = MergePlan.from_json(json.loads(capsys.readouterr().out))
    (shipped,) = (conf_dir() / "published" / "evopress" / model).glob("*.json")
    assert plan.effect() == MergePlan.from_json(json.loads(shipped.read_text())).effect()
    assert len(plan.sublayers) + 2 * len(plan.dropped) == 16
    assert cli.main(["import", str(file), "--out", str(tmp_path / "plan.json")]) == 0
    assert MergePlan.load(tmp_path) == plan


@pytest.mark.parametrize("given", [[25, 26, 24], [i in (24, 25, 26) for i in range(32)]])
def test_llm_drops_lists_are_numbers_or_flags(given: list[Any], tmp_path: Path) -> None:
    plan = read_foreign(written(tmp_path, {"num_hidden_layers": 32, "drop_mlp_list": [26], "drop_attn_list": given}))
    assert (plan.n_layers, plan.dropped) == (32, (26,))
    assert plan.sublayers == (Sublayer(24, "attention"), Sublayer(25, "attention"))
    bare = written(tmp_path, {"drop_attn_list": [3], "drop_mlp_list": []})
    assert read_foreign(bare, 8).sublayers == (Sublayer(3, "attention"),)
    with pytest.raises(ConfigError, match="--layers is missing; expected the dense model's number of layers"):
        read_foreign(bare)


def test_what_is_exported_to_mergekit_comes_back(tmp_path: Path) -> None:
    plan = MergePlan(8, dropped=(2, 6, 7), sublayers=(Sublayer(0, "mlp"), Sublayer(4, "attention")))
    file = written(tmp_path, mergekit(plan, "owner/name", "bfloat16"), "merge.yaml")
    assert read_foreign(file, 8).effect() == plan.effect()
    with pytest.raises(ConfigError, match="--layers is missing"):
        read_foreign(file)
    written(tmp_path, {"num_hidden_layers": 8}, "config.json")
    here = written(tmp_path, mergekit(plan, str(tmp_path), None), "merge.yaml")
    assert read_foreign(here).effect() == plan.effect()


def slices(*ranges: Any, **fields: Any) -> str:
    parts = [{"sources": [{"model": "m", "layer_range": list(r), **fields}]} for r in ranges]
    return yaml.safe_dump({"merge_method": "passthrough", "slices": parts, "dtype": "float16"})


@pytest.mark.parametrize(("text", "message"), [
    ("none\nattn\nattnn\n", r"line 3 = 'attnn'; expected one of none, attn, mlp, attn\+mlp. Did you mean attn\?"),
    ("attn+mlp\nattn+mlp\n", "leaves none of 2 layers"),
    ("once upon a time", "begins with 'once upon a time'; expected EvoPress's text"),
    ("", "begins with ''; expected EvoPress's text"),
    ({"drop_attn_list": "3"}, "drop_attn_list = 3; expected a list of numbers"),
    ({"drop_attn_list": [1, 1], "num_hidden_layers": 4}, r"drop_attn_list = \[1, 1\] has a layer twice"),
    ({"drop_attn_list": [True], "num_hidden_layers": 4}, "has 1 entries; expected one for each of 4 layers"),
    ({"drop_attn_list": [9], "num_hidden_layers": 4}, "layer 9 without attention lies outside a model of 4 layers"),
    (slices((0, 4), (2, 8)), r"slices\[1\].layer_range = \[2, 8\]; expected layers from 4 up, in order"),
    (slices((0, 9)), "the slices end with layer 8; the model has 8 layers"),
    (slices((0, 8), parameters={"scale": [{"filter": "o_proj", "value": 0.5}]}), "scale of o_proj by 0.5; expected 0"),
    (slices((0, 8)).replace("passthrough", "linear"), "merge_method = linear; expected passthrough"),
    (slices((0, 8)) + "---\n" + slices((0, 8)), "it has 2 documents, which merge models"),
    (slices((0, 8)).replace("dtype", "dtipe"), "key 'dtipe'; expected .* Did you mean dtype"),
])  # fmt: skip
def test_what_no_plan_can_say_is_refused(text: Any, message: str, tmp_path: Path) -> None:
    layers = 8 if isinstance(text, str) and "slices" in text else None
    with pytest.raises(ConfigError, match=message):
        read_foreign(written(tmp_path, text), layers)


def test_another_number_of_layers_than_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--layers = 8; expected 3, as the file has it"):
        read_foreign(written(tmp_path, "none\nattn\nmlp\n"), 8)

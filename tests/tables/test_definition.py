"""Declarations of tables: every one composes, for every model; a wrong one says what is wrong."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from slm_exp.core.documents import read_yaml
from slm_exp.core.errors import ConfigError
from slm_exp.launch.compose import compose_run, conf_dir
from slm_exp.tables.build import split_words
from slm_exp.tables.definition import cells, read_table, table_names, together
from slm_exp.tables.facts import published_of, sizes_of_layers

MODELS = sorted(set(read_yaml(conf_dir() / "table" / "_models.yaml")) - {"all"})
PUBLISHED = {"llama1_7b": ("18.0", "33.0"), "llama2_7b": ("18.0", "33.0"), "vicuna_7b": ("18.0", "33.0"),
             "llama3_8b": ("16.3", "29.9"), "llama2_13b": ("19.5", "34.1"), "vicuna_13b": ("19.5", "34.1")}


def test_the_papers_models_and_tables_are_there() -> None:
    assert {p.stem for p in (conf_dir() / "model").glob("*.yaml")} | {"smollm2_135m"} <= set(MODELS)
    assert {"main", "main_lora", "recovery", "rules", "thresholds", "calibration", "similarity", "depth_width", "speed",
            "as_published"} <= set(table_names())


@pytest.mark.parametrize("name", table_names())
@pytest.mark.parametrize("model", MODELS)
def test_every_table_names_its_runs(name: str, model: str) -> None:
    if name == "agreement" and not published_of(model):
        with pytest.raises(ConfigError, match=f"nothing is known for model = {model} of published"):
            cells(name, {"model": model})
        return
    found = cells(name, {"model": model})
    assert found
    assert all(f"model={model}" in overrides for overrides in found)
    assert len({tuple(c) for c in found}) == len(found)
    first = (conf_dir() / "table" / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# slm tables {name} DIR"


@pytest.mark.parametrize("name", table_names())
def test_the_first_and_the_last_run_compose(name: str) -> None:
    runs = cells(name)
    assert compose_run(runs[0]).run_id != compose_run(runs[-1]).run_id


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_run_of_every_table_composes(model: str) -> None:
    for name in set(table_names()) - {"agreement"}:  # two sources list the same set
        runs = cells(name, {"model": model})
        assert len({compose_run(overrides).run_id for overrides in runs}) == len(runs), name


@pytest.mark.parametrize(("model", "percents"), PUBLISHED.items())
def test_the_true_ratio_is_printed_beside_the_papers_name(model: str, percents: tuple[str, str]) -> None:
    table = read_table("main", {"model": model})
    assert [block.label.partition(", ")[2] for block in table.blocks] == [
        f"{percent} % of the parameters removed" for percent in percents]
    assert all(name in table.notes[0] for name in ('"20 %"', '"35 %"'))


def test_a_table_of_unknown_thresholds_is_refused() -> None:
    with pytest.raises(ConfigError, match="thresholds"):
        cells("thresholds", {"model": "vicuna_7b", "curve": []})


@pytest.mark.parametrize("name", ["main_lora", "speed"])
def test_every_row_of_main_is_in_the_tables_that_say_so(name: str) -> None:
    for model in ("smollm2_135m", "llama2_7b", "llama2_13b"):
        main, other = read_table("main", {"model": model}), read_table(name, {"model": model})
        assert other.blocks == main.blocks


def test_a_released_threshold_stands_at_the_size_that_it_belongs_to_and_nowhere_else() -> None:
    for model, at in (("llama2_7b", {21: ["0.68"]}), ("llama2_13b", {}), ("smollm2_135m", {})):
        table = read_table("main", {"model": model})
        for size, block in zip(table.params["sizes"], table.blocks, strict=True):
            released = [row for row in block.rows if "method.commit_open_window=false" in row.runs]
            assert [row.label for row in released] == [f"SLM, released search at {tau}" for tau in at.get(size, [])]


def test_sizes_of_the_papers() -> None:
    sizes = {model: [c for c in cells("rules", {"model": model}) if "merge_rule=mean" in c] for model in MODELS}
    assert [c[-2] for c in sizes["vicuna_7b"]] == ["method.target_layers=26", "method.target_layers=21"]
    assert [c[-2] for c in sizes["llama2_13b"]] == ["method.target_layers=32", "method.target_layers=26"]


def test_parameters_are_those_of_the_shapes() -> None:
    """Counted from (hidden, MLP, key-value heads x head size, vocabulary): what _models.yaml prints ratios from."""
    shapes = {"smollm2_135m": (576, 1536, 192, 49152, 1), "llama1_7b": (4096, 11008, 4096, 32000, 2),
              "llama2_7b": (4096, 11008, 4096, 32000, 2),
              "vicuna_7b": (4096, 11008, 4096, 32000, 2), "llama2_13b": (5120, 13824, 5120, 32000, 2),
              "vicuna_13b": (5120, 13824, 5120, 32000, 2), "llama3_8b": (4096, 14336, 1024, 128256, 2)}
    for model, (d, mlp, kv, vocabulary, embeddings) in shapes.items():
        told = read_yaml(conf_dir() / "table" / "_models.yaml")[model]
        layer = 2 * d * d + 2 * d * kv + 3 * d * mlp + 2 * d
        assert told["per_layer"] == layer
        assert told["parameters"] == told["layers"] * layer + embeddings * vocabulary * d + d


def test_seeds_multiply_and_parameters_reach_every_run() -> None:
    one, five = cells("rules"), cells("rules", {"seeds": [0, 1, 2, 3, 4], "extra": ["model.dtype=bfloat16"]})
    assert len(five) == 5 * len(one)
    assert sum("seed=3" in c for c in five) == len(one)
    assert all("model.dtype=bfloat16" in c for c in five)


def test_later_overrides_hold() -> None:
    assert together(["a=1", "b=2"], ["a=3"]) == ["a=3", "b=2"]


GOOD = """
title: T
params: {model: smollm2_135m}
runs: [model=$model]
rows:
  - {label: one, runs: [method.threshold=0.9]}
columns: [average]
"""
WRONG = [
    ("rows:", "rowz:", "rowz.*Did you mean rows"),
    ("label: one", "lable: one", r"rows\[0\].*lable.*Did you mean label"),
    ("label: one, ", "", r"rows\[0\] has no label"),
    ("[average]", "[avrage]", r"columns\[0\].show = avrage.*Did you mean average"),
    ("[average]", "[]", "columns = .*at least one"),
    ("$model", "$modle", r"runs uses \$modle.*Did you mean model"),
    ("method.threshold=0.9", "threshold", "expected an override"),
    ("rows:\n", "rows: 3\nx:\n", "the key 'x'"),
    ("label: one", "label: one, which: danse", "expected compressed or dense"),
    ("title: T", "title: [", "cannot be read"),
    ("label: one", "label: 5 $", "plain dollar"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_a_wrong_declaration_names_what_and_where(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(GOOD)
    assert cells(str(path)) == [["model=smollm2_135m", "method.threshold=0.9"]]
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        cells(str(path))
    assert "own.yaml" in str(error.value)


@pytest.mark.parametrize(("params", "message"), [
    ({"sizes": [99]}, "size = 99.*1 to 29"),
    ({"sizes": [0]}, "size = 0.*1 to 29"),
    ({"sizes": ["few"]}, "size = few.*1 to 29"),
    ({"model": "llama_7b"}, "model = llama_7b.*Did you mean llama2_7b"),
    ({"model": "hf", "extra": ["model.path=no/where"]}, "sizes, which neither .* model=hf; give it: sizes="),
    ({"model": "hf"}, "model.path = ''; expected a folder"),
])  # fmt: skip
def test_parameters_that_no_run_could_have_are_refused(params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells("rules", params)


def test_a_model_that_no_file_names_has_the_papers_sizes_of_its_own_layers(make_tiny, tmp_path: Path) -> None:
    handle = make_tiny("qwen3", layers=20, tied=False)
    handle.model.save_pretrained(tmp_path / "mine")
    table = read_table("main", {"model": "hf", "extra": [f"model.path={tmp_path / 'mine'}"]})
    shares = [100 * gone * handle.layer_params / handle.n_params for gone in (4, 7)]
    assert [b.label for b in table.blocks] == [f"{20 - gone} of 20 layers, {share:.1f} % of the parameters removed"
                                               for gone, share in zip((4, 7), shares, strict=True)]
    assert table.title.endswith(", mine")
    assert all(f"model.path={tmp_path / 'mine'}" in cell for cell in table.cells())
    assert [sizes_of_layers(n, 9, 1)["sizes"] for n in (32, 40)] == [[26, 21], [32, 26]]  # the papers'


def test_unknown_names_are_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="Did you mean main"):
        cells("mian")
    with pytest.raises(ConfigError, match="Did you mean model"):
        cells("main", {"modle": "tiny"})
    with pytest.raises(ConfigError, match=r"nowhere/own\.yaml; expected one of"):
        cells("nowhere/own.yaml")


PAGE = Path(__file__).resolve().parents[2] / "docs" / "tables.md"


def test_the_page_tells_what_is_there(tmp_path: Path) -> None:
    text = PAGE.read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", text, re.M))
    assert {name: int(n) for name, n in listed.items()} == {name: len(cells(name)) for name in table_names()}
    own = tmp_path / "own.yaml"
    own.write_text(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    assert len(cells(str(own))) == 4
    for line in re.findall(r"^slm tables .*$", text, re.M):
        name, *words = shlex.split(line)[2:]
        params, _ = split_words([word for word in words if not word.startswith("--")])
        assert name in ("sweep", "paper") or cells(name, params), line

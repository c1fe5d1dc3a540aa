"""Every preset with every member: it composes, or one line names both."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import GROUPS, available
from slm_exp.launch.compose import PRESETS, Composer, choices, compose_raw, conf_dir
from slm_exp.launch.hydra_compat import probes
from slm_exp.launch.jobs import search_axes, split_sweep

ALL = [(kind, name) for kind in PRESETS for name in choices(kind)]


def touched(kind: str, name: str) -> set[str]:
    """The groups of which a preset sets a field, so that it may clash with another member. A member that it chooses
    gives way to the one on the command line."""
    text = yaml.safe_load((conf_dir() / kind / f"{name}.yaml").read_text())
    swept = text.get("hydra", {}).get("sweeper", {}).get("params", {})
    return {key.partition(".")[0] for key in (*text, *(key for key in swept if "." in key))} & set(GROUPS)


def refusals(kind: str, name: str, groups: set[str], tmp_path: Path) -> dict[str, str]:
    """The pairs that are refused in their first job, by member; a member gets the path or size that it cannot do
    without."""
    composer, out = Composer(), {}
    sweeper = compose_raw([f"{kind}={name}"], with_hydra=True).hydra.sweeper
    params = dict(sweeper.get("params") or {})
    jobs_of = split_sweep if sweeper.get("search") is None else lambda *of: probes(search_axes(*of))
    (tmp_path / "plan.json").write_text('{"n_layers": 30, "dropped": [4]}')
    (tmp_path / "text.jsonl").write_text('{"text": "words"}\n')
    needs = {"from_plan": f"method.path={tmp_path}/plan.json", "jsonl": f"calibration.path={tmp_path}/text.jsonl",
             "tokens": f"calibration.path={tmp_path}/text.jsonl", "hf": f"model.path={tmp_path}",
             "chain": "recovery.steps=[reconstruct]"}  # fmt: skip
    first = (conf_dir() / kind / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    size = first.removeprefix("# python -m slm_exp ").split()[1:]  # one that its command cannot do without
    for group in sorted(groups):
        for member in choices(group):
            package = getattr(available(group).get(member), "package", "")
            if package and importlib.util.find_spec(package) is None:
                continue
            words = [f"{kind}={name}", f"{group}={member}", *([needs[member]] if member in needs else [])]
            job = [*size, *(o for o in jobs_of(words, params)[0] if o not in words)]
            for more in ([], ["method.target_ratio=0.1"]):
                try:
                    composer.run_config([*words, *job, *more])
                    out.pop(f"{group}={member}", None)
                except ConfigError as error:
                    out[f"{group}={member}"] = f"job {' '.join([*words, *job])}: {error}" if job else str(error)
                if "takes a size: set exactly one" not in out.get(f"{group}={member}", ""):
                    break
    return out


@pytest.mark.parametrize(("kind", "name"), ALL, ids=[f"{kind}={name}" for kind, name in ALL])
def test_a_preset_composes_with_the_members_of_the_groups_it_touches(kind, name, tmp_path):
    for pair, said in refusals(kind, name, touched(kind, name), tmp_path).items():
        assert f"{kind}={name}" in said, said
        assert pair in said, said
        assert "\n" not in said
        if re.search(f"which {pair} has not. Leave one of them out|expected one of", said):  # of another member
            continue
        assert re.search(r"expected null|set exactly one", said), said  # a size for a threshold's method, or none
        assert pair.startswith("method=")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), ALL, ids=[f"{kind}={name}" for kind, name in ALL])
def test_a_preset_composes_with_every_member(kind, name, tmp_path):
    for pair, said in refusals(kind, name, set(GROUPS), tmp_path).items():
        assert f"{kind}={name}" in said, said
        assert pair in said or pair in ("method=from_plan", "model=gemma3_270m", "model=qwen2_5_coder_0_5b"), said
        assert "\n" not in said, said


def test_a_preset_that_sets_what_a_member_lacks_is_refused_by_both_names(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nkernel:\n  bandwidth: 2\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    assert compose_raw([search, "experiment=mine", "kernel=rbf"]).kernel.bandwidth == 2
    with pytest.raises(ConfigError) as refused:
        compose_raw([search, "experiment=mine", "kernel=cosine"])
    assert str(refused.value) == ("experiment=mine sets kernel.bandwidth, which kernel=cosine has not. Leave one of "
                                  "them out.")

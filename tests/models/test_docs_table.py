"""docs/models.md says of every family what its layout does, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from slm_exp.models.layout import LayerLayout
from slm_exp.models.layouts import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
PROOFS = {
    "search": "test_prefix_reuse_scores_the_model_that_surgery_makes",
    "rules": "test_prefix_reuse_scores_the_model_that_surgery_makes",
    "sublayers": "test_prefix_reuse_scores_the_model_that_surgery_makes",
    "width": "test_width_is_pruned_or_refused_with_the_reason",
    "refit": "test_a_refit_takes_away_what_a_projection_can",
    "LoRA": "test_lora_trains_the_layouts_projections",
    "save": "test_a_shorter_model_saves_and_reloads_as_itself",
    "reload": "test_a_shorter_model_saves_and_reloads_as_itself",
    "cache": "test_a_shorter_model_saves_and_reloads_as_itself",
}
"""Ability -> the contract test that shows it, for every family."""


def abilities(layout: LayerLayout) -> dict[str, str]:
    width = f"no: {layout.no_width}" if layout.no_width else "uniform, per layer" if layout.layerwise else "uniform"
    fitted = dict.fromkeys(name.rpartition(".")[2] for kind in ("mlp", "attention") for name in layout.fitted[kind])
    gains = " and their norms' gains" if layout.output_norms else ""
    lora = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layout.projections))
    own = {"width": width, "refit": ", ".join(fitted) + gains, "LoRA": lora + ", experts" * bool(layout.experts)}
    return {name: own.get(name, "yes") for name in PROOFS}


def table() -> str:
    """What docs/models.md holds. `python -c "from test_docs_table import table; print(table())"` in this folder."""
    rows = [f"| {family} | {' | '.join(abilities(layout).values())} |" for family, layout in FAMILIES.items()]
    shown = [f"| shown by | {' | '.join(f'`{name}`' for name in PROOFS.values())} |"]
    return "\n".join([f"| family | {' | '.join(PROOFS)} |", "|---" * (len(PROOFS) + 1) + "|", *rows, *shown])


def test_the_table_is_what_the_layouts_say():
    assert table() in PAGE.read_text()


def test_every_test_that_the_page_names_exists_and_runs_over_all_families():
    contracts = (ROOT / "tests" / "contracts" / "test_layouts.py").read_text()
    for name in set(PROOFS.values()):
        (decorators,) = re.findall(rf"((?:^@.*\n)+)def {name}\(", contracts, re.M)
        assert "@every_family" in decorators, name
    everywhere = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", PAGE.read_text())):
        assert f"def {name}(" in everywhere, name

"""Width decisions for tests."""

from __future__ import annotations

from typing import Any

from slm_exp.core.widths import KeptUnits, WidthDecision, WidthSizes, pack_indices


def keeps_first(
    heads: list[int], kv_heads: list[int], channels: list[int], hidden: int = 32, **fields: Any
) -> WidthDecision:
    """Every layer keeps its lowest units, so many of each kind; `fields` are the decision's others."""
    kept = KeptUnits(query_heads=[[*range(n)] for n in heads], kv_heads=[[*range(n)] for n in kv_heads],
                     channels=[pack_indices(range(n), max(channels)) for n in channels])
    return WidthDecision(sizes=WidthSizes(heads=heads, kv_heads=kv_heads, channels=channels, hidden=hidden), kept=kept,
                         **fields)

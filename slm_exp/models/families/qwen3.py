"""Qwen3: as Qwen2, with norms of queries and keys instead of biases."""

from __future__ import annotations

from dataclasses import replace

from slm_exp.models.families import qwen2

LAYOUT = replace(qwen2.LAYOUT, family="qwen3")

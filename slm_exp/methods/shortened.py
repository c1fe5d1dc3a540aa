"""The first 4 and the last 2 layers are protected: the released code applies its "+" rule to every order unless it."""

from __future__ import annotations

from dataclasses import dataclass

from slm_exp.methods.base import Baseline


@dataclass
class Shortened(Baseline):
    """The first 4 and the last 2 layers are protected: the released code applies its "+" rule to every order unless it
    is told not to; protect_first=0 protect_last=0 is without it. Source: Shortened LLaMA, arXiv:2402.02834."""

    protect_first: int = 4
    protect_last: int = 2

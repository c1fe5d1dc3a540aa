"""The stage cache: content-addressed results that grid cells share; `slm cache` looks after it."""

from slm_exp.cache.command import main, parser

__all__ = ["main", "parser"]

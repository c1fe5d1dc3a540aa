"""Tables of a paper from records: `conf/table/*.yaml` declares them, `slm tables NAME DIR...` draws them."""

from slm_exp.tables.command import main, parser

__all__ = ["main", "parser"]

"""Log files that are never written through a link, log records without secrets, output in any encoding."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_exp.core.secrets import masked


def open_log(path: Path) -> io.FileIO:
    """A log to append to: never through a link that somebody has put there. Raises OSError: it is a link, or not a
    file, or cannot be written."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0), 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ELOOP, "not a plain file", str(path))
    return io.FileIO(fd, "a")


class LogFile(logging.FileHandler):
    """The `file` handler of conf/config.yaml."""

    def _open(self) -> Any:
        return io.TextIOWrapper(open_log(Path(self.baseFilename)), encoding="utf-8", line_buffering=True)


class Console(logging.StreamHandler[Any]):
    """The `console` handler of conf/config.yaml: a plain line on stdout as it is by then, so that a line of progress
    moves out of its way. The log file has the module and the date too."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{record.getMessage()}"


def silence_bars() -> None:
    """No progress bars of other packages in this process and those it starts: there is one line of our own; and no word
    of what their next versions will want of each other. To be called before they are imported."""
    theirs = r"(transformers|peft|accelerate|datasets|lm_eval)\b"
    warnings.filterwarnings("ignore", category=FutureWarning, module=theirs)
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers and the hub meanwhile, in a process whose other bars are its own (a notebook); they are
    as they were afterwards. `silence_bars` is for a process of ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    theirs, hub = is_progress_bar_enabled(), are_progress_bars_disabled()
    with warnings.catch_warnings(action="ignore"):  # the hub's, where the environment has decided
        disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            if theirs:
                enable_progress_bar()
            if hub:
                disable_progress_bars()


def print_anything() -> None:
    """Have stdout write out what its encoding has no character for (LANG=C, a file name that is not UTF-8)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def mask_logs() -> None:
    """Have every log record of this process masked, whoever writes it. Idempotent."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # a message whose arguments do not fit: logging says so
            made.msg, made.args = masked(made.getMessage()), ()
        return made

    record.masks = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)

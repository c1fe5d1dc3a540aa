"""One lock for every folder: flock, or where the file system has none a marker file that names its holder.

The kernel frees a flock with its process. A marker is taken over when no process of this host has its holder's id.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_warned: set[Path] = set()


class Lock:
    """A lock on a file that stays; not reentrant between objects. flock does not see the markers of hosts without."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BaseFileLock = FileLock(path, fallback_to_soft=False)

    def acquire(self, timeout: float = -1) -> None:
        """Wait for it, at most `timeout` seconds (-1: for ever).

        Raises:
            Timeout: another holds it.
            OSError: the folder cannot be written.
        """
        try:
            self._lock.acquire(timeout)
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in NO_FLOCK:
                raise
            if self.path.parent not in _warned:
                _warned.add(self.path.parent)
                log.warning("%s: its file system has no flock (%s); marker files lock it instead, so use it from one "
                            "host at a time, or mount it with locks.", self.path.parent, error.strerror)
            self._lock = SoftFileLock(self.path.with_name(f"{self.path.name}.held"))
            self._lock.acquire(timeout)

    def release(self) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def held(self, timeout: float = -1) -> Iterator[None]:
        """Hold it for a while; see `acquire`."""
        self.acquire(timeout)
        try:
            yield
        finally:
            self.release()


def in_use(path: Path) -> bool:
    """Whether a process holds this lock. Cost: the lock is taken for a moment."""
    if not path.exists() and not path.with_name(f"{path.name}.held").exists():
        return False
    try:
        with Lock(path).held(timeout=0):
            return False
    except Timeout:
        return True
    except PermissionError:
        return _held_by_another_user(path)
    except OSError:  # a read-only folder: nobody can be writing there
        return False


def _held_by_another_user(path: Path) -> bool:
    """`in_use` of a lock that this user may only read."""
    try:
        with open(path, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not to be read either, or without flock
        return False
    return False

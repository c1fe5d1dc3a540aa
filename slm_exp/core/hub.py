"""Files of Hugging Face repositories: the local cache first, then one quick look at the hub, never a retry loop."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_exp.core.errors import SlmError

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0


def switched_off() -> list[str]:
    """The variables that are set and forbid Hugging Face's libraries to look further than the cache."""
    return [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
            if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]


def offline() -> bool:
    """Whether Hugging Face is switched offline for data sets."""
    return any(name != "TRANSFORMERS_OFFLINE" for name in switched_off())


def cache_folder(variable: str, name: str) -> Path:
    """Hugging Face's cache folder as the environment has it now: HF_HUB_CACHE is `hub`, HF_DATASETS_CACHE `datasets`.
    (huggingface_hub's own constants are those of the moment it was imported.)"""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get(variable) or home / name).expanduser()


@functools.cache
def no_answer() -> Exception | None:
    """What comes instead of an answer when the hub is asked, once a process and for PROBE_SECONDS; None: it answers."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # no route, no name server, a proxy, a timeout, switched offline
        return error
    return None


@dataclass(frozen=True)
class Repo:
    """A repository, and how to speak of it to the user."""

    name: str
    """`owner/name`."""
    revision: str | None
    """Commit, tag or branch; None is the default branch."""
    kind: str
    """`model` or `dataset`."""
    setting: str
    """The config field that named it."""
    error: type[SlmError]
    """What to raise."""

    def folder(self, patterns: Sequence[str], complete: Callable[[Path], bool],
               vet: Callable[[list[str]], None] | None = None) -> Path:
        """The snapshot folder with the files that match `patterns`; its name is the commit.

        A cached snapshot that is `complete` is taken as it is, without a look at the network: a branch stays where it
        was when first fetched. Else one request with a short timeout decides between a download and an error.
        Args:
            complete: whether a folder has all that is needed.
            vet: sees the repo's file names before a download and may refuse.
        Raises `error`: gated, missing, offline or unreachable; names the remedy.
        """
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(self.name, **self._which, allow_patterns=list(patterns),
                                            local_files_only=True))
            if complete(folder):
                return folder
        with self._probing():
            info: Any = HfApi().repo_info(self.name, **self._which, timeout=PROBE_SECONDS)
        if vet is not None:
            vet([f.rfilename for f in info.siblings or []])
        with self._downloading(info.sha):
            folder = Path(snapshot_download(self.name, **self._which, allow_patterns=list(patterns)))
        if not complete(folder):
            raise self.error(f"{self}: the repo lacks files that are needed ({', '.join(patterns)}).")
        return folder

    def file(self, name: str) -> Path:
        """One file; looks at nothing else, for some data sets list a hundred thousand. Raises as `folder`."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import LocalEntryNotFoundError

        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(self.name, name, **self._which, local_files_only=True))
        with self._probing():
            about = get_hf_file_metadata(hf_hub_url(self.name, name, **self._which), timeout=PROBE_SECONDS)
        with self._downloading(about.commit_hash):
            return Path(hf_hub_download(self.name, name, **self._which))

    def require(self, name: str) -> None:
        """Refuse a file that is neither in the cache nor on a hub that answers; fetches nothing. Raises as `folder`."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

        if isinstance(try_to_load_from_cache(self.name, name, **self._which), str):
            return
        with self._probing():
            if failure := no_answer():
                raise failure
            get_hf_file_metadata(hf_hub_url(self.name, name, **self._which), timeout=PROBE_SECONDS)

    @property
    def _which(self) -> dict[str, Any]:
        return {"repo_type": self.kind, "revision": self.revision}

    def __str__(self) -> str:
        return f"{self.setting} = {self.name}" + (f" (revision {self.revision})" if self.revision else "")

    @contextlib.contextmanager
    def _probing(self) -> Iterator[None]:
        """Refuse at once when offline; put what the hub answers into words."""
        from huggingface_hub import constants
        from huggingface_hub import errors as hub

        flags = " --repo-type dataset" if self.kind == "dataset" else ""
        flags += f" --revision {self.revision}" if self.revision else ""
        elsewhere = (f"On a machine with access run `hf download {self.name}{flags}` and copy the cache folder "
                     f"($HF_HOME), or set {self.setting} to a local {'folder' if self.kind == 'model' else 'file'}.")
        absent = f"{self}: not in the local Hugging Face cache, and"
        if constants.is_offline_mode():
            raise self.error(f"{absent} HF_HUB_OFFLINE forbids looking further. Unset it to download. {elsewhere}")
        page = f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        try:
            yield
        except hub.GatedRepoError as cause:
            raise self.error(f"{self}: the repo is gated. Accept its terms at {page}, then `hf auth login` (or set "
                             "HF_TOKEN).") from cause
        except (hub.RevisionNotFoundError, hub.EntryNotFoundError) as cause:
            raise self.error(f"{self}: the repo has no such revision or file.") from cause
        except hub.RepositoryNotFoundError as cause:
            raise self.error(f"{self}: no such repo on the hub, or it is private. Check the name; for a private repo "
                             "`hf auth login` (or set HF_TOKEN).") from cause
        except Exception as cause:  # no route, no name server, a proxy, a timeout, a server error: all mean "not now"
            problem = f"{type(cause).__name__}: {cause}"
            raise self.error(f"{absent} the hub does not answer ({problem}). {elsewhere}") from cause

    @contextlib.contextmanager
    def _downloading(self, commit: str | None) -> Iterator[None]:
        log.info("downloading %s at %s ...", self.name, commit)
        try:
            yield
        except Exception as cause:
            raise self.error(f"{self}: the download failed ({type(cause).__name__}: {cause}). Run it again to go on; "
                             "what is complete stays in the cache.") from cause

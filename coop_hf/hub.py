"""Where files come from: a local folder first, then the cache, then the Hub."""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import get_session, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ._moved import moved_names


__all__ = ["bounded_waits", "find_file", "has_file", "hub_errors", "is_hub_id", "remove_damaged"]

logger = logging.getLogger(__name__)

# Dropped connections and time-outs are errors of the HTTP client that huggingface_hub uses, and no OSErrors. Their
# base class is also the base of HfHubHTTPError, whichever client that is.
_HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

_FAILURES = (HfHubHTTPError, _HTTPError, EntryNotFoundError, HFValidationError)

_TRANSIENT = (408, 429, 500, 502, 503, 504)

RETRY_WAITS = (1.0, 3.0)  # seconds before the second and the third try, where huggingface_hub tries only once

REQUEST_SECONDS = 60.0  # how long a request that writes waits for a sign of life, where huggingface_hub has no limit

MAX_CHECKED_BYTES = 1 << 26  # larger files are compared with their hash when they arrive, not at each reading

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w\-.]{0,95}(/[A-Za-z0-9_][\w\-.]{0,95})?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, `name` or `owner/name`; a path with dots or a leading slash has not."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def _check_subfolder(subfolder: str | None) -> None:
    if subfolder is None:
        return
    parts = str(subfolder).replace("\\", "/").split("/")
    if str(subfolder).startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"`subfolder` must be a plain relative folder such as 'flowers', got {subfolder!r}.")


def find_file(name_or_path: str | os.PathLike, filename: str, subfolder: str | None = None, **kwargs: Any) -> str:
    """The local path of one file of an adapter or model. What comes from the Hub is compared with the Hub's hash.

    Args:
        name_or_path (`str` or `os.PathLike`): a folder on disk, else a Hub id.
        filename (`str`): the file's name.
        subfolder (`str`, *optional*): folder within `name_or_path`.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as in
            `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: the folder, or the repository, holds no such file.
        OSError: neither a folder nor a repository, or not reachable and not in the cache, or damaged on every
            way; says what to do.
    """
    _check_subfolder(subfolder)
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        path = os.path.join(name, subfolder or "", filename)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no {filename} in {os.path.dirname(path)!r}.")
        return path
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"{name!r} is neither a folder on this machine nor the form of a Hub id ('name' or 'owner/name')."
        )
    for wait in (*RETRY_WAITS, None):
        try:
            return _download(name, filename, subfolder, kwargs)
        except (*_FAILURES, ValueError) as error:
            if not isinstance(error, _FAILURES) and not isinstance(_server_error(error), _FAILURES):
                raise  # arguments that contradict each other, such as force_download with local_files_only
            if _is_transient(error):
                cached = _cached(name, filename, subfolder, kwargs)
                if cached is not None:
                    return cached
                # What fails before the download, huggingface_hub repeats by itself.
                if wait is not None and not isinstance(error, LocalEntryNotFoundError):
                    time.sleep(wait)
                    continue
            raise _explained(error, name, filename, kwargs.get("revision")) from error
    raise AssertionError("not reached")


def _download(name: str, filename: str, subfolder: str | None, kwargs: dict[str, Any]) -> str:
    """A file by the cache or the Hub, compared with the Hub's hash of it; fetched a second time if it is damaged."""
    was_cached = _cached(name, filename, subfolder, kwargs) is not None
    for _ in range(2):
        try:
            path = hf_hub_download(name, filename, subfolder=subfolder, library_name="coop_hf", **kwargs)
        except OSError as error:
            if type(error) is not OSError or "Consistency check failed" not in str(error):
                raise
            raise OSError(
                f"{filename} of {name!r} arrived with another length than the Hub says ({str(error).splitlines()[0]}) "
                "Nothing of it was kept. A network that asks for a login first, or a proxy, does so: try again, or on "
                "another network."
            ) from error
        is_large = os.path.getsize(path) > MAX_CHECKED_BYTES
        if (was_cached and is_large) or not _is_damaged(path):
            return path
        logger.warning("%s of %r has not the hash that the Hub gives for it and is fetched again.", filename, name)
        _remove(path)
        was_cached = False
    raise OSError(
        f"{filename} of {name!r} arrived damaged twice: its hash is not the one that the Hub gives. Nothing of it was "
        "kept. Something on the way changes it (a proxy, a faulty disk or memory): try again, or on another network."
    )


def _is_damaged(path: str) -> bool:
    """Whether a file in the cache is another one than the Hub says.

    The cache keeps a file under the name of the Hub's hash of it: SHA-256 of a large file, git's of a small one. Where
    there are no symbolic links the name is not kept, and nothing is found out.
    """
    blob = os.path.realpath(path)
    name = os.path.basename(blob)
    if not _HASH.fullmatch(name):
        return False
    digest = hashlib.sha256() if len(name) == 64 else hashlib.sha1(b"blob %d\0" % os.path.getsize(blob))
    with open(blob, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() != name


def _remove(path: str) -> None:
    """Removes a file of the cache, which is a link, and what it leads to."""
    for place in {os.path.realpath(path), path}:
        os.remove(place)


def remove_damaged(folder: str) -> list[str]:
    """Removes the damaged files of a folder in the cache, and gives their names; see `find_file`.

    For what others than `find_file` put there: transformers compares nothing with the Hub's hash.
    """
    damaged = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.path.getsize(path) <= MAX_CHECKED_BYTES and _is_damaged(path):
            damaged.append(name)
            _remove(path)
    return damaged


@contextmanager
def bounded_waits() -> Iterator[None]:
    """Within it, a request to the Hub that sets no limit waits `REQUEST_SECONDS` for an answer, not for ever."""
    session = get_session()
    before = session.timeout
    if any(limit is not None for limit in before.as_dict().values()):  # somebody has set limits
        yield
        return
    session.timeout = REQUEST_SECONDS
    try:
        yield
    finally:
        session.timeout = before


def _server_error(error: BaseException) -> BaseException:
    """What the server or the connection said, where `error` only says that nothing was found."""
    while not isinstance(error, (HfHubHTTPError, _HTTPError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: BaseException) -> bool:
    """Whether the server was reached and may answer a moment later. Having no connection shows at once and is not."""
    error = _server_error(error)
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _TRANSIENT
    return isinstance(error, _HTTPError) and type(error).__name__ not in ("ConnectError", "UnsupportedProtocol")


def _cached(name: str, filename: str, subfolder: str | None, kwargs: dict[str, Any]) -> str | None:
    found = None if kwargs.get("force_download") else _in_cache(name, filename, {**kwargs, "subfolder": subfolder})
    return found if isinstance(found, str) else None


def _in_cache(name: str, filename: str, kwargs: dict[str, Any]) -> Any:
    """The path of a file in the cache, the cache's sign for "known to be missing", or `None`."""
    path = f"{kwargs['subfolder']}/{filename}" if kwargs.get("subfolder") else filename
    return try_to_load_from_cache(name, path, cache_dir=kwargs.get("cache_dir"), revision=kwargs.get("revision"))


def _explained(error: BaseException, name: str, filename: str, revision: str | None) -> OSError:
    """An `OSError` that says what was looked for, what happened and what to do."""
    where = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    said = _server_error(error)
    if isinstance(said, RevisionNotFoundError):
        return OSError(f"the Hub repository {name!r} has no revision {revision!r}.")
    if isinstance(said, GatedRepoError):
        return OSError(
            f"access to {name!r} must be asked for on its page on the Hub; then pass `token=...` or run "
            "`hf auth login`."
        )
    if isinstance(said, (RepositoryNotFoundError, HFValidationError)):
        return OSError(
            f"{name!r} is not a folder on this machine, and there is no such repository on the Hub, or it is private "
            "and no token with access was given (`token=...` or `hf auth login`)."
        )
    if _status(said) == 401:
        return OSError(f"the Hub does not accept the token given for {where}: log in again with `hf auth login`.")
    if isinstance(said, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(f"there is no {filename} in the Hub repository {where}.")
    if _status(said) == 429:
        return OSError(
            f"{filename} of {where} is not in the cache, and the Hub answered that there were too many requests "
            "(429). Wait a few minutes and try again; with a token (`token=...`) the limit is higher."
        )
    if isinstance(said, FileMetadataError):
        return OSError(
            f"{filename} of {where} is not in the cache, and what answered is not the Hub: a network that asks for a "
            "login first, or a proxy, does so."
        )
    if _is_transient(error) or _status(said) is not None:
        hung_up = f"hung up ({str(said)[:200] or type(said).__name__})"
        reason = f"answered with the error {_status(said)}" if _status(said) else hung_up
        return OSError(f"{filename} of {where} is not in the cache, and the Hub {reason}. Try again later.")
    return OSError(
        f"{filename} of {where} is not in the cache, and the Hub could not be reached. {name!r} is not a folder on "
        "this machine either: check the spelling, or connect once so that it can be downloaded."
    )


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Within it, what `huggingface_hub` and its HTTP client raise becomes an `OSError` that says what to do."""
    try:
        yield
    except (HfHubHTTPError, _HTTPError) as error:
        raise _explained(error, name, "a file", None) from error


def has_file(name_or_path: str | os.PathLike, filename: str, **kwargs: Any) -> bool:
    """Whether `find_file` finds the file. Other failures, such as a missing repository, still raise.

    Without a connection the cache answers: a file is missing in a repository that is there otherwise if the cache
    remembers so, or holds the repository's `config.json` without it.
    """
    try:
        find_file(name_or_path, filename, **kwargs)
    except FileNotFoundError:
        return False
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError) and _is_missing_in_cache(
            os.fspath(name_or_path), filename, kwargs
        ):
            return False
        raise
    return True


def _is_missing_in_cache(name: str, filename: str, kwargs: dict[str, Any]) -> bool:
    known = _in_cache(name, filename, kwargs)
    if known is not None:
        return not isinstance(known, str)
    return isinstance(_in_cache(name, "config.json", {**kwargs, "subfolder": None}), str)


__getattr__ = moved_names(__name__)

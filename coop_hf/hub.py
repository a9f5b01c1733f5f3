"""Where files come from, a local folder first, then the cache, then the Hub; and how an adapter gets there."""

import os
import re
import time
from contextlib import contextmanager

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


__all__ = ["find_file", "has_file", "hub_errors", "is_hub_id"]

# Dropped connections and time-outs are errors of the HTTP client that huggingface_hub uses, and no OSErrors. Their
# base class is also the base of HfHubHTTPError, whichever client that is.
_HTTPError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

_TRANSIENT = (408, 429, 500, 502, 503, 504)

RETRY_WAITS = (1.0, 3.0)  # seconds before the second and the third try, where huggingface_hub tries only once

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


def find_file(name_or_path: str | os.PathLike, filename: str, subfolder: str | None = None, **kwargs) -> str:
    """The local path of one file of an adapter or model.

    Args:
        name_or_path (`str` or `os.PathLike`): a folder on disk, else a Hub id.
        filename (`str`): the file's name.
        subfolder (`str`, *optional*): folder within `name_or_path`.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as in
            `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: the folder, or the repository, holds no such file.
        OSError: neither a folder nor a repository, or not reachable and not in the cache; says what to do.
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
    revision = kwargs.get("revision")
    for wait in (*RETRY_WAITS, None):
        try:
            return hf_hub_download(name, filename, subfolder=subfolder, library_name="coop_hf", **kwargs)
        except (HfHubHTTPError, _HTTPError, EntryNotFoundError, HFValidationError, ValueError) as error:
            cached = _cached(name, filename, subfolder, kwargs) if _is_transient(error) else None
            if cached is not None:
                return cached
            if isinstance(error, ValueError) and not isinstance(
                _server_error(error), (HfHubHTTPError, _HTTPError, EntryNotFoundError, HFValidationError)
            ):
                raise  # arguments that contradict each other, such as force_download with local_files_only
            # huggingface_hub itself repeats what fails before the download, and after "too many requests".
            tried_once = not isinstance(error, LocalEntryNotFoundError) and _status(_server_error(error)) != 429
            if wait is None or not tried_once or not _is_transient(error):
                raise _explained(error, name, filename, revision) from error
            time.sleep(wait)


def _server_error(error: BaseException):
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


def _cached(name: str, filename: str, subfolder: str | None, kwargs: dict) -> str | None:
    if kwargs.get("force_download"):
        return None
    path = f"{subfolder}/{filename}" if subfolder else filename
    found = try_to_load_from_cache(name, path, cache_dir=kwargs.get("cache_dir"), revision=kwargs.get("revision"))
    return found if isinstance(found, str) else None


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
            f"{name!r} is no folder on this machine, and there is no such repository on the Hub, or it is private and "
            "no token with access was given (`token=...` or `hf auth login`)."
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
    if _is_transient(error) or _status(said) is not None:
        hung_up = f"hung up ({str(said)[:200] or type(said).__name__})"
        reason = f"answered with the error {_status(said)}" if _status(said) else hung_up
        return OSError(f"{filename} of {where} is not in the cache, and the Hub {reason}. Try again later.")
    return OSError(
        f"{filename} of {where} is not in the cache, and the Hub could not be reached. {name!r} is no folder on "
        "this machine either: check the spelling, or connect once so that it can be downloaded."
    )


@contextmanager
def hub_errors(name: str):
    """Within it, what `huggingface_hub` and its HTTP client raise becomes an `OSError` that says what to do."""
    try:
        yield
    except (HfHubHTTPError, _HTTPError) as error:
        raise _explained(error, name, "a file", None) from error


def has_file(name_or_path: str | os.PathLike, filename: str, **kwargs) -> bool:
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


def _is_missing_in_cache(name: str, filename: str, kwargs: dict) -> bool:
    where = {"cache_dir": kwargs.get("cache_dir"), "revision": kwargs.get("revision")}
    path = f"{kwargs['subfolder']}/{filename}" if kwargs.get("subfolder") else filename
    known = try_to_load_from_cache(name, path, **where)
    if known is not None:
        return not isinstance(known, str)  # the cache's sign for "known to be missing"
    return isinstance(try_to_load_from_cache(name, "config.json", **where), str)

"""Writing whole files: a file appears complete or not at all, and files that belong together appear together."""

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


__all__ = ["leftovers", "locked", "save_tensors", "write_atomically", "write_text", "write_together"]

# Temporary files of this age belong to a process that was killed: no file here takes an hour to write.
LEFTOVER_SECONDS = 3600

LOCK_SECONDS = 10.0


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[str]:
    """Yields a temporary path beside `path`, which takes its place, whole, when the block ends without an error."""
    with write_together(path) as (temporary,):
        yield temporary


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, which appears whole or not at all; line ends stay as they are."""
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)


@contextmanager
def write_together(*paths: str | os.PathLike) -> Iterator[list[str]]:
    """Yields temporary paths beside `paths`, all in one folder.

    When the block ends without an error, all are on the disk, and one directly after another takes its place. Other
    writers of the folder wait meanwhile, so two of them never mix their files. Temporary files that a killed process
    left beside `paths` are removed.

    Raises:
        OSError: a full disk, or no right to write; then no file has changed.
    """
    folder = os.path.dirname(os.path.abspath(paths[0]))
    names = [os.path.basename(path) for path in paths]
    temporaries: list[str] = []
    try:
        for name in names:
            _sweep(os.path.join(folder, name))
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            os.close(handle)
            temporaries.append(temporary)
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        with locked(folder):
            for temporary, path in zip(temporaries, paths):
                os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries:
            if os.path.exists(temporary):
                os.remove(temporary)
        raise


@contextmanager
def locked(folder: str, shared: bool = False) -> Iterator[None]:
    """Keeps other processes and threads from changing the files of a folder together, where its file system can.

    Args:
        folder (`str`): the folder; nothing is written into it.
        shared (`bool`, *optional*, defaults to `False`): for readers: any number of them at a time, and no writer.
    """
    handle = None
    if fcntl is not None:
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            pass  # may be entered but not listed
    try:
        if handle is not None:
            _lock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_UN)  # not by closing alone: a process forked meanwhile has it open too
            except OSError:
                pass
            os.close(handle)


def _lock(handle: int, kind: int) -> None:
    """Waits for the lock, but not for ever: a process that hangs while it holds it must not stop all others."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        except OSError:
            return  # some network file systems have no locks


def leftovers(path: str | os.PathLike) -> list[str]:
    """The temporary files beside `path`: of writers at work, and of those that were killed."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = re.compile(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}")
    try:
        entries = sorted(os.listdir(folder))
    except OSError:  # a folder that may be entered but not listed
        return []
    return [os.path.join(folder, entry) for entry in entries if temporary.fullmatch(entry)]


def _sweep(path: str) -> None:
    """Removes the temporary files of `path` that a killed process left."""
    for leftover in leftovers(path):
        with suppress(OSError):  # another process was faster
            if time.time() - os.path.getmtime(leftover) > LEFTOVER_SECONDS:
                os.remove(leftover)


def save_tensors(tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict | None = None) -> None:
    """`safetensors.torch.save_file`, which tells a full disk by an error that is not an `OSError`; here it is one."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{os.fspath(path)} could not be written: {error}") from error
    if len(metadata or ()) > 1:
        _sort_header(path)


def _sort_header(path: str | os.PathLike) -> None:
    """safetensors writes metadata in an order of chance; the same content shall be the same bytes."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)

"""Writing whole files: a file appears complete or not at all."""

import os
import tempfile
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


__all__ = ["save_tensors", "write_atomically"]


@contextmanager
def write_atomically(path: str | os.PathLike):
    """Yields a temporary path beside `path`, which takes its place, whole, when the block ends without an error."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def save_tensors(tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict | None = None) -> None:
    """`safetensors.torch.save_file`, which tells a full disk by an error that is no `OSError`; here it is one."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{os.fspath(path)} could not be written: {error}") from error

"""Files to adapters and back: `adapter_config.json` and `adapter_model.safetensors`, nothing else, nothing pickled."""

import os

import torch
from safetensors import SafetensorError, safe_open

from ..atomic import save_tensors, write_atomically
from ..config import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CoOpConfig
from ..hub import find_file


__all__ = ["WEIGHTS_KEY", "read_adapter", "write_adapter"]

WEIGHTS_KEY = "prompt_embeddings"

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}

_MAX_HEADER_BYTES = 1 << 16  # one tensor and a line of metadata


def write_adapter(save_directory: str | os.PathLike, config, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one adapter into a folder, which is made if missing. Each file appears whole or not at all.

    Args:
        save_directory (`str` or `os.PathLike`): the folder.
        config (`CoOpConfig`): its configuration.
        context (`torch.Tensor`): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`, any dtype and device; stored as fp32
            under the key `prompt_embeddings`.

    Raises:
        ValueError: the context holds NaN or infinity.
    """
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ValueError("the context holds NaN or infinite values and is not saved: training has diverged.")
    os.makedirs(save_directory, exist_ok=True)
    with write_atomically(os.path.join(save_directory, ADAPTER_WEIGHTS_NAME)) as path:
        save_tensors(tensors, path, metadata={"format": "pt"})
    with write_atomically(os.path.join(save_directory, ADAPTER_CONFIG_NAME)) as path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(config.to_json())


def read_adapter(name_or_path: str | os.PathLike, **kwargs) -> tuple[CoOpConfig, dict[str, torch.Tensor]]:
    """Reads one adapter from a local folder, the cache or the Hub.

    The file may come from a stranger: header, key, dtype, shape and size are checked before any value is read.

    Args:
        name_or_path (`str` or `os.PathLike`): folder or Hub id.
        kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        its `CoOpConfig` and its context, fp32, on the CPU.

    Raises:
        ValueError: the files contradict each other or the format; says how.
    """
    config = CoOpConfig.from_json_file(find_file(name_or_path, ADAPTER_CONFIG_NAME, **kwargs))
    if config.n_ctx is None:
        raise ValueError(f"the {ADAPTER_CONFIG_NAME} of {os.fspath(name_or_path)!r} does not say `n_ctx`.")
    if config.class_specific and config.class_names is None:
        raise ValueError(
            f"the {ADAPTER_CONFIG_NAME} of {os.fspath(name_or_path)!r} is class-specific but names no classes."
        )
    return config, {WEIGHTS_KEY: _read_context(find_file(name_or_path, ADAPTER_WEIGHTS_NAME, **kwargs), config)}


def _read_context(path: str, config: CoOpConfig) -> torch.Tensor:
    problem = f"{path} is not a usable adapter: "
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if size < 8 or header_size > min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(
            problem + f"it has {size:,} bytes and announces a header of {header_size:,}; the file is cut off, or no "
            "safetensors file."
        )
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if keys != [WEIGHTS_KEY]:
                raise ValueError(problem + f"it holds {keys[:5]}, expected the one tensor {WEIGHTS_KEY!r}.")
            entry = file.get_slice(WEIGHTS_KEY)
            dtype, shape = entry.get_dtype(), entry.get_shape()
            expected = [config.n_ctx]
            if config.class_specific:
                expected = [len(config.class_names), config.n_ctx]
            if len(shape) != len(expected) + 1 or shape[:-1] != expected or shape[-1] < 1:
                raise ValueError(
                    problem + f"its context has the shape {tuple(shape)}, and its configuration asks for "
                    f"({', '.join(map(str, expected))}, dim)."
                )
            if dtype not in _DTYPES:
                raise ValueError(problem + f"its context has the dtype {dtype}, expected F32, F16 or BF16.")
            context = file.get_tensor(WEIGHTS_KEY).float()
    except SafetensorError as error:
        raise ValueError(problem + f"{str(error)[:200]}.") from None
    if not torch.isfinite(context).all():
        raise ValueError(problem + "its context holds NaN or infinite values; the training that made it diverged.")
    return context

"""Files to adapters and back: `adapter_config.json` and `adapter_model.safetensors`, nothing else, nothing pickled.

The weights hold the hash of the configuration that they were saved with, so that vectors of one save are never read
with the class names of another. Adapters of before it was written have none, and load as they did.
"""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..atomic import leftovers, locked, save_tensors, write_together
from ..checks import check_not_sparse, is_finite, some
from ..config import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CoOpConfig, PromptConfig, read_json
from ..hub import find_file, is_hub_id


__all__ = ["WEIGHTS_KEY", "base_of", "bind_adapter", "check_adapter", "read_adapter", "write_adapter"]

WEIGHTS_KEY = "prompt_embeddings"

Shapes = Mapping[str, Sequence[int | None]]

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}

# Bounds on a stranger's file, far above any real adapter: ImageNet-21k, class-specific, 16 vectors of 768 numbers.
_MAX_HEADER_BYTES = 1 << 16

MAX_VALUES = 1 << 28

MAX_DIM = 1 << 14

_COMMIT = re.compile(r"[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]")

# The keys that may be changed by hand: where the base is found says nothing of what was learned for it.
_FREE_KEYS = ("base_model_name_or_path", "revision", "coop_hf_version")


def write_adapter(
    save_directory: str | os.PathLike, config: PromptConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes one adapter into a folder, which is made if missing. Both files change together or not at all.

    Args:
        save_directory (`str` or `os.PathLike`): the folder.
        config (`PromptConfig`): its configuration.
        tensors (`dict[str, torch.Tensor]`): what was learned, of any dtype and device, under the keys of the file;
            stored as fp32. CoOp's is `prompt_embeddings`, `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`.

    Raises:
        ValueError: a tensor holds NaN or infinity; nothing is written.
        OSError: the disk is full, or the folder cannot be written to; the adapter that was there stays.
    """
    stored = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}
    for key, value in stored.items():
        if not is_finite(value):
            raise ValueError(f"{key!r} holds NaN or infinite values and is not saved: training has diverged.")
    text = config.to_json()
    metadata = {"format": "pt", **_binding(json.loads(text))}
    os.makedirs(save_directory, exist_ok=True)
    weights_path = os.path.join(save_directory, ADAPTER_WEIGHTS_NAME)
    with write_together(weights_path, os.path.join(save_directory, ADAPTER_CONFIG_NAME)) as (weights, configuration):
        save_tensors(stored, weights, metadata)
        with open(configuration, "w", encoding="utf-8") as file:
            file.write(text)


def read_adapter(
    name_or_path: str | os.PathLike,
    expected: Shapes | None = None,
    *,
    config: PromptConfig | None = None,
    **kwargs: Any,
) -> tuple[PromptConfig, dict[str, torch.Tensor]]:
    """Reads one adapter from a local folder, the cache or the Hub.

    The files may come from a stranger: header, keys, dtypes, shapes and sizes are checked before any value is read.

    Args:
        name_or_path (`str` or `os.PathLike`): folder or Hub id.
        expected (`dict[str, tuple[int | None, ...]]`, *optional*): the shapes of all tensors; `None` in a shape fits
            any length. For CoOp the configuration says it.
        config (`PromptConfig`, *optional*): what [`check_adapter`] gave a moment ago.
        kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        its configuration and its tensors by key, fp32, on the CPU.

    Raises:
        ValueError: the files contradict each other or the format, or another adapter was saved there since `config`
            was read; says how.
    """
    found, tensors = _read(name_or_path, expected, kwargs)
    if config is not None and found != config:
        raise ValueError(
            f"another adapter was saved to {os.fspath(name_or_path)!r} while this one was being loaded: load it again."
        )
    return found, tensors


def check_adapter(name_or_path: str | os.PathLike, expected: Shapes | None = None, **kwargs: Any) -> PromptConfig:
    """The configuration of an adapter, once the header of its weights is checked as by [`read_adapter`].

    No value is read: what a damaged or hostile adapter is refused for shows before its base model is loaded.
    """
    return _read(name_or_path, expected, kwargs, with_values=False)[0]


def bind_adapter(folder: str | os.PathLike) -> None:
    """Declares that the two files of an adapter go together, after its configuration was changed by hand.

    Args:
        folder (`str` or `os.PathLike`): a local folder.
    """
    write_adapter(folder, *_read(folder, None, {}, is_bound=False))


def base_of(config: PromptConfig, name_or_path: str | os.PathLike) -> str:
    """The base model that an adapter names, where it may be followed.

    An adapter from the Hub may name a base on the Hub alone: it never chooses among the folders of this machine.

    Args:
        config (`PromptConfig`): the adapter's configuration.
        name_or_path (`str` or `os.PathLike`): what the adapter was read from.

    Raises:
        ValueError: it names none, or a local path, or a folder of that name is here; pass `base_model=`.
    """
    name, base = os.fspath(name_or_path), config.base_model_name_or_path
    if base is None:
        raise ValueError(f"the adapter {name!r} does not name its base model: pass `base_model=`.")
    if os.path.isdir(name):
        return base
    if not is_hub_id(base):
        raise ValueError(
            f"the adapter {name!r} from the Hub names a local path as its base model ({base!r}); such a path is not "
            "followed. Pass `base_model=` to say which base you mean."
        )
    if os.path.exists(base):
        raise ValueError(
            f"the adapter {name!r} from the Hub names the base model {base!r}, and {os.path.abspath(base)!r} is on "
            "this machine: pass `base_model=` with the absolute path to take that, or work in another folder to take "
            "the one on the Hub."
        )
    return base


def _read(
    name_or_path: str | os.PathLike,
    expected: Shapes | None,
    kwargs: dict[str, Any],
    with_values: bool = True,
    is_bound: bool = True,
) -> tuple[PromptConfig, dict[str, torch.Tensor]]:
    name = os.fspath(name_or_path)
    config_path = find_file(name, ADAPTER_CONFIG_NAME, **kwargs)
    commit = None if os.path.isdir(name) else _COMMIT.search(config_path)
    if commit:  # both files of one commit, whatever is pushed meanwhile
        kwargs = {**kwargs, "revision": commit[1]}
    # On this machine nobody changes one of the two files between their readings.
    with nullcontext() if commit else locked(os.path.dirname(config_path), shared=True):
        path = find_file(name, ADAPTER_WEIGHTS_NAME, **kwargs)

        def read(config_path: str) -> tuple[PromptConfig, dict[str, torch.Tensor], bool]:
            values = read_json(config_path)
            config = PromptConfig.from_dict(values)
            metadata, tensors = _read_weights(path, _shapes(config, name), expected, with_values)
            return config, tensors, is_bound and _check_binding(values, metadata, name)

        try:
            return read(config_path)[:2]
        except ValueError:
            # A save that was killed between its two renames left the new configuration under its temporary name.
            for leftover in [] if commit else leftovers(config_path):
                with suppress(ValueError, OSError):
                    config, tensors, belongs = read(leftover)
                    if belongs:
                        return config, tensors
            raise


def _shapes(config: PromptConfig, name: str) -> Shapes | None:
    """The shapes that the configuration alone says: CoOp's."""
    if not isinstance(config, CoOpConfig):
        return None
    if config.n_ctx is None:
        raise ValueError(f"the {ADAPTER_CONFIG_NAME} of {name!r} does not say `n_ctx`.")
    if config.class_specific and config.class_names is None:
        raise ValueError(f"the {ADAPTER_CONFIG_NAME} of {name!r} is class-specific but names no classes.")
    if config.method != "coop":
        return None
    classes = (len(config.class_names),) if config.class_specific and config.class_names else ()
    return {WEIGHTS_KEY: (*classes, config.n_ctx, None)}


def _read_weights(
    path: str, shapes: Shapes | None, expected: Shapes | None, with_values: bool
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    problem = f"{path} is not a usable adapter: "
    size = os.path.getsize(path)
    with open(path, "rb") as raw:
        header_size = int.from_bytes(raw.read(8), "little")
    if size < 8 or header_size > min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(
            problem + f"it has {size:,} bytes and announces a header of {header_size:,}; the file is cut off, "
            "or no safetensors file."
        )
    tensors, opened = {}, _identity(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}
            sizes = {key: tuple(entry.get_shape()) for key, entry in found.items()}
            if shapes is not None:
                _check_shapes(problem, sizes, shapes, "its configuration asks for")
            if expected is not None:
                _check_shapes(problem, sizes, expected, "the model expects")
            for key, entry in found.items():
                if entry.get_dtype() not in _DTYPES:
                    raise ValueError(
                        problem + f"{key[:80]!r} has the dtype {entry.get_dtype()}, expected F32, F16 or BF16."
                    )
            count = sum(math.prod(shape) for shape in sizes.values())
            if count > MAX_VALUES:
                raise ValueError(problem + f"it claims {count:,} values; an adapter has at most {MAX_VALUES:,}.")
            check_not_sparse(path, problem)
            for key in found if with_values else ():
                tensors[key] = file.get_tensor(key).float()
                if not is_finite(tensors[key]):
                    raise ValueError(
                        problem + f"{key[:80]!r} holds NaN or infinite values; the training that made it diverged."
                    )
            metadata = file.metadata() or {}
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(problem + f"{str(error)[:200]}.") from None
    if _identity(path) != opened:
        # safetensors opens a file twice, for header and values, and where there are no locks they may be two files.
        raise ValueError(f"{path} was replaced while it was being read: load the adapter again.")
    return metadata, tensors


def _identity(path: str) -> tuple[int, ...]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _check_shapes(problem: str, found: Mapping[str, tuple[int, ...]], shapes: Shapes, who: str) -> None:
    if set(found) != set(shapes):
        keys = sorted(key[:80] for key in found)
        wanted = (
            f"the one tensor {next(iter(shapes))!r}" if len(shapes) == 1 else f"the tensors {some(sorted(shapes))}"
        )
        raise ValueError(problem + f"it holds {keys[:5]}, expected {wanted}.")
    for key, shape in shapes.items():
        fits = len(found[key]) == len(shape) and all(
            1 <= have <= MAX_DIM if want is None else have == want for have, want in zip(found[key], shape)
        )
        if not fits:
            wanted = ", ".join("dim" if length is None else str(length) for length in shape)
            raise ValueError(
                problem + f"{key!r} has the shape {found[key]}, and {who} ({wanted}{',' * (len(shape) == 1)})."
            )


def _binding(values: dict[str, Any]) -> dict[str, str]:
    """What the weights remember of their configuration."""
    learned = {key: value for key, value in values.items() if key not in _FREE_KEYS}
    base = [values.get("base_model_name_or_path"), values.get("revision")]
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
        for name, part in (("config_sha256", learned), ("base_sha256", base))
    }


def _check_binding(values: dict[str, Any], metadata: dict[str, str], name: str) -> bool:
    """Whether the weights are known to be of this configuration; raises if they are known to be of another."""
    if "config_sha256" not in metadata:  # of before 0.3, or written by another program
        return False
    binding = _binding(values)
    if binding["config_sha256"] != metadata["config_sha256"]:
        raise ValueError(
            f"the two files of the adapter {name!r} are not of one save: {ADAPTER_WEIGHTS_NAME} was saved with another"
            f" {ADAPTER_CONFIG_NAME}. Save, copy or download the adapter again; if you changed the configuration by "
            "hand and mean it, call `coop_hf.files.adapter_files.bind_adapter(folder)`."
        )
    if binding["base_sha256"] != metadata.get("base_sha256"):
        warnings.warn(
            f"the adapter {name!r} names another base model than when it was saved "
            f"({values.get('base_model_name_or_path')!r} now). On other weights its scores mean little.",
            stacklevel=5,
        )
    return True

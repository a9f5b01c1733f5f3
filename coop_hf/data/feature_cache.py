"""Image embeddings computed once: the image tower is frozen, so an image's view always gives the same vector.

The cache is a folder for each tower (weights, preprocessing, precision), holding safetensors files of identities,
embeddings and a checksum of each. An identity is a hash of the image's content and of the view, so another run,
another seed, another set of shots or another method finds what is there, whatever data set the image came with.

Embeddings are written in pieces as they are computed. A large set is put together into one file, in its own order,
which is mapped into memory and not read: a million embeddings open at once, and take what the disk cache can spare.
"""

import hashlib
import json
import logging
import math
import multiprocessing
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..atomic import save_tensors, write_atomically
from ..checks import is_finite
from .few_shot import check_labels
from .labelled_images import LabelledImages
from .transforms import Pixels


__all__ = ["EmbeddedImages", "FeatureCache", "default_cache_dir", "embed_images"]

logger = logging.getLogger(__name__)

_ID_BYTES = 16

_FILE_ROWS = 4096  # embeddings in one piece: at most so many are lost when a run is interrupted

_MAPPED_BYTES = 1 << 26  # sets from this size on get a file of their own; smaller ones are read into memory

_SAMPLED_ROWS = 256  # of a mapped file: checksums of all rows would read all of it

_IMAGES_FOR_WORKERS = 256  # fewer are decoded before as many processes have started

_CPU_BATCH = 16  # of a tower on a CPU, whose caches hold what so many images need: 64 take a quarter longer (B/32)

MAX_WORKERS = 16


def default_cache_dir() -> str:
    """`COOP_HF_CACHE` if it is set, else `coop_hf` in the Hugging Face home."""
    return os.environ.get("COOP_HF_CACHE") or os.path.join(HF_HOME, "coop_hf")


def _checksums(ids: np.ndarray, features: torch.Tensor) -> np.ndarray:
    """One for each row, `(rows,)` int32."""
    rows = zip(np.ascontiguousarray(ids), features.numpy())
    return np.fromiter((zlib.crc32(row, zlib.crc32(key)) for key, row in rows), np.uint32, len(ids)).view(np.int32)


def _as_array(ids: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(ids), np.uint8).reshape(-1, _ID_BYTES)


class _File:
    """One file of the cache, mapped into memory: `ids`, `features` and `checksums` of its rows.

    Raises:
        OSError, ValueError: it went away, or is not such a file.
    """

    def __init__(self, path: str, dim: int):
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.ids = file.get_tensor("ids").numpy()
                self.features, self.checksums = file.get_tensor("features"), file.get_tensor("checksums").numpy()
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        rows = len(self.ids)
        shapes = (self.ids.shape, tuple(self.features.shape), self.checksums.shape)
        kinds = (self.ids.dtype, self.features.dtype, self.checksums.dtype)
        if shapes != ((rows, _ID_BYTES), (rows, dim), (rows,)) or kinds != (np.uint8, torch.float32, np.int32):
            raise ValueError("shapes do not fit")

    def read(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """A copy of rows `(len(rows), dim)`.

        Raises:
            ValueError: one is damaged.
        """
        features = self.features[torch.as_tensor(rows)]
        if not np.array_equal(_checksums(self.ids[rows], features), self.checksums[rows]):
            raise ValueError("checksum does not fit")
        return features

    def check(self) -> "_File":
        """Looks at rows from the first to the last one."""
        self.read(np.unique(np.linspace(0, len(self.ids) - 1, _SAMPLED_ROWS).astype(np.int64)))
        return self


def _open(path: str, dim: int) -> _File | None:
    """A file of the cache, if there is one; a damaged one is removed."""
    try:
        return _File(path, dim).check()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        _remove_damaged(path, error)
    return None


def _remove_damaged(path: str, error: Exception) -> None:
    logger.warning("The feature cache file %s is damaged (%s); it is removed and computed again.", path, error)
    with suppress(OSError):
        os.remove(path)


class FeatureCache:
    """The cached embeddings of one image tower, in one folder.

    Args:
        folder (`str`): where its files lie; made at the first write.
        dim (`int`): dimensions of an embedding.
        wanted (`Sequence[bytes]`): identities that are asked for; others that lie there are passed over.
    """

    def __init__(self, folder: str, dim: int, wanted: Sequence[bytes]):
        self.folder, self.dim = folder, dim
        self._where: dict[bytes, tuple[_File, int]] = {}
        self._unwritten: dict[bytes, torch.Tensor] = {}  # what the disk did not take, for this run alone
        self._wanted = set(wanted)
        heads = np.frombuffer(b"".join(identity[:8] for identity in self._wanted), np.uint64)
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if name.endswith(".safetensors") and not name.startswith("."):
                file = _open(os.path.join(folder, name), dim)
                if file is not None:
                    # By their first half for all rows at once, then those few that are wanted in full.
                    own = np.ascontiguousarray(file.ids).view(np.uint64)[:, 0]
                    self._take(file, np.flatnonzero(np.isin(own, heads)))

    def _take(self, file: _File, rows: np.ndarray) -> None:
        for row in rows.tolist():
            identity = file.ids[row].tobytes()
            if identity in self._wanted:
                self._where[identity] = (file, row)

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._where or identity in self._unwritten

    def add(self, ids: list[bytes], features: torch.Tensor) -> None:
        """Writes embeddings `(len(ids), dim)` as one more file, which appears whole or not at all.

        Where the disk is full or read-only they are kept in memory, with a warning: a cache only saves time.
        """
        features, id_array = features.detach().to("cpu", torch.float32).contiguous(), _as_array(ids)
        path = os.path.join(self.folder, f"{uuid.uuid4().hex}.safetensors")
        tensors = {"ids": torch.from_numpy(id_array.copy()), "features": features}
        tensors["checksums"] = torch.from_numpy(_checksums(id_array, features))
        try:
            os.makedirs(self.folder, exist_ok=True)
            with write_atomically(path) as temporary:
                save_tensors(tensors, temporary)
            file = _File(path, self.dim)
        except OSError as error:
            if not self._unwritten:
                self._warn(error)
            self._unwritten.update(zip(ids, features))
        else:
            self._where.update({identity: (file, row) for row, identity in enumerate(ids)})

    def _warn(self, error: OSError) -> None:
        logger.warning(
            "Image embeddings cannot be kept in %s (%s): the next run computes them again. Free space, or "
            "name another folder (`feature_cache_dir`, or COOP_HF_CACHE in the environment).",
            self.folder,
            error,
        )

    def get(self, ids: list[bytes]) -> tuple[torch.Tensor, list[int]]:
        """The embeddings of these identities, `(len(ids), dim)` fp32, and the places of those that are damaged."""
        result, lost = torch.empty(len(ids), self.dim), []
        by_file: dict[_File, list[tuple[int, int]]] = {}
        for place, identity in enumerate(ids):
            if identity in self._unwritten:
                result[place] = self._unwritten[identity]
                continue
            file, row = self._where[identity]
            by_file.setdefault(file, []).append((place, row))
        for file, pairs in by_file.items():
            places, rows = map(list, zip(*pairs))
            try:
                result[places] = file.read(rows)
            except ValueError as error:
                _remove_damaged(file.path, error)
                lost += places
        return result, lost

    def in_order(self, ids: list[bytes]) -> torch.Tensor | None:
        """The embeddings of these identities, mapped, if they stand in one file one behind another."""
        if ids[0] not in self._where:
            return None
        file, start = self._where[ids[0]]
        if any(self._where.get(identity) != (file, start + row) for row, identity in enumerate(ids)):
            return None
        return file.features[start : start + len(ids)]

    def put_together(self, path: str, ids: list[bytes]) -> torch.Tensor | None:
        """Writes one file of these identities, in their order, instead of the pieces that hold nothing else.

        Returns:
            `torch.Tensor` `(len(ids), dim)`, mapped from the file; `None` if the disk is full or a piece is damaged.
        """
        pieces = Counter(file for file, _ in self._where.values())
        try:
            with write_atomically(path) as temporary, open(temporary, "wb") as out:
                checksums = []
                out.write(_header(len(ids), self.dim))
                for start in range(0, len(ids), _FILE_ROWS):
                    some = ids[start : start + _FILE_ROWS]
                    features, lost = self.get(some)
                    if lost:
                        raise ValueError("damaged")  # and told so by `get`
                    out.write(features.numpy().data)
                    checksums.append(_checksums(_as_array(some), features))
                out.write(np.concatenate(checksums).data)
                out.write(b"".join(ids))
                out.flush()
            features = _File(path, self.dim).features
        except ValueError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        for piece, rows in pieces.items():
            if rows == len(piece.ids):
                with suppress(OSError):
                    os.remove(piece.path)
        return features


def _header(rows: int, dim: int) -> bytes:
    """The beginning of a safetensors file; `save_file` would want all of its tensors in memory."""
    header, end = {}, 0
    for name, kind, shape, size in (
        ("features", "F32", [rows, dim], 4 * dim),
        ("checksums", "I32", [rows], 4),
        ("ids", "U8", [rows, _ID_BYTES], _ID_BYTES),
    ):
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + rows * size]}
        end += rows * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tower_key(model: Any, images: Any) -> str:
    """Identity of what turns an image into an embedding: image tower, projection, preprocessing and precision."""

    def digest_of(tensor: torch.Tensor) -> bytes:
        tensor = tensor.detach().contiguous().cpu()
        return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).digest()

    digest = hashlib.blake2b(digest_size=16)
    base = model.get_base_model()
    tensors = [item for module in model.family.vision_modules for item in sorted(module.state_dict().items())]
    with ThreadPoolExecutor(_cores()) as pool:  # hashing does not hold the interpreter's lock
        for (name, tensor), hashed in zip(tensors, pool.map(digest_of, (tensor for _, tensor in tensors))):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + hashed)
    device = model.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    lora = sorted(getattr(base, "peft_config", {}).items())  # its scale stands in no weight
    digest.update(f"{base.config.vision_config.to_json_string()} {lora} {precision} v3".encode())
    digest.update(images.preprocessing_key().encode())
    return digest.hexdigest()


def _cores() -> int:
    """Processors that this process may use, at most `MAX_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def _workers(num_images: int, num_processes: int) -> int:
    """Processes that decode where the caller has not said how many.

    None where processes are not forked: there a program's main module would be imported again in each of them, which
    one that has no `if __name__ == "__main__"` does not survive.
    """
    is_forked = multiprocessing.get_start_method() == "fork"
    return max(1, _cores() // num_processes) if is_forked and num_images >= _IMAGES_FOR_WORKERS else 0


class _Views(Dataset):
    """The pixels of a list of (view, item) pairs; decoded in the workers of a DataLoader."""

    def __init__(self, images: Any, pairs: list[tuple[int | None, int]]):
        self.images, self.pairs = images, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pixels:
        view, item = self.pairs[index]
        return self.images.view(item, view)


def embed_images(
    model: Any,
    images: Any,
    num_views: int | None = None,
    cache_dir: str | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], object] = lambda: None,
    progress: bool = True,
) -> torch.Tensor:
    """Image embeddings of a data set, from the cache as far as they are there.

    Args:
        model (`CoOpModel`): its image tower is used, on its device, under the autocast that is in force.
        images (`LabelledImages`, or what it takes): the images; with whole numbers as labels, of the model's classes.
        num_views (`int`, *optional*): augmented views 0 ... num_views - 1 of each image, the same pixels that
            epochs 0 ... num_views - 1 of a training without cache see. `None`: the plain view alone.
        cache_dir (`str`, *optional*, defaults to `default_cache_dir()`): where caches lie.
        batch_size (`int`, *optional*, defaults to 64): images a step; on a CPU at most 16, which is faster there.
        num_workers (`int`, *optional*): processes that decode while the tower computes. Defaults to the number of
            processors, at most 16; to 0 for fewer than 256 images, and on macOS and Windows, which do not fork.
        process_index, num_processes, barrier: with several processes, each computes its share and waits for the rest.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `torch.Tensor` `(num_views or 1, len(images), projection_dim)`, projected, not normalised, fp32, on the CPU.
        From 64 MiB on it is mapped from a file of the cache: what is not looked at takes no memory.

    Raises:
        ValueError: the active adapter's prompts change the image tower, or that gives NaN or infinite values.
    """
    adapter = getattr(model, "adapter", None)
    if adapter is not None and adapter.prompts_image_tower and not model.is_disabled:
        raise ValueError(
            f"the prompts of the method {adapter.method!r} change the image tower, so image embeddings cannot "
            "be kept: pass the images themselves, or call this within `model.disable_adapter()` for the base's own."
        )
    if not isinstance(images, LabelledImages):
        images = LabelledImages(images, model.image_processor, class_names=model.class_names)
    views = [None] if num_views is None else list(range(num_views))
    folder = os.path.join(cache_dir or default_cache_dir(), "features", _tower_key(model, images))
    dim = model.family.projection_dim
    shape = (len(views), len(images), dim)
    path = None
    if 4 * math.prod(shape) >= _MAPPED_BYTES:
        path = os.path.join(folder, f"set-{images.set_key(num_views)}.safetensors")
        whole = _open(path, dim)
        if whole is not None and len(whole.ids) == len(views) * len(images):
            return whole.features.view(shape)
    contents = images.content_keys()
    pairs = [(view, item) for view in views for item in range(len(images))]
    ids = [
        hashlib.blake2b(contents[item] + images.view_key(item, view).encode(), digest_size=_ID_BYTES).digest()
        for view, item in pairs
    ]
    cache = FeatureCache(folder, dim, ids)
    missing = {identity: pair for identity, pair in zip(ids, pairs) if identity not in cache}
    mine = list(missing.items())[process_index::num_processes]
    num_workers = _workers(len(mine), num_processes) if num_workers is None else num_workers
    _compute(model, images, mine, cache, batch_size, num_workers, progress)
    barrier()
    if num_processes > 1 and missing:
        cache = FeatureCache(folder, dim, ids)
        rest = [(identity, pair) for identity, pair in missing.items() if identity not in cache]
        _compute(model, images, rest, cache, batch_size, num_workers, progress)  # no shared file system
        barrier()
    if path is not None:
        mapped = cache.in_order(ids)  # of the same images in another data set
        if mapped is None and process_index == 0:
            mapped = cache.put_together(path, ids)
        barrier()
        if mapped is None and process_index > 0:
            mapped = FeatureCache(folder, dim, ids).in_order(ids)
        if mapped is not None:
            return mapped.view(shape)
    result, lost = cache.get(ids)
    if lost:  # what is computed now is not written again
        again = [pairs[i] for i in lost]
        result[lost] = torch.cat([*_embed(model, images, again, batch_size, num_workers, progress)])
    return result.view(shape)


@torch.no_grad()
def _embed(
    model: Any, images: Any, pairs: list[tuple], batch_size: int, num_workers: int, progress: bool
) -> Iterator[torch.Tensor]:
    """The embeddings of (view, item) pairs, batch by batch."""
    on_gpu, on_cpu = model.device.type == "cuda", model.device.type == "cpu"
    batch_size = min(batch_size, _CPU_BATCH) if on_cpu else batch_size
    loader = DataLoader(_Views(images, pairs), batch_size=batch_size, num_workers=num_workers, pin_memory=on_gpu)

    def taken(features: torch.Tensor) -> torch.Tensor:
        features = features.float().cpu()
        if not is_finite(features):
            raise ValueError("the image embeddings hold NaN or infinite values: check the base model and its dtype.")
        bar.update(len(features))
        return features

    shown: dict[str, Any] = {"desc": "Embedding images", "unit": "image", "leave": False, "dynamic_ncols": True}
    with tqdm(total=len(pairs), disable=not progress or not pairs, **shown) as bar:
        before = None  # fetched when the next batch is on its way, so that a GPU does not wait for the CPU
        for batch in loader:
            inputs = dict(batch) if isinstance(batch, dict) else {"pixel_values": batch}
            features = model.get_image_features(inputs.pop("pixel_values"), **inputs)
            if before is not None:
                yield taken(before)
            before = features
        if before is not None:
            yield taken(before)


def _compute(
    model: Any, images: Any, todo: list, cache: FeatureCache, batch_size: int, num_workers: int, progress: bool
) -> None:
    ids, features = [identity for identity, _ in todo], []
    done = 0
    for batch in _embed(model, images, [pair for _, pair in todo], batch_size, num_workers, progress):
        features.append(batch)
        count = sum(map(len, features))
        if count >= _FILE_ROWS or done + count == len(ids):
            cache.add(ids[done : done + count], torch.cat(features))
            done, features = done + count, []


class EmbeddedImages(Dataset):
    """Image embeddings and labels as a data set for training: item i of epoch e is view e mod K of image i.

    Args:
        image_embeds (`torch.Tensor`): `(K, num_images, projection_dim)` or `(num_images, projection_dim)`.
        labels (`Sequence[int]`): class indices, `(num_images,)`; -100 where there is none, which no loss counts.
        is_checked (`bool`, *optional*, defaults to `False`): whether the embeddings are known to be finite, as those
            of [`embed_images`] are. Otherwise all of them are read.

    Raises:
        ValueError: embeddings and labels that do not pair up, NaN, or a label that is not a class index.
    """

    def __init__(self, image_embeds: torch.Tensor, labels: Sequence[int] | np.ndarray, is_checked: bool = False):
        self.image_embeds = image_embeds if image_embeds.dim() == 3 else image_embeds[None]
        given = np.asarray(labels)
        if given.dtype.kind not in "iu" or given.ndim != 1:
            raise ValueError(
                f"labels must be class indices, whole numbers (num_images,), got {given.dtype} of shape {given.shape}."
            )
        self.labels = torch.as_tensor(given.astype(np.int64))
        if self.image_embeds.shape[1] != len(self.labels):
            raise ValueError(
                f"got {self.image_embeds.shape[1]} image embeddings and {len(self.labels)} labels; they must pair up."
            )
        check_labels(np.where(given == -100, 0, given), where="Image {row}")
        if not is_checked and not is_finite(self.image_embeds):
            raise ValueError("the image embeddings hold NaN or infinite values: check the base model and its dtype.")
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the view."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | torch.Tensor) -> dict[str, torch.Tensor]:
        view = self.image_embeds[self.epoch % len(self.image_embeds)]
        return {"image_embeds": view[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self[torch.as_tensor(indices)]

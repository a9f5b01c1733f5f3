"""Image embeddings computed once: the image tower is frozen, so an image's view always gives the same vector.

The cache is a folder for each tower (weights, preprocessing, precision), holding append-only safetensors files of
identities and embeddings. An identity is a hash of the image's content and of the view, so another run, another
seed, another set of shots or another method finds what is there, whatever data set the image came with.
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..atomic import save_tensors, write_atomically
from .few_shot import check_labels
from .transforms import Pixels


__all__ = ["EmbeddedImages", "FeatureCache", "default_cache_dir", "embed_images"]

logger = logging.getLogger(__name__)

_ID_BYTES = 16

_FILE_ROWS = 4096  # embeddings in one file: at most so many are lost when a run is interrupted


def default_cache_dir() -> str:
    """`COOP_HF_CACHE` if it is set, else `coop_hf` in the Hugging Face home."""
    return os.environ.get("COOP_HF_CACHE") or os.path.join(HF_HOME, "coop_hf")


class FeatureCache:
    """The cached embeddings of one image tower, in one folder.

    Args:
        folder (`str`): where its files lie; made at the first write.
        dim (`int`): dimensions of an embedding.
    """

    def __init__(self, folder: str, dim: int):
        self.folder, self.dim = folder, dim
        self._where: dict[bytes, tuple[str, int]] = {}
        self._unwritten: dict[bytes, torch.Tensor] = {}  # what the disk did not take, for this run alone
        if os.path.isdir(folder):
            for name in sorted(os.listdir(folder)):
                if name.endswith(".safetensors") and not name.startswith("."):
                    self._index(os.path.join(folder, name))

    def _index(self, path: str) -> None:
        try:
            with safe_open(path, framework="np") as file:
                ids, features = file.get_tensor("ids"), file.get_slice("features")
                if ids.shape[1:] != (_ID_BYTES,) or features.get_shape() != [len(ids), self.dim]:
                    raise ValueError("shapes do not fit")
                digest = hashlib.blake2b(ids.tobytes() + file.get_tensor("features").tobytes(), digest_size=16)
                if (file.metadata() or {}).get("checksum") != digest.hexdigest():
                    raise ValueError("checksum does not fit")
        except FileNotFoundError:
            return
        except (SafetensorError, ValueError, OSError, KeyError) as error:
            logger.warning("The feature cache file %s is damaged (%s); it is removed and computed again.", path, error)
            try:
                os.remove(path)
            except OSError:
                pass
            return
        for row, identity in enumerate(ids):
            self._where[identity.tobytes()] = (path, row)

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._where or identity in self._unwritten

    def add(self, ids: list[bytes], features: torch.Tensor) -> None:
        """Writes embeddings `(len(ids), dim)` as one more file, which appears whole or not at all.

        Where the disk is full or read-only they are kept in memory, with a warning: a cache only saves time.
        """
        id_array = np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, _ID_BYTES).copy()
        features = features.detach().to("cpu", torch.float32).contiguous()
        digest = hashlib.blake2b(id_array.tobytes() + features.numpy().tobytes(), digest_size=16).hexdigest()
        path = os.path.join(self.folder, f"{uuid.uuid4().hex}.safetensors")
        tensors = {"ids": torch.from_numpy(id_array), "features": features}
        try:
            os.makedirs(self.folder, exist_ok=True)
            with write_atomically(path) as temporary:
                save_tensors(tensors, temporary, {"checksum": digest})
        except OSError as error:
            if not self._unwritten:
                logger.warning(
                    "Image embeddings cannot be kept in %s (%s): the next run computes them again. Free space, or "
                    "name another folder (`feature_cache_dir`, or COOP_HF_CACHE in the environment).",
                    self.folder,
                    error,
                )
            self._unwritten.update(zip(ids, features))
        else:
            self._where.update({identity: (path, row) for row, identity in enumerate(ids)})

    def get(self, ids: list[bytes]) -> tuple[torch.Tensor, list[int]]:
        """The embeddings of these identities, `(len(ids), dim)` fp32, and the places of those whose file is gone."""
        result, lost = torch.empty(len(ids), self.dim), []
        by_file: dict[str, list[tuple[int, int]]] = {}
        for place, identity in enumerate(ids):
            if identity in self._unwritten:
                result[place] = self._unwritten[identity]
                continue
            path, row = self._where[identity]
            by_file.setdefault(path, []).append((place, row))
        for path, pairs in by_file.items():
            places, rows = map(list, zip(*pairs))
            try:
                with safe_open(path, framework="pt") as file:
                    result[places] = file.get_tensor("features")[rows]
            except (SafetensorError, OSError, IndexError) as error:
                logger.warning("The feature cache file %s went away (%s); it is computed again.", path, error)
                lost += places
        return result, lost


def _tower_key(model: Any, images: Any) -> str:
    """Identity of what turns an image into an embedding: image tower, projection, preprocessing and precision."""
    digest = hashlib.blake2b(digest_size=16)
    base = model.get_base_model()
    for module in model.family.vision_modules:
        for name, tensor in sorted(module.state_dict().items()):
            tensor = tensor.detach().contiguous().cpu()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    device = model.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    lora = sorted(getattr(base, "peft_config", {}).items())  # its scale stands in no weight
    digest.update(f"{base.config.vision_config.to_json_string()} {lora} {precision} v2".encode())
    digest.update(images.preprocessing_key().encode())
    return digest.hexdigest()


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
    num_workers: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], object] = lambda: None,
    progress: bool = True,
) -> torch.Tensor:
    """Image embeddings of a data set, from the cache as far as they are there.

    Args:
        model (`CoOpModel`): its image tower is used, on its device, under the autocast that is in force.
        images (`LabelledImages`): the images.
        num_views (`int`, *optional*): augmented views 0 ... num_views - 1 of each image, the same pixels that
            epochs 0 ... num_views - 1 of a training without cache see. `None`: the plain view alone.
        cache_dir (`str`, *optional*, defaults to `default_cache_dir()`): where caches lie.
        batch_size (`int`, *optional*, defaults to 64): images a step.
        num_workers (`int`, *optional*, defaults to 0): processes that decode.
        process_index, num_processes, barrier: with several processes, each computes its share and waits for the rest.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `torch.Tensor` `(num_views or 1, len(images), projection_dim)`, projected, not normalised, fp32, on the CPU.

    Raises:
        ValueError: the active adapter's prompts change the image tower.
    """
    adapter = getattr(model, "adapter", None)
    if adapter is not None and adapter.prompts_image_tower and not model.is_disabled:
        raise ValueError(
            f"the prompts of the method {adapter.method!r} change the image tower, so image embeddings cannot "
            "be kept: pass the images themselves, or call this within `model.disable_adapter()` for the base's own."
        )
    views = [None] if num_views is None else list(range(num_views))
    folder = os.path.join(cache_dir or default_cache_dir(), "features", _tower_key(model, images))
    dim = model.family.projection_dim
    contents = [images.content_key(item) for item in range(len(images))]
    pairs = [(view, item) for view in views for item in range(len(images))]
    ids = [
        hashlib.blake2b(contents[item] + images.view_key(item, view).encode(), digest_size=_ID_BYTES).digest()
        for view, item in pairs
    ]
    cache = FeatureCache(folder, dim)
    missing = {identity: pair for identity, pair in zip(ids, pairs) if identity not in cache}
    mine = list(missing.items())[process_index::num_processes]
    _compute(model, images, mine, cache, batch_size, num_workers, progress)
    barrier()
    if num_processes > 1 and missing:
        cache = FeatureCache(folder, dim)
        rest = [(identity, pair) for identity, pair in missing.items() if identity not in cache]
        _compute(model, images, rest, cache, batch_size, num_workers, progress)  # no shared file system
        barrier()
    result, lost = cache.get(ids)
    if lost:  # something clears the folder: what is computed now is not written again
        result[lost] = torch.cat([*_embed(model, images, [pairs[i] for i in lost], batch_size, num_workers, progress)])
    return result.view(len(views), len(images), dim)


@torch.no_grad()
def _embed(
    model: Any, images: Any, pairs: list[tuple], batch_size: int, num_workers: int, progress: bool
) -> Iterator[torch.Tensor]:
    """The embeddings of (view, item) pairs, batch by batch."""
    loader = DataLoader(_Views(images, pairs), batch_size=batch_size, num_workers=num_workers)
    with tqdm(total=len(pairs), desc="Image embeddings", unit="img", disable=not progress or not pairs) as bar:
        for batch in loader:
            inputs = dict(batch) if isinstance(batch, dict) else {"pixel_values": batch}
            features = model.get_image_features(inputs.pop("pixel_values"), **inputs).float().cpu()
            bar.update(len(features))
            yield features


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

    Raises:
        ValueError: embeddings and labels that do not pair up, NaN, or a label that is not a class index.
    """

    def __init__(self, image_embeds: torch.Tensor, labels: Sequence[int] | np.ndarray):
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
        if not torch.isfinite(self.image_embeds).all():
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

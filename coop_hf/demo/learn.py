"""What the demo's page learns from a visitor's images: reading them, training, and the adapter as one file."""

import os
import random
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import datasets
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from ..checks import clean_class_name, some
from ..config import CoOpConfig
from ..data.feature_cache import EmbeddedImages, embed_images
from ..data.labelled_images import LabelledImages
from ..data.sources import IMAGE_EXTENSIONS, SPLIT_NAMES, apart
from ..files.model_card import write_card
from ..hub import is_hub_id
from ..modeling import CoOpModel
from ..training.arguments import CoOpTrainingArguments
from ..training.trainer import CoOpTrainer
from .answers import MAKING, MAX_NAME_LENGTH, Message, read


__all__ = ["Found", "Learned", "images_of_folder", "images_of_zip", "learn", "split_images"]

# What a visitor may bring. A zip's own numbers are believed only in so far as no more is ever written.
MAX_FILES, MAX_BYTES, MAX_CLASSES = 5_000, 2**29, 200
MAX_TEST = 25  # images of a class that accuracy is measured on

Tell = Callable[[float, str], Any]


@dataclass
class Found:
    """One image that was found.

    Attributes:
        file (`str`): where it lies on this machine.
        name (`str`): what the visitor calls it.
        label (`str`): its class, the name of its folder.
        split (`str`): `"train"`, `"validation"` or `"test"` if it lies in a folder of that name, else `""`.
    """

    file: str
    name: str
    label: str
    split: str


@dataclass
class Learned:
    """What was learned.

    Attributes:
        model (`CoOpModel`): with the learned adapter.
        archive (`str`): zip of the adapter: safetensors, configuration, card.
        before, after (`float`): accuracy of the hand-written and the learned prompt on the same test images.
        num_train, num_test (`int`): number of images.
    """

    model: CoOpModel
    archive: str
    before: float
    after: float
    num_train: int
    num_test: int


# ---------------------------------------------------------------------- what the visitor brings


def _place(name: str) -> tuple[str, str] | None:
    """Class and split that a path in the visitor's folder says; `None` for what is no image, or hidden."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".", "..")]
    if not parts or any(part.startswith((".", "__")) for part in parts):
        return None
    if PurePosixPath(parts[-1]).suffix.lower() not in IMAGE_EXTENSIONS:
        return None
    if len(parts) == 1:
        raise Message(f"“{parts[0]}” lies in no folder: put the images of each class into a folder with its name.")
    return parts[-2], SPLIT_NAMES.get(parts[-3].lower(), "") if len(parts) > 2 else ""


def images_of_zip(path: str | os.PathLike, folder: str | os.PathLike) -> list[Found]:
    """Unpacks the images of a zip, one folder for each class in it.

    Files are written under numbers, so no name in the zip chooses a place on this machine.

    Args:
        path (`str` or `os.PathLike`): the zip.
        folder (`str` or `os.PathLike`): an empty folder.

    Raises:
        Message: it is no zip, is damaged, encrypted or too large, or holds images outside folders.
    """
    found: list[Found] = []
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_bounds(len(entries), sum(entry.file_size for entry in entries))
            for entry in entries:
                place = _place(entry.filename)
                if place is None or stat.S_ISLNK(entry.external_attr >> 16):
                    continue
                if entry.flag_bits & 1:
                    raise Message("This zip has a password: make one without.")
                file = os.path.join(folder, f"{len(found)}{PurePosixPath(entry.filename).suffix.lower()}")
                with archive.open(entry) as source, open(file, "wb") as target:
                    shutil.copyfileobj(source, target)  # zipfile gives no more than `file_size`
                found.append(Found(file, entry.filename, *place))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, zlib.error) as error:
        raise Message(f"This file cannot be read as a zip ({str(error)[:100]}): make it again.") from error
    return found


def images_of_folder(files: Iterable[tuple[str, str]]) -> list[Found]:
    """The same of a folder that was uploaded: pairs of a file here and its path in the visitor's folder."""
    files = list(files)
    _check_bounds(len(files), sum(os.path.getsize(file) for file, _ in files))
    places = [(file, name, _place(name)) for file, name in files]
    return [Found(file, name, *place) for file, name, place in places if place is not None]


def _check_bounds(count: int, size: int) -> None:
    if count > MAX_FILES:
        raise Message(f"These are {count:,} files; this page takes up to {MAX_FILES:,}.")
    if size > MAX_BYTES:
        raise Message(f"These are {size / 2**20:,.0f} MiB unpacked; this page takes up to {MAX_BYTES / 2**20:,.0f}.")


def split_images(
    found: list[Found], num_shots: int = 16, seed: int = 1, tell: Tell = lambda share, text: None
) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Images to learn from, and images to measure accuracy on, which nothing is learned from.

    Of folders `train` and `test` (or `validation`) as they say; otherwise a quarter of each class is set apart.

    Args:
        found (`list[Found]`): the images.
        num_shots (`int`, *optional*, defaults to 16): at most so many of each class to learn from.
        seed (`int`, *optional*, defaults to 1): of the draw.
        tell (`Callable`, *optional*): is told how much of the reading is done.

    Returns:
        both sets, and a note about images that were left out.

    Raises:
        Message: no images, one class only, classes of one name, a class with too few images.
    """
    if not found:
        raise Message(f"There is no image in it ({', '.join(IMAGE_EXTENSIONS)}), in a folder for each class.")
    labels = sorted({image.label for image in found})
    _check_labels(labels)
    readable: list[Found] = []
    bad: list[str] = []
    for done, image in enumerate(found):
        tell(done / len(found), "Reading images")
        try:
            read(image.file)
            readable.append(image)
        except Message:
            bad.append(image.name)
    note = f"{len(bad)} files cannot be read as images and were left out: {some(bad, 3)}." if bad else ""

    splits = {image.split for image in readable}
    held_out = "test" if "test" in splits else "validation"
    has_own = {"train", held_out} <= splits
    draw = random.Random(seed)
    train, test = [], []
    for label in labels:
        own = [image for image in readable if image.label == label]
        draw.shuffle(own)
        if has_own:
            parts = [[i for i in own if i.split == "train"], [i for i in own if i.split == held_out]]
        else:
            size = max(1, len(own) // 4)
            parts = [own[size:], own[:size]]
        if not parts[0]:
            where = " in the folder “train”" if has_own else ", and one of them is for the test"
            raise Message(f"“{label}” has {len(own)} readable images{where}: at least one is needed to learn from.")
        train += parts[0][:num_shots]
        test += parts[1][:MAX_TEST]
    return _dataset(train, labels), _dataset(test, labels), note


def _check_labels(labels: list[str]) -> None:
    same: dict[str, str] = {}
    for label in labels:
        clean = clean_class_name(label).casefold()
        if clean in same:
            raise Message(f"“{same[clean]}” and “{label}” are one name to a prompt: merge or rename these folders.")
        if not clean or len(label) > MAX_NAME_LENGTH or not label.isprintable():
            raise Message(f"“{label[:50]}” is no name for a class: rename this folder.")
        same[clean] = label
    if len(labels) == 1:
        raise Message(f"There is one class only, “{labels[0]}”: at least two are needed, each in a folder of its own.")
    if len(labels) > MAX_CLASSES:
        raise Message(f"These are {len(labels)} classes; this page takes up to {MAX_CLASSES}.")


def _dataset(images: list[Found], labels: list[str]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=apart(labels))})
    columns = {"image": [i.file for i in images], "label": [labels.index(i.label) for i in images]}
    return datasets.Dataset.from_dict(columns, features=features)


# ---------------------------------------------------------------------- learning


class _Tells(TrainerCallback):
    """Says how far the training is."""

    def __init__(self, tell: Tell):
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(state.global_step / state.max_steps, "Learning")


def learn(
    base: CoOpModel,
    train: datasets.Dataset,
    test: datasets.Dataset,
    folder: str | os.PathLike,
    template: str | None = None,
    class_specific: bool = False,
    seed: int = 1,
    tell: Tell = lambda share, text: None,
) -> Learned:
    """Learns a prompt, and measures it beside the hand-written one.

    Args:
        base (`CoOpModel`): any model on the base; it is not changed.
        train, test (`datasets.Dataset`): from [`split_images`].
        folder (`str` or `os.PathLike`): where the zip of the adapter goes.
        template (`str`, *optional*): the hand-written prompt, with `{}` for the class name.
        class_specific (`bool`, *optional*, defaults to `False`): whether each class learns vectors of its own.
        seed (`int`, *optional*, defaults to 1): of the training.
        tell (`Callable`, *optional*): is told how much is done.

    Raises:
        Message: a template without `{}`, or names that do not fit into a prompt.
    """
    template = (template or "").strip() or base.config.template
    names = [name.rstrip("_") for name in train.features["label"].names]
    # A path of this machine is nothing to give away; whoever loads the adapter names the base.
    base_name = base.config.base_model_name_or_path
    is_public = base_name is not None and is_hub_id(base_name) and not os.path.exists(base_name)
    try:
        with MAKING:
            set_seed(seed)
            config = CoOpConfig(n_ctx=4, class_specific=class_specific, template=template)
            model = CoOpModel(base.base_model, config, names, base.processor)
    except ValueError as error:
        raise Message(f"This does not make a prompt: {error}") from error
    where = (base_name, base.config.revision) if is_public else (None, None)
    model.adapter.config = replace(model.config, base_model_name_or_path=where[0], revision=where[1])
    with tempfile.TemporaryDirectory() as work:
        tell(0.0, "Looking at images")
        # In this process: workers would be forked from one with many threads, where a lock may be held for ever.
        parts = [LabelledImages(part, model.image_processor, class_names=names) for part in (train, test)]
        embedded = [
            EmbeddedImages(embed_images(model, part, None, work, num_workers=0, progress=False), part.labels)
            for part in parts
        ]
        args = CoOpTrainingArguments(
            work, seed=seed, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no"
        )
        trainer = CoOpTrainer(model, args, embedded[0], embedded[1], callbacks=[_Tells(tell)])
        trainer.remove_callback(PrinterCallback)
        trainer.about = {"dataset": "images of one's own"}
        with model.disable_adapter():
            before = trainer.evaluate(metric_key_prefix="zero_shot")["zero_shot_accuracy"]
        trainer.train()
        after = trainer.evaluate()["eval_accuracy"]
        model.eval()
        saved = os.path.join(work, "my-prompt")
        model.save_adapters(saved)
        write_card(saved, model, name="my-prompt", training=trainer.summary())
        archive = shutil.make_archive(os.path.join(folder, "my-prompt"), "zip", work, "my-prompt")
    return Learned(model, archive, before, after, len(train), len(test))

"""What the demo's page asks of adapters: their scores beside the hand-written prompt's, and their nearest words.

Nothing here changes an adapter that others are reading: names that a visitor edits get a model of their own on the
same base, so any number of visitors may ask at once.
"""

import os
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..checks import clean_class_name
from ..data.transforms import decode_image
from ..files.adapter_files import base_of, check_adapter
from ..interpret import nearest_tokens
from ..modeling import CoOpModel


__all__ = ["Answer", "Message", "Shelf", "ask", "edited_names", "facts", "load_shelf", "words"]

MAX_CLASSES, MAX_NAME_LENGTH = 1000, 200  # of what a visitor may type

MAX_PIXELS = 2**26

MAKING = threading.Lock()  # making a model draws random numbers, and puts the generator back


class Message(ValueError):
    """What a page says instead of an answer."""


@dataclass
class Answer:
    """Scores of one image.

    Attributes:
        learned, template (`list[tuple[str, float]]`): class names and scores, best first, of the learned adapter and
            of its hand-written prompt.
        note (`str`): what the visitor should know about them.
    """

    learned: list[tuple[str, float]] = field(default_factory=list)
    template: list[tuple[str, float]] = field(default_factory=list)
    note: str = ""


class Shelf:
    """Adapters to choose among; thread safe.

    Args:
        num_learned (`int`, *optional*, defaults to 16): how many that visitors have learned are kept.
        num_edited (`int`, *optional*, defaults to 32): how many models with edited class names are kept.

    Attributes:
        models (`dict[str, CoOpModel]`): by name, those that everyone may choose.
    """

    def __init__(self, num_learned: int = 16, num_edited: int = 32):
        self.models: dict[str, CoOpModel] = {}
        self._bounds = (num_learned, num_edited)
        self._learned: OrderedDict[str, CoOpModel] = OrderedDict()
        self._edited: OrderedDict[tuple, CoOpModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, class_names: Sequence[str] | None = None) -> CoOpModel:
        """The model of a key, with the classes given.

        Raises:
            Message: it is no longer there.
            ValueError: names that don't fit.
        """
        with self._lock:
            model = self.models.get(key) or self._learned.get(key)
            if model is None:
                raise Message("This prompt is no longer here: choose another, or learn it again.")
            if class_names is None or list(class_names) == model.class_names:
                return model
            place = (key, *class_names)
            if place in self._edited:
                self._edited.move_to_end(place)
                return self._edited[place]
        config = replace(model.config, class_names=list(class_names))
        with MAKING:
            edited = CoOpModel(
                model.base_model, config, processor=model.processor, tensors=model.adapter.learned_state()
            )
        edited.eval()
        with self._lock:
            self._edited[place] = edited
            while len(self._edited) > self._bounds[1]:
                self._edited.popitem(last=False)
        return edited

    def keep(self, model: CoOpModel) -> str:
        """Keeps what a visitor has learned; gives the key, which nobody else can guess. The oldest ones go."""
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._learned[key] = model
            while len(self._learned) > self._bounds[0]:
                gone = self._learned.popitem(last=False)[0]
                for place in [place for place in self._edited if place[0] == gone]:
                    del self._edited[place]
        return key


def load_shelf(adapters: Sequence[str | os.PathLike], base_model: str | os.PathLike | None = None) -> Shelf:
    """Loads adapters; those with the same base share it.

    Args:
        adapters (`list[str]`): folders or Hub ids.
        base_model (`str`, *optional*): base to take instead of the one that the adapters name.

    Raises:
        ValueError, OSError: an adapter is not found or damaged, before any base is loaded; or its base is not found.
    """
    given = [os.fspath(adapter) for adapter in adapters]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise ValueError(f"the adapter {twice[0]!r} is named twice: name each once.")
    configs = [check_adapter(name) for name in given]
    shelf, bases = Shelf(), dict[Any, CoOpModel]()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, shown, config in zip(given, _short(given), configs):
        place = os.fspath(base_model) if base_model is not None else (base_of(config, name), config.revision)
        if place in bases:
            first = bases[place]
            model = CoOpModel.from_pretrained(name, base_model=first.base_model, processor=first.processor)
        else:
            model = bases[place] = CoOpModel.from_pretrained(name, base_model=base_model)
        shelf.models[shown] = model.to(device).eval()
    return shelf


def _short(names: list[str]) -> list[str]:
    """Names to choose by: of a folder its last part, where that is enough to tell it from the others."""
    short = [Path(name).resolve().name if os.path.isdir(name) else name for name in names]
    return [own if short.count(own) == 1 else name for own, name in zip(short, names)]


def edited_names(text: str) -> tuple[list[str], str]:
    """Class names as a visitor typed them: one in a line, or separated by commas in one line.

    Returns:
        the names, and a note about those that stand there twice, which are taken once.

    Raises:
        Message: there are none, or too many, or too long ones.
    """
    text = text.strip()
    names = [name.strip() for name in (text.splitlines() if "\n" in text else text.split(","))]
    first: dict[str, str] = {}
    repeated = []
    for name in names:
        same = clean_class_name(name).casefold()
        if same in first:
            repeated.append(name)
        elif same:
            first[same] = name
    if not first:
        raise Message("Write the names of the classes, one in a line.")
    if len(first) > MAX_CLASSES:
        raise Message(f"These are {len(first):,} classes; this page takes up to {MAX_CLASSES:,}.")
    longest = max(first.values(), key=len)
    if len(longest) > MAX_NAME_LENGTH:
        raise Message(f"“{longest[:30]} …” has {len(longest)} characters; up to {MAX_NAME_LENGTH} are taken.")
    note = f"“{repeated[0]}” stands there more than once, and is taken once." if repeated else ""
    return list(first.values()), note


def ask(shelf: Shelf, key: str, image: str | os.PathLike | None, names: str, top_k: int = 5) -> Answer:
    """Scores an image with an adapter and with its hand-written prompt.

    Args:
        shelf (`Shelf`): the adapters.
        key (`str`): which one.
        image (`str` or `os.PathLike`, *optional*): file of the image; without one there are no scores.
        names (`str`): class names as the visitor typed them, see [`edited_names`]. What is learned for single classes
            keeps its own.
        top_k (`int`, *optional*, defaults to 5): how many classes.

    Raises:
        Message: what stands in the way, in the visitor's words.
    """
    own = shelf.get(key)
    wanted, note = None, ""
    if not own.adapter.is_class_bound and names.strip() != "\n".join(own.class_names or []).strip():
        wanted, note = edited_names(names)
    try:
        model = shelf.get(key, wanted)
    except Message:
        raise
    except ValueError as error:  # names of more tokens than the tower has positions
        raise Message(f"These names do not fit: {error}") from error
    if model.class_names is None:
        raise Message("Write the names of the classes, one in a line.")
    if image is None:
        return Answer(note=note)
    picture = read(image)
    learned = _best(model, picture, top_k)
    with model.disable_adapter():  # for this thread alone
        template = _best(model, picture, top_k)
    return Answer(learned, template, note)


def _best(model: CoOpModel, picture: Any, top_k: int) -> list[tuple[str, float]]:
    best, seen = [], Counter[str]()
    for entry in model.predict(picture, top_k=top_k):
        seen[entry["label"]] += 1
        times = seen[entry["label"]]  # several classes may have one name, as in CLIP's list for ImageNet
        best.append((entry["label"] + (f" ({times})" if times > 1 else ""), entry["score"]))
    return best


def read(image: str | os.PathLike) -> Any:
    """An image of a visitor, decoded.

    Raises:
        Message: it cannot be read.
    """
    name = os.path.basename(image)
    try:
        with PIL.Image.open(image) as opened:
            size = opened.size
        if size[0] * size[1] <= MAX_PIXELS:
            return decode_image(image)
    except Exception as error:  # PIL's decoders raise many types
        raise Message(f"“{name}” cannot be read as an image: it is damaged, or of another kind.") from error
    raise Message(f"“{name}” is too large: {size[0]:,} × {size[1]:,}; up to {MAX_PIXELS:,} pixels are taken.")


def words(model: CoOpModel, max_classes: int = 20) -> dict[str, list[list[str]]]:
    """The vocabulary entries nearest to each context vector, by class; under `""` where all classes share the context.

    Empty for methods without context vectors.
    """
    if not isinstance(getattr(model.adapter, "context", None), torch.nn.Parameter):
        return {}
    nearest = nearest_tokens(model, max_classes=max_classes)
    by_class = nearest if isinstance(nearest, dict) else {"": nearest}
    return {name: [[entry["token"] for entry in row] for row in rows] for name, rows in by_class.items()}


def facts(model: CoOpModel) -> str:
    """An adapter in one line: its method, its size, its base."""
    config, base = model.config, str(model.base_model.config._name_or_path or "a model without a name")
    count = sum(tensor.numel() for tensor in model.adapter.learned_state().values())
    if os.path.isdir(base):  # where it lies on this machine is nobody's business
        base = os.path.basename(os.path.normpath(base))
    kind = "for each class its own" if model.adapter.is_class_bound else "for any classes"
    return f"{config.method}, {count:,} learned numbers, {kind}; base model {base}"

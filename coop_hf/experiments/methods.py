"""The methods of the protocols: each learns from a few-shot draw, and gives what scores images."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PrinterCallback, set_seed

from ..baselines import (
    autoprompt,
    class_embeddings,
    cupl_class_embeddings,
    fit_linear_probe,
    fit_pet,
    zero_shot_logits,
)
from ..config import CoOpConfig
from ..core.layout import encode_words
from ..data.feature_cache import EmbeddedImages
from ..modeling import CoOpModel
from ..training.arguments import CoOpTrainingArguments
from ..training.trainer import CoOpTrainer
from .tasks import FewShot


__all__ = [
    "ABLATIONS",
    "EMOJI_TEMPLATES",
    "METHODS",
    "Method",
    "Options",
    "Predictor",
    "ablation_methods",
    "coop_method",
]

T = TypeVar("T")

# Candidates for the embedded default; `choose_template` takes the best on validation.
EMOJI_TEMPLATES = (
    "{}.",
    "a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "an emoji of a {}.",
    "an icon of a {}.",
    "a drawing of a {}.",
    "a photo of a {}.",
)


# ---------------------------------------------------------------------- methods

# Scores images `(num_images, projection_dim)` against any list of class names.
Predictor = Callable[[torch.Tensor, list[str]], torch.Tensor]


@dataclass(frozen=True)
class Options:
    """What all methods of a run have in common.

    Args:
        template (`str`): the hand-written prompt.
        ensemble (`tuple[str, ...]`): templates of the prompt ensemble.
        cupl (`dict[str, list[str]]`, *optional*): CuPL's sentences.
        recipe (`str`, *optional*, defaults to `"fast"`): of `CoOpTrainingArguments`.
    """

    template: str
    ensemble: tuple[str, ...]
    cupl: dict | None = None
    recipe: str = "fast"


@dataclass(frozen=True)
class Method:
    """A method of a protocol.

    Args:
        title (`str`): its name in tables.
        fit (`Callable[[CoOpModel, FewShot, Options], Predictor]`): learns, and returns what scores images. The model
            gives base and processor, and must not be changed.
        learns (`bool`, *optional*, defaults to `True`): `False`: does not look at the few-shot set, and is run once.
        any_classes (`bool`, *optional*, defaults to `True`): whether it scores other classes than it has learned.
    """

    title: str
    fit: Callable
    learns: bool = True
    any_classes: bool = True


def _from_texts(model: CoOpModel, embed: Callable[[list[str]], torch.Tensor]) -> Predictor:
    """Scores with class embeddings that depend on the class names alone."""
    return lambda image_embeds, names: zero_shot_logits(model, embed(names), image_embeds=image_embeds)


def _fit_template(model: CoOpModel, shots: FewShot | None, options: Options) -> Predictor:
    return _from_texts(model, lambda names: class_embeddings(model, None, names, options.template))


def _fit_ensemble(model: CoOpModel, shots: FewShot | None, options: Options) -> Predictor:
    return _from_texts(model, lambda names: class_embeddings(model, None, names, list(options.ensemble)))


def _fit_cupl(model: CoOpModel, shots: FewShot | None, options: Options) -> Predictor:
    if options.cupl is None:
        raise ValueError("CuPL needs a file of sentences: pass `cupl=read_prompts(path)`, or --cupl_file.")
    return _from_texts(
        model, lambda names: cupl_class_embeddings(model, None, names, options.cupl, too_long="truncate")
    )


def _fit_probe(model: CoOpModel, shots: FewShot, options: Options) -> Predictor:
    probe = fit_linear_probe(
        shots.image_embeds, shots.labels, shots.val_embeds, shots.val_labels, class_names=shots.class_names
    )

    def predict(image_embeds: torch.Tensor, names: list[str]) -> torch.Tensor:
        if list(names) != list(shots.class_names):
            raise ValueError("a linear probe scores the classes that it was fitted on, and no others.")
        return probe.logits(image_embeds)

    return predict


def _fit_autoprompt(model: CoOpModel, shots: FewShot, options: Options) -> Predictor:
    """Starts from the words of the hand-written prompt; without any, or with rare ones, from four random words."""
    words = options.template.split("{}")[0].split()
    is_usual = words and all(len(ids) == 1 for ids in encode_words(model.tokenizer, words))
    prompt = autoprompt(
        model,
        shots.image_embeds,
        shots.labels,
        shots.class_names,
        init=" ".join(words) if is_usual else None,
        objective="accuracy",
        num_steps=32,
        seed=shots.seed,
    )
    return _from_texts(model, lambda names: class_embeddings(model, None, names, prompt.template))


def _make_student(model: CoOpModel, shots: FewShot, options: Options, **config: Any) -> CoOpModel:
    set_seed(shots.seed)
    config = CoOpConfig(template=options.template, **config)
    return CoOpModel(model.get_base_model(), config, shots.class_names, model.processor)


def _train_coop(model: CoOpModel, shots: FewShot, options: Options, **config: Any) -> CoOpModel:
    student = _make_student(model, shots, options, **config)
    train, columns = EmbeddedImages(shots.image_embeds, shots.labels), {}
    if options.recipe != "fast":  # augmented views need the images
        train = shots.images
        columns = {"image_column": shots.columns[0], "label_column": shots.columns[1]}
    with tempfile.TemporaryDirectory() as folder:
        args = CoOpTrainingArguments(
            folder,
            recipe=options.recipe,
            seed=shots.seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **columns,
        )
        trainer = CoOpTrainer(student, args, train_dataset=train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student


def _predict_with(student: CoOpModel) -> Predictor:
    @torch.no_grad()
    def predict(image_embeds: torch.Tensor, names: list[str]) -> torch.Tensor:
        if list(names) != student.class_names:
            student.set_class_names(list(names))
        return student(image_embeds=image_embeds).logits

    return predict


def _fit_coop(model: CoOpModel, shots: FewShot, options: Options, **config: Any) -> Predictor:
    return _predict_with(_train_coop(model, shots, options, **config))


def coop_method(title: str, **config: Any) -> Method:
    """CoOp with a configuration.

    Args:
        title (`str`): its name in tables.
        config: fields of `CoOpConfig`: `n_ctx`, `class_token_position`, `class_specific`, `ctx_init`.
    """
    return Method(title, functools.partial(_fit_coop, **config), any_classes=not config.get("class_specific", False))


def _fit_pet(model: CoOpModel, shots: FewShot, options: Options) -> Predictor:
    """Teachers: the prompt ensemble, CuPL if there is a file, and a context learned on the labelled images.

    The temperature was chosen on the validation part of the emoji.
    """
    learned = _train_coop(model, shots, options, n_ctx=16)
    if len(shots.unlabelled_embeds) == 0:
        return _predict_with(learned)
    teachers = [list(options.ensemble)]
    if options.cupl is not None:
        teachers.append(cupl_class_embeddings(model, None, shots.class_names, options.cupl, too_long="truncate"))
    with torch.no_grad():
        teachers.append(learned.get_text_features())
    student = _make_student(model, shots, options, n_ctx=16)
    fit_pet(student, teachers, shots.image_embeds, shots.labels, shots.unlabelled_embeds, temperature=1.0)
    return _predict_with(student)


METHODS = {
    "zero_shot": Method("zero-shot CLIP", _fit_template, learns=False),
    "ensemble": Method("prompt ensemble", _fit_ensemble, learns=False),
    "cupl": Method("CuPL", _fit_cupl, learns=False),
    "linear_probe": Method("linear probe", _fit_probe, any_classes=False),
    "autoprompt": Method("AutoPrompt from the template", _fit_autoprompt),
    "pet": Method("PET, student M=16", _fit_pet),
    "coop": coop_method("CoOp M=16", n_ctx=16),
    "coop_m4": coop_method("CoOp M=4", n_ctx=4),
    "coop_csc": coop_method("CoOp M=4, class-specific", n_ctx=4, class_specific=True),
}

# One change at a time; `words` stands for the hand-written template up to the class name.
ABLATIONS = {
    "m4": {"n_ctx": 4},
    "m8": {"n_ctx": 8},
    "m16": {"n_ctx": 16},
    "words": {"ctx_init": "words"},
    "m16_middle": {"n_ctx": 16, "class_token_position": "middle"},
    "m16_front": {"n_ctx": 16, "class_token_position": "front"},
    "m16_csc": {"n_ctx": 16, "class_specific": True},
    "m16_csc_middle": {"n_ctx": 16, "class_specific": True, "class_token_position": "middle"},
}


def ablation_methods(template: str, names: Sequence[str] | None = None) -> dict[str, Method]:
    """The methods of the ablations.

    Args:
        template (`str`): the hand-written prompt; its words before `{}` are what the context starts from in `"words"`.
        names (`list[str]`, *optional*, defaults to all of `ABLATIONS`): which ones.
    """
    methods = {}
    for name in names or ABLATIONS:
        config = dict(look_up(ABLATIONS, name, "ablation"))
        if "ctx_init" in config:
            config["ctx_init"] = template.split("{}")[0].strip()
            if not config["ctx_init"]:
                continue
            start = f'from "{config["ctx_init"]}"'
        else:
            start = f"M={config['n_ctx']}, random"
        title = f"{start}, {config.get('class_token_position', 'end')}"
        methods[name] = coop_method(title + ", class-specific" * config.get("class_specific", False), **config)
    return methods


def look_up(table: dict[str, T], name: str, what: str) -> T:
    """An entry of a table, or an error that says what there is."""
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; choose from {', '.join(table)}.")
    return table[name]

"""The methods of the protocols: each learns from a few-shot draw, and gives what scores images."""

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import PIL.Image
import torch
from torch.utils.data import Subset
from transformers import PrinterCallback, set_seed

from ..adapters import get_adapter_class
from ..adapters.tpt import tpt
from ..baselines import (
    autoprompt,
    class_embeddings,
    cupl_class_embeddings,
    fit_linear_probe,
    fit_pet,
    zero_shot_logits,
)
from ..baselines.clip_lora import fit_clip_lora
from ..config import CoOpConfig
from ..core.layout import encode_words
from ..data.feature_cache import EmbeddedImages
from ..data.labelled_images import LabelledImages, collate
from ..modeling import CoOpModel
from ..training.arguments import RECIPES, CoOpTrainingArguments
from ..training.heads import fit_head
from ..training.trainer import CoOpTrainer
from .configs import check_fields, make_config
from .tasks import FewShot


__all__ = [
    "ABLATIONS",
    "EMOJI_TEMPLATES",
    "METHODS",
    "Method",
    "Options",
    "Predictor",
    "USUAL_METHODS",
    "ablation_methods",
    "coop_method",
    "head",
    "learner",
]

T = TypeVar("T")

BATCH_SIZE = (
    64  # images that are scored at a time where they go through the tower, or have class embeddings of their own
)

# CLIP's C = 0.316, which it uses where it does not search, on features of norm 10; here their norm is 1.
PROBE_C = 31.6

# Candidates for the embedded default; `choose_template` takes the best on validation.
EMOJI_TEMPLATES: tuple[str, ...] = (
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

# Scores image embeddings `(num_images, projection_dim)` against any list of class names. One with an attribute
# `sees_images` takes a data set of `pixel_values` instead of embeddings.
Predictor = Callable[[Any, list[str]], torch.Tensor]


@dataclass(frozen=True)
class Options:
    """What all methods of a run have in common.

    Args:
        template (`str`): the hand-written prompt.
        ensemble (`tuple[str, ...]`): templates of the prompt ensemble.
        cupl (`dict[str, list[str]]`, *optional*): CuPL's sentences.
        recipe (`str`, *optional*, defaults to `"fast"`): of `CoOpTrainingArguments`.
        words (`str`, *optional*, defaults to `"a photo of a"`): words that a prompt starts from, in methods that start
            from words.
        validation (`str`, *optional*): what the few validation images are for. `None`: the linear probe's
            regularisation alone, as in CoOp's paper. `"few"`: everything that a method's paper chooses on them.
            `"none"`: nothing.
    """

    template: str
    ensemble: tuple[str, ...]
    cupl: dict | None = None
    recipe: str = "fast"
    words: str = "a photo of a"
    validation: str | None = None


@dataclass(frozen=True)
class Method:
    """A method of a protocol.

    Args:
        title (`str`): its name in tables.
        fit (`Callable[[CoOpModel, FewShot, Options], Predictor]`): learns, and returns what scores images. The model
            gives base and processor, and must not be changed.
        learns (`bool`, *optional*, defaults to `True`): `False`: does not look at the few-shot set, and is run once.
        any_classes (`bool`, *optional*, defaults to `True`): whether it scores other classes than it has learned.
        sees_images (`bool`, *optional*, defaults to `False`): whether it changes the image tower, and so learns from
            images instead of embeddings, and scores them.
        knowledge (`tuple[str, ...]`, *optional*): what it takes beside class names, template and shots: `"templates"`
            (further ones), `"sentences"` (of a language model), `"unlabelled"` (training images), `"test views"` (of
            each test image alone). In a comparison it gets nothing that does not stand here.
        chooses (`bool`, *optional*, defaults to `False`): whether it chooses on validation images.
    """

    title: str
    fit: Callable
    learns: bool = True
    any_classes: bool = True
    sees_images: bool = False
    knowledge: tuple[str, ...] = ()
    chooses: bool = False


def _holding(predict: Predictor, values: int, sees_images: bool = False) -> Predictor:
    """A function that knows how many values its method has learned, and whether it takes images."""
    predict.learned_values, predict.sees_images = values, sees_images  # type: ignore[attr-defined]
    return predict


def _for_its_classes(predict: Predictor, shots: FewShot, what: str) -> Predictor:
    """A function that refuses other classes than its method was fitted on."""

    def predict_own(image_embeds: torch.Tensor, names: list[str]) -> torch.Tensor:
        if list(names) != list(shots.class_names):
            raise ValueError(f"a {what} scores the classes that it was fitted on, and no others.")
        return predict(image_embeds, names)

    return predict_own


def _batches(images: Any, device: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of an image tower, `BATCH_SIZE` images at a time."""
    for start in range(0, len(images), BATCH_SIZE):
        inputs = collate([images[row] for row in range(start, min(start + BATCH_SIZE, len(images)))])
        yield {name: value.to(device) for name, value in inputs.items() if name != "labels"}


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
    cupl = options.cupl
    return _from_texts(model, lambda names: cupl_class_embeddings(model, None, names, cupl, too_long="truncate"))


def _fit_probe(model: CoOpModel, shots: FewShot, options: Options) -> Predictor:
    train, val = (shots.image_embeds, shots.labels), (shots.val_embeds, shots.val_labels)
    more: dict[str, Any] = {"class_names": shots.class_names}
    if options.validation == "none":  # a fixed strength; what it is then measured on chooses nothing
        val, more = train, {**more, "coarse": [PROBE_C], "num_steps": 0}
    probe = fit_linear_probe(*train, *val, **more)
    predict = _for_its_classes(lambda image_embeds, _: probe.logits(image_embeds), shots, "linear probe")
    return _holding(predict, probe.weight.numel() + probe.bias.numel())


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
    predict = _from_texts(model, lambda names: class_embeddings(model, None, names, prompt.template))
    return _holding(predict, 0)  # words, no values


def _make_student(
    model: CoOpModel, shots: FewShot, options: Options, method: str = "coop", objective: str | None = None,
    **fields: Any,
) -> CoOpModel:  # fmt: skip
    family = model.family
    num_layers = min(len(family.text_layers), len(family.vision_layers))
    shared = {"template": options.template, "class_names": shots.class_names}
    config = make_config(method, objective, fields, model.tokenizer, num_layers, options.words, **shared)
    set_seed(shots.seed)
    return CoOpModel(model.get_base_model(), config, processor=model.processor)


def _train(
    model: CoOpModel, shots: FewShot, options: Options, method: str = "coop", objective: str | None = None,
    **fields: Any,
) -> CoOpModel:  # fmt: skip
    """A model with an adapter of the method, trained on the shots by the recipe."""
    student = _make_student(model, shots, options, method, objective, **fields)
    columns: dict[str, Any] = {}
    train: Any = EmbeddedImages(shots.image_embeds, shots.labels.tolist())
    if options.recipe != "fast" or student.adapter.prompts_image_tower:  # augmented views need the images, too
        train = shots.images
        columns = {"image_column": shots.columns[0], "label_column": shots.columns[1]}
    with tempfile.TemporaryDirectory() as folder:
        args = CoOpTrainingArguments(
            folder,
            recipe=options.recipe,
            objective=objective,
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
    """Scores with a model: embeddings, or the images themselves."""
    student.eval()
    sees_images = student.adapter.prompts_image_tower

    @torch.no_grad()
    def predict(images: Any, names: list[str]) -> torch.Tensor:
        if list(names) != student.class_names:
            student.set_class_names(list(names))
        if sees_images:
            inputs: Any = _batches(images, student.device)
        else:
            parts = images.split(BATCH_SIZE) if student.adapter.reads_image else [images]
            inputs = ({"image_embeds": part} for part in parts)
        return torch.cat([student(**batch).logits for batch in inputs])

    return _holding(predict, sum(value.numel() for value in student.adapter.learned_state().values()), sees_images)


def _fit_learner(model: CoOpModel, shots: FewShot, options: Options, **arguments: Any) -> Predictor:
    return _predict_with(_train(model, shots, options, **arguments))


def learner(
    title: str, method: str = "coop", objective: str | None = None, knowledge: tuple[str, ...] = (), **fields: Any
) -> Method:
    """A method of prompt learning, started as in its official code.

    Args:
        title (`str`): its name in tables.
        method (`str`, *optional*, defaults to `"coop"`): what is learned, see `coop_hf.adapters`.
        objective (`str`, *optional*, defaults to the method's own): what is lowered.
        knowledge (`tuple[str, ...]`, *optional*): see [`Method`].
        fields: of the method's configuration: `n_ctx`, `class_specific`, `depth` ...
    """
    check_fields(method, fields)
    fit = functools.partial(_fit_learner, method=method, objective=objective, **fields)
    any_classes = not fields.get("class_specific", False)
    sees_images = get_adapter_class(method).prompts_image_tower
    return Method(title, fit, any_classes=any_classes, sees_images=sees_images, knowledge=knowledge)


def coop_method(title: str, **config: Any) -> Method:
    """CoOp with a configuration.

    Args:
        title (`str`): its name in tables.
        config: fields of `CoOpConfig`: `n_ctx`, `class_token_position`, `class_specific`, `ctx_init`.
    """
    return learner(title, **config)


def _fit_head(model: CoOpModel, shots: FewShot, options: Options, method: str) -> Predictor:
    """By its published recipe on the plain views, whatever the recipe of the prompts."""
    student = _make_student(model, shots, options, method)
    val = (shots.val_embeds, shots.val_labels) if options.validation == "few" and len(shots.val_labels) else ()
    fit_head(student, shots.image_embeds, shots.labels, None, *val, seed=shots.seed)
    predict = _predict_with(student)
    return _holding(_for_its_classes(predict, shots, "head"), predict.learned_values)  # type: ignore[attr-defined]


def _fit_tpt(model: CoOpModel, shots: FewShot | None, options: Options) -> Predictor:
    """Zero-shot, but for each image a context that starts from the words and is tuned on its views."""

    def predict(images: Any, names: list[str]) -> torch.Tensor:
        config = CoOpConfig(template=options.template)
        student = CoOpModel(model.get_base_model(), config, names, model.processor)
        with student.disable_adapter():
            return tpt(student, _Decoded(images), ctx_init=options.words).logits

    return _holding(predict, 0, sees_images=True)


class _Decoded:
    """The images themselves of [`LabelledImages`], or of a part of them."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> PIL.Image.Image:
        images: Any = self.images
        while isinstance(images, Subset):
            images, index = images.dataset, images.indices[index]
        return images.image(index)


def head(title: str, method: str) -> Method:
    """A head on image features, see `coop_hf.adapters.heads`."""
    fit = functools.partial(_fit_head, method=method)
    return Method(title, fit, any_classes=False, chooses=method in ("tip_adapter", "tip_adapter_f", "gda"))


def _fit_clip_lora(model: CoOpModel, shots: FewShot, options: Options) -> Predictor:
    """500 steps for each shot by the paper's recipe; by the fast one its usual number, 200."""
    assert shots.images is not None
    images = LabelledImages(
        shots.images, model.image_processor, *shots.columns, shots.class_names, seed=shots.seed, augment=True
    )
    steps = 500 * shots.shots if options.recipe == "paper" else RECIPES["fast"]["max_steps"]
    base = fit_clip_lora(model, images, options.template, steps, seed=shots.seed)

    def predict(images: Any, names: list[str]) -> torch.Tensor:
        embeds = class_embeddings(base, model.tokenizer, names, options.template)
        return torch.cat([zero_shot_logits(base, embeds, **inputs) for inputs in _batches(images, model.device)])

    lora = sum(value.numel() for name, value in base.named_parameters() if "lora_" in name)
    return _holding(predict, lora, sees_images=True)


def _fit_pet(model: CoOpModel, shots: FewShot, options: Options) -> Predictor:
    """Teachers: the prompt ensemble, CuPL if there is a file, and a context learned on the labelled images.

    The temperature was chosen on the validation part of the emoji.
    """
    learned = _train(model, shots, options, n_ctx=16)
    if len(shots.unlabelled_embeds) == 0:
        return _predict_with(learned)
    teachers: list[Any] = [list(options.ensemble)]
    if options.cupl is not None:
        teachers.append(cupl_class_embeddings(model, None, shots.class_names, options.cupl, too_long="truncate"))
    with torch.no_grad():
        teachers.append(learned.get_text_features())
    student = _make_student(model, shots, options, n_ctx=16)
    fit_pet(student, teachers, shots.image_embeds, shots.labels, shots.unlabelled_embeds, temperature=1.0)
    return _predict_with(student)


METHODS = {
    "zero_shot": Method("zero-shot CLIP", _fit_template, learns=False),
    "ensemble": Method("prompt ensemble", _fit_ensemble, learns=False, knowledge=("templates",)),
    "cupl": Method("CuPL", _fit_cupl, learns=False, knowledge=("sentences",)),
    "linear_probe": Method("linear probe", _fit_probe, any_classes=False, chooses=True),
    "autoprompt": Method("AutoPrompt from the template", _fit_autoprompt),
    "pet": Method("PET, student M=16", _fit_pet, knowledge=("templates", "sentences", "unlabelled")),
    "coop": coop_method("CoOp M=16", n_ctx=16),
    "coop_m4": coop_method("CoOp M=4", n_ctx=4),
    "coop_csc": coop_method("CoOp M=4, class-specific", n_ctx=4, class_specific=True),
    "cocoop": learner("CoCoOp", "cocoop"),
    "kgcoop": learner("KgCoOp", "coop", "kgcoop"),
    "prograd": learner("ProGrad", "coop", "prograd"),
    "tcp": learner("TCP", "tcp"),
    "deep_text": learner("deep text prompts", "deep_text"),
    "tpt": Method("TPT", _fit_tpt, learns=False, sees_images=True, knowledge=("test views",)),
    "tip_adapter": head("Tip-Adapter", "tip_adapter"),
    "tip_adapter_f": head("Tip-Adapter-F", "tip_adapter_f"),
    "taskres": head("TaskRes", "taskres"),
    "clip_adapter": head("CLIP-Adapter", "clip_adapter"),
    "zs_lp": head("ZS-LP", "zs_lp"),
    "clap": head("CLAP", "clap"),
    "lp_plus_plus": head("LP++", "lp_plus_plus"),
    "gda": head("GDA", "gda"),
    "vpt": learner("VPT", "vpt"),
    "ivlp": learner("IVLP", "ivlp"),
    "maple": learner("MaPLe", "maple"),
    "clip_lora": Method("CLIP-LoRA", _fit_clip_lora, sees_images=True),
    "promptsrc": learner("PromptSRC", "ivlp", "promptsrc", knowledge=("templates",)),
}

# What the commands run where nothing else is named: minutes on a CPU.
USUAL_METHODS = ("zero_shot", "ensemble", "cupl", "linear_probe", "autoprompt", "pet", "coop", "coop_m4", "coop_csc")

# One change at a time; `words` stands for the hand-written template up to the class name.
ABLATIONS: dict[str, dict[str, Any]] = {
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
        found: dict[str, Any] = look_up(ABLATIONS, name, "ablation")
        config = dict(found)
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

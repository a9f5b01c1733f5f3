"""Zero-shot CLIP and prompt ensembling: class embeddings from hand-written templates, nothing learned.

For class c with the texts t of its templates and the text tower g,

    w_c = normalise( mean over t of normalise(g(t)) ),    logits = exp(logit_scale) · cos(image, w_c)

as in CLIP (https://arxiv.org/abs/2103.00020, section 3.1.4); one template makes it plain zero-shot CLIP.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..checks import check_class_names, check_counts
from ..core.class_prompts import ClassPrompts
from ..core.families import Family, get_family
from ..core.layout import fill_template, tokenize_texts


__all__ = [
    "HAND_TEMPLATES",
    "IMAGENET_7_TEMPLATES",
    "IMAGENET_80_TEMPLATES",
    "class_embeddings",
    "encode_texts",
    "mean_text_embeddings",
    "zero_shot_logits",
]

_TEXTS = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))

# CoOp's hand-written template of each data set, under the names that its configuration files use.
HAND_TEMPLATES: dict[str, str] = _TEXTS["hand_templates"]

# CLIP's eighty ImageNet templates ("itap": I took an image), and its subset of seven, found by forward selection over
# the eighty for the largest models.
IMAGENET_80_TEMPLATES: tuple[str, ...] = tuple(_TEXTS["imagenet_80"])
IMAGENET_7_TEMPLATES: tuple[str, ...] = tuple(_TEXTS["imagenet_7"])


def family_of(model: Any) -> Family:
    """The family of the base model, of a `CoOpModel` or of the base model itself."""
    return model.family if hasattr(model, "family") else get_family(model)


def get_tokenizer(model: Any, tokenizer: Any) -> Any:
    """The tokenizer: as given, or that of a processor; `None` takes the `CoOpModel`'s own."""
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(tokenizer):
        raise TypeError(
            f"`tokenizer` must be the base model's tokenizer or processor, got {type(tokenizer).__name__}. Load it "
            "with `AutoTokenizer.from_pretrained(...)`; only a CoOpModel brings its own."
        )
    return tokenizer


@torch.no_grad()
def encode_texts(
    model: Any, tokenizer: Any, texts: list[str], batch_size: int = 256, truncate: bool = False
) -> torch.Tensor:
    """Embeddings of finished texts.

    Args:
        model (`CoOpModel` or `PreTrainedModel`): whose text tower.
        tokenizer (`PreTrainedTokenizerBase` or `CLIPProcessor`): the base's; `None` with a `CoOpModel` takes its own.
        texts (`list[str]`): any number; memory grows with `batch_size` alone.
        batch_size (`int`, *optional*, defaults to 256): texts that go through the tower at a time.
        truncate (`bool`, *optional*, defaults to `False`): cut the tokens of texts that are too long for the tower, as
            `clip.tokenize(..., truncate=True)`, instead of raising.

    Returns:
        `torch.Tensor` `(len(texts), projection_dim)`, fp32, normalised, on the text tower's device.

    Raises:
        ValueError: no texts, or a text that has more tokens than the tower has positions; names it.
    """
    family, tokenizer = family_of(model), get_tokenizer(model, tokenizer)
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"`texts` must be a list of at least one string, got {texts!r}.")
    check_counts(batch_size=batch_size)
    base = family.base_model
    was_training = base.training
    base.eval()
    try:
        batches = []
        for start in range(0, len(texts), batch_size):
            # A layout of its own for each batch: what the fast pass keeps for later steps is of no use here.
            batch = list(texts[start : start + batch_size])
            layout = tokenize_texts(tokenizer, batch, family.max_positions, truncate)
            batches.append(F.normalize(ClassPrompts(family, layout).features(None).float(), dim=-1))
    finally:
        base.train(was_training)
    return torch.cat(batches)


def mean_text_embeddings(
    model: Any, tokenizer: Any, texts: list[list[str]], batch_size: int = 256, truncate: bool = False
) -> torch.Tensor:
    """For each class the mean of the normalised embeddings of its texts, not normalised again.

    Args:
        model (`CoOpModel` or `PreTrainedModel`): whose text tower.
        tokenizer (`PreTrainedTokenizerBase` or `CLIPProcessor`): the base's; `None` with a `CoOpModel` takes its own.
        texts (`list[list[str]]`): for each class its texts, at least one; classes may have different numbers.
        batch_size (`int`, *optional*, defaults to 256): texts that go through the tower at a time.
        truncate (`bool`, *optional*, defaults to `False`): see [`encode_texts`].

    Returns:
        `torch.Tensor` `(num_classes, projection_dim)`, fp32.
    """
    empty = [index for index, own in enumerate(texts) if not own]
    if len(texts) == 0 or empty:
        raise ValueError(f"every class needs at least one text; class {empty[0] if empty else 0} has none.")
    flat = [(text, index) for index, own in enumerate(texts) for text in own]
    counts = torch.tensor([len(own) for own in texts])
    sums: torch.Tensor | None = None
    for start in range(0, len(flat), batch_size):
        batch = flat[start : start + batch_size]
        embeds = encode_texts(model, tokenizer, [text for text, _ in batch], batch_size, truncate)
        if sums is None:
            sums = embeds.new_zeros(len(texts), embeds.shape[1])
        sums.index_add_(0, torch.tensor([index for _, index in batch], device=embeds.device), embeds)
    assert sums is not None
    return sums / counts.to(sums.device)[:, None]


def class_embeddings(
    model: Any, tokenizer: Any, class_names: list[str], templates: str | Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """Class embeddings from hand-written templates, averaged as CLIP does.

    Args:
        model (`CoOpModel` or `PreTrainedModel`): whose text tower; nothing in it is changed.
        tokenizer (`PreTrainedTokenizerBase` or `CLIPProcessor`): the base's; `None` with a `CoOpModel` takes its own.
        class_names (`list[str]`): class names; underscores become spaces.
        templates (`str` or `list[str]`): templates with `{}` once in each, such as `HAND_TEMPLATES["OxfordPets"]` or
            `IMAGENET_80_TEMPLATES`.
        batch_size (`int`, *optional*, defaults to 256): texts that go through the tower at a time; bounds memory.

    Returns:
        `torch.Tensor` `(num_classes, projection_dim)`, fp32, normalised.

    Raises:
        ValueError: bad class names, a template without `{}`, or a text longer than the tower's positions.

    Example:

    ```python
    >>> class_embeds = class_embeddings(base, tokenizer, ["cat", "dog"], IMAGENET_7_TEMPLATES)
    >>> zero_shot_logits(base, class_embeds, pixel_values=pixel_values).argmax(dim=-1)
    ```
    """
    class_names = check_class_names(class_names)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ValueError('`templates` is empty: pass at least one, such as "a photo of a {}.".')
    by_template = [fill_template(template, class_names) for template in templates]
    texts = [list(own) for own in zip(*by_template)]
    return F.normalize(mean_text_embeddings(model, tokenizer, texts, batch_size), dim=-1)


@torch.no_grad()
def zero_shot_logits(
    model: Any,
    class_embeds: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    **image_inputs: torch.Tensor,
) -> torch.Tensor:
    """Scores images against class embeddings, wherever these come from.

    Args:
        model (`CoOpModel` or `PreTrainedModel`): gives the logit scale and, for `pixel_values`, the image tower.
        class_embeds (`torch.Tensor`): `(num_classes, projection_dim)`, as from [`class_embeddings`].
        pixel_values (`torch.Tensor`, *optional*): `(batch, 3, height, width)`, as the image processor gives them.
        image_embeds (`torch.Tensor`, *optional*): `(batch, projection_dim)`, cached image features, normalised or not;
            instead of `pixel_values`.

    Returns:
        `torch.Tensor` `(batch, num_classes)`, fp32: the scaled cosine, plus the bias if the base has one.
    """
    family = family_of(model)
    if (pixel_values is None) == (image_embeds is None):
        given = "neither" if pixel_values is None else "both"
        raise ValueError(f"pass either `pixel_values` or `image_embeds`; got {given}.")
    if pixel_values is not None:
        image_embeds = family.image_features(pixel_values, None, **image_inputs)
    assert image_embeds is not None
    if image_embeds.shape[-1] != class_embeds.shape[-1]:
        raise ValueError(
            f"the image features have {image_embeds.shape[-1]} dimensions and the class embeddings "
            f"{class_embeds.shape[-1]}: both must come from the same model's projections."
        )
    image_embeds = F.normalize(image_embeds.to(class_embeds.device).float(), dim=-1)
    logits = family.logit_scale.to(class_embeds.device) * image_embeds @ F.normalize(class_embeds.float(), dim=-1).T
    return logits if family.logit_bias is None else logits + family.logit_bias.to(logits.device)

"""Out of coop_hf: a learned prompt as a stock `CLIPModel` and `CLIPProcessor`, for transformers alone.

The context vectors become rows of the token embedding, and each row gets a token of its own, such as `<coop_1>`. A
prompt then is a text like any other:

    end      <coop_1> ... <coop_M> {}.
    middle   <coop_1> ... <coop_⌊M/2⌋> {} <coop_⌊M/2⌋+1> ... <coop_M>.
    front    {} <coop_1> ... <coop_M>.

With a class-specific context, class c has the tokens `<coop_c_1>` ..., and each candidate label is a whole prompt.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken

from ..checks import clean_class_name
from ..core.class_prompts import ClassPrompts
from ..core.families import get_family
from ..core.layout import frame, split_context


__all__ = ["merge_and_unload"]


@torch.no_grad()
def merge_and_unload(model: Any) -> tuple[Any, Any]:
    """The active adapter and its base as one stock model, which transformers saves, loads and runs by itself.

    The base model and its processor are copied, not changed. The copy's `config.coop_hf` (saved with it) says how to
    ask for the learned prompts:

    - `hypothesis_template` (`str`): for the zero-shot image classification pipeline;
    - `candidate_labels` (`list[str]`, or `None` for a unified context without class names): what goes with it. For a
      unified context the class names, underscores as spaces; any other names work too. For a class-specific context
      the whole prompt of each class, and the template is `"{}"`;
    - `class_names` (`list[str]` or `None`): the names, in the same order.

    Args:
        model (`CoOpModel`): the model.

    Returns:
        a model of the base's class, such as `CLIPModel`, and its processor (the tokenizer alone, if the model was made
        with a tokenizer alone).

    Raises:
        ValueError: a prompt that the new tokenizer would read in another way, which says which class; or an
            adapter of another method than CoOp.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> clip, processor = merge_and_unload(model)
    >>> clip.save_pretrained("merged"), processor.save_pretrained("merged")
    >>> prompt = clip.config.coop_hf
    >>> classifier = pipeline("zero-shot-image-classification", model="merged")
    >>> classifier(
    ...     image,
    ...     candidate_labels=prompt["candidate_labels"],
    ...     hypothesis_template=prompt["hypothesis_template"],
    ... )
    ```
    """
    view = model.view()
    adapter, config = view.adapter, view.adapter.config
    if adapter.method != "coop":
        raise ValueError(
            f"an adapter of the method {adapter.method!r} is more than words in a prompt, so no stock model can "
            "hold it: save the adapter, or export its classes with `as_image_classifier`."
        )
    processor = copy.deepcopy(model.processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    classes, context = snapshot(view)
    class_names = None if classes is None else list(classes.class_names)
    names = [clean_class_name(name) for name in class_names or []]
    num_contexts = len(names) if config.class_specific else 1

    prefix = unused_prefix(tokenizer)
    if config.class_specific:
        tokens = [[f"<{prefix}_{c + 1}_{k + 1}>" for k in range(config.n_ctx)] for c in range(num_contexts)]
    else:
        tokens = [[f"<{prefix}_{k + 1}>" for k in range(config.n_ctx)]]
    flat = [token for row in tokens for token in row]
    # Spaces before a token are swallowed (one behind it may belong to the word that follows), and it is found in the
    # text as written, before lower-casing.
    tokenizer.add_tokens([AddedToken(token, lstrip=True, normalized=False) for token in flat])
    ids = tokenizer.convert_tokens_to_ids(flat)

    merged = _copy_with_rows(model.base_model, ids, context.flatten(0, -2))
    if model.family.is_causal:
        # With eos_token_id == 2, which the configurations of OpenAI's CLIP have, transformers pools at the largest id
        # of each row: EOS, as long as no token is added behind it. Any other value is looked for itself.
        merged.config.text_config.eos_token_id = merged.text_model.eos_token_id = frame(tokenizer)[1][-1]

    templates = [prompt_template(row, config.class_token_position) for row in tokens]
    if config.class_specific:
        template, labels = "{}", [t.format(name) for t, name in zip(templates, names)]
    else:
        template, labels = templates[0], names
    if classes is not None:
        check_tokens(tokenizer, classes, template, labels, ids, config.class_specific)
    merged.config.coop_hf = {
        "hypothesis_template": template,
        "candidate_labels": labels or None,
        "class_names": class_names,
    }
    return merged, processor


def prompt_template(tokens: list[str], class_token_position: str) -> str:
    first = split_context(class_token_position, len(tokens))
    return " ".join([*tokens[:first], "{}", *tokens[first:]]) + "."


def unused_prefix(tokenizer: Any) -> str:
    """A beginning of token names that the vocabulary does not hold. Class names have no underscores, so never do."""
    vocabulary, prefix, number = list(tokenizer.get_vocab()), "coop", 1
    while any(token.startswith(f"<{prefix}_") for token in vocabulary):
        number += 1
        prefix = f"coop{number}"
    return prefix


def _copy_with_rows(base: Any, ids: list[int], vectors: Tensor) -> Any:
    """A copy of the base, LoRA merged in, whose token embedding holds `vectors` at `ids`."""
    merged = copy.deepcopy(base)
    if hasattr(merged, "peft_config") and hasattr(merged, "merge_and_unload"):
        merged = merged.merge_and_unload()
    family = get_family(merged)
    old = family.token_embedding.weight
    rows = max(old.shape[0], max(ids) + 1)
    weight = old.new_zeros(rows, old.shape[1])
    weight[: old.shape[0]] = old
    weight[torch.tensor(ids, device=old.device)] = vectors.to(old.device, old.dtype)
    padding = family.token_embedding.padding_idx
    new = nn.Embedding(rows, old.shape[1], padding_idx=padding, device=old.device, dtype=old.dtype)
    new.weight = nn.Parameter(weight, requires_grad=False)
    setattr(family.text_embeddings, family.token_embedding_name, new)
    merged.config.text_config.vocab_size = rows
    return merged


def snapshot(view: Any) -> tuple[ClassPrompts | None, Tensor]:
    """The classes and a copy of the context that belong together, whatever other threads do meanwhile."""
    while True:
        classes, context = view.classes, view.adapter.context.detach().clone()
        if view.is_current:
            return classes, context
        view.read()


def check_tokens(
    tokenizer: Any,
    classes: ClassPrompts,
    template: str,
    labels: list[str],
    ids: list[int],
    class_specific: bool = False,
) -> None:
    """Raises `ValueError` unless a new tokenizer turns each prompt into the tokens that the adapter was learned on.

    Args:
        tokenizer: the new tokenizer.
        classes (`ClassPrompts`): the classes, in the tokens of the old one.
        template (`str`), labels (`list[str]`): each prompt is the template with a label.
        ids (`list[int]`): of the tokens that stand for the context vectors.
        class_specific (`bool`, *optional*, defaults to `False`): whether each class has vectors of its own.
    """
    layout, n_ctx = classes.layout, classes.layout.n_ctx
    encoded = tokenizer([template.format(label) for label in labels])["input_ids"]
    for c, (row, found) in enumerate(zip(layout.tokens, encoded)):
        own = ids[c * n_ctx : (c + 1) * n_ctx] if class_specific else ids
        expected = [own[-1 - token] if token < 0 else token for token in row]
        if list(found) != expected:
            raise ValueError(
                f"cannot merge: as text, the prompt of the class {classes.class_names[c]!r} is another; the tokenizer "
                f"reads {template.format(labels[c])!r} as {list(found)}, and the adapter stands for {expected}. "
                "Give the class another name."
            )

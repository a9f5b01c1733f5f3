"""Out of coop_hf: a unified context as PEFT's own `TRAINABLE_TOKENS` adapter, which PEFT loads by itself.

The context vectors take the place of vocabulary entries that no text can reach: capital letters, where the tokenizer
lower-cases, and bytes that UTF-8 has not. So the stock base keeps its size, EOS keeps the highest id, and nothing but
the adapter and its tokenizer is needed:

    processor = AutoProcessor.from_pretrained(folder)
    clip = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder)
    clip(**processor(text=["<coop_1> <coop_2> cat."], images=image, return_tensors="pt"))
"""

import copy
import json
import os
import tempfile
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from ..checks import clean_class_name
from .merging import check_tokens, prompt_template, snapshot, unused_prefix


__all__ = ["export_peft", "name_free_entries"]

PROMPT_NAME = "prompt.json"

# Bytes that no UTF-8 text holds.
_IMPOSSIBLE = [0xC0, 0xC1, *range(0xF5, 0x100)]

_CAPITALS = range(ord("A"), ord("Z") + 1)


@torch.no_grad()
def export_peft(model: Any, folder: str | os.PathLike) -> dict[str, Any]:
    """Writes the active adapter as an adapter of PEFT, with the processor that knows its tokens.

    The folder holds `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, the processor, a
    `README.md` with the code that loads them, and `prompt.json`: what to ask for.

    Args:
        model (`CoOpModel`): a CLIP model; its active adapter must be a unified context of `CoOpConfig`.
        folder (`str` or `os.PathLike`): where to; made if missing, refused if it holds files.

    Returns:
        `dict`, as in `prompt.json`: `hypothesis_template` (`str`), `candidate_labels` (`list[str]` or `None`) and
        `class_names`, as `merge_and_unload` has them in `config.coop_hf`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: another method, a class-specific context, a base that is not CLIP's or that PEFT has wrapped, more
            vectors than free entries, or a prompt that the tokenizer would read in another way.
        FileExistsError: the folder is not empty.
    """
    try:
        import peft
    except ImportError:
        raise ImportError("writing an adapter of PEFT needs the package peft: `pip install coop_hf[peft]`.") from None
    folder = os.fspath(folder)
    view = model.view()
    adapter, config = view.adapter, view.adapter.config
    _check(model, adapter)
    if os.path.isfile(folder) or (os.path.isdir(folder) and os.listdir(folder)):
        raise FileExistsError(f"{folder!r} is there already and not empty: name a new folder.")
    classes, context = snapshot(view)
    names = [] if classes is None else list(classes.class_names)
    prefix = unused_prefix(model.tokenizer)
    tokens = [f"<{prefix}_{k + 1}>" for k in range(len(context))]
    template = prompt_template(tokens, config.class_token_position)
    labels = [clean_class_name(name) for name in names]

    with tempfile.TemporaryDirectory(prefix="coop_hf_peft_") as staging:
        model.processor.save_pretrained(staging)
        ids = name_free_entries(os.path.join(staging, "tokenizer.json"), tokens)
        tokenizer = AutoTokenizer.from_pretrained(staging)
        if classes is not None:
            check_tokens(tokenizer, classes, template, labels, ids)
        wrapped = _wrap(peft, model, ids, context)
        wrapped.save_pretrained(staging, save_embedding_layers=False)
        prompt = {"hypothesis_template": template, "candidate_labels": labels or None, "class_names": names or None}
        with open(os.path.join(staging, PROMPT_NAME), "w", encoding="utf-8") as file:
            json.dump(prompt, file, indent=2, ensure_ascii=False)
        _write_card(os.path.join(staging, "README.md"), model, prompt)
        os.makedirs(folder, exist_ok=True)
        for name in sorted(os.listdir(staging)):
            with open(os.path.join(staging, name), "rb") as source, open(os.path.join(folder, name), "wb") as target:
                target.write(source.read())
    return prompt


def _check(model: Any, adapter: Any) -> None:
    if adapter.method != "coop" or adapter.config.class_specific:
        what = (
            "a class-specific context" if adapter.method == "coop" else f"an adapter of the method {adapter.method!r}"
        )
        raise ValueError(
            f"{what} is more than a few words, and PEFT's TRAINABLE_TOKENS holds words: export the classes with "
            "`as_image_classifier`, or learn a unified context (CoOpConfig)."
        )
    if hasattr(model.base_model, "peft_config"):
        raise ValueError("PEFT has wrapped this base already: use `merge_and_unload`, which merges both.")
    if model.family.model_type != "clip":
        raise ValueError(
            f"only CLIPModel is exported to PEFT, and the base is a {model.family.model_class}: use "
            "`merge_and_unload`."
        )


def name_free_entries(path: str | os.PathLike, tokens: list[str]) -> list[int]:
    """Gives entries of a tokenizer's vocabulary that no text reaches new names, as tokens that stand for themselves.

    Args:
        path (`str` or `os.PathLike`): a `tokenizer.json`, which is changed.
        tokens (`list[str]`): the new names.

    Returns:
        `list[int]`: their ids, in the order of `tokens`.

    Raises:
        ValueError: not a byte-level BPE, or not as many such entries.
    """
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    kind, vocabulary = values["model"]["type"], values["model"].get("vocab")
    if kind != "BPE" or not isinstance(vocabulary, dict):
        raise ValueError(f"the tokenizer is no byte-level BPE as CLIP's ({kind}): use `merge_and_unload`.")
    parts = {
        part for merge in values["model"]["merges"] for part in (merge.split() if isinstance(merge, str) else merge)
    }
    lowers = "Lowercase" in json.dumps(values.get("normalizer"))
    characters = [chr(code) for code in [*(_CAPITALS if lowers else ()), *_IMPOSSIBLE]]
    free = [name for c in characters for name in (c, f"{c}</w>") if name in vocabulary and not {name, c} & parts]
    if len(free) < len(tokens):
        raise ValueError(
            f"the context has {len(tokens)} vectors, and the tokenizer {len(free)} entries that no text reaches: use "
            "`merge_and_unload`, which adds new ones."
        )
    ids = [vocabulary.pop(name) for name in free[: len(tokens)]]
    vocabulary.update(zip(tokens, ids))
    values["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
    # Spaces before a token are swallowed, and it is found in the text as written, before lower-casing.
    shape = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
    values["added_tokens"] += [{"id": i, "content": token, **shape} for i, token in zip(ids, tokens)]
    values["added_tokens"].sort(key=lambda entry: entry["id"])
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, ensure_ascii=False)
    return ids


def _wrap(peft: Any, model: Any, ids: list[int], context: torch.Tensor) -> Any:
    """A copy of the base in PEFT's hands, with the vectors at their ids."""
    options = peft.TrainableTokensConfig(
        token_indices=ids,
        target_modules=["token_embedding"],
        inference_mode=True,
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model.base_model), options)
    options.base_model_name_or_path = model.config.base_model_name_or_path  # which PEFT takes off the model's name
    options.revision = model.config.revision
    layer = wrapped.base_model.model.text_model.embeddings.token_embedding
    delta = layer.trainable_tokens_delta["default"]
    delta.data.copy_(context.to(delta.device, delta.dtype))
    return wrapped


def _write_card(path: str, model: Any, prompt: dict[str, Any]) -> None:
    base = model.config.base_model_name_or_path
    name = json.dumps(base if base and not os.path.isdir(base) else "path/to/the/base/model")
    label = (prompt["candidate_labels"] or ["cat"])[0]
    text = (
        "---\nlibrary_name: peft\ntags:\n- clip\n- coop\n- prompt-learning\n---\n\n"
        "A learned prompt ([CoOp](https://arxiv.org/abs/2109.01134)) as an adapter of PEFT, exported with coop_hf. It "
        f"is a part of texts: write `{prompt['hypothesis_template']}` with a class name in place of the braces.\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoProcessor, CLIPModel\n\n"
        'folder = "path/to/this/folder"\nprocessor = AutoProcessor.from_pretrained(folder)\n'
        f"clip = PeftModel.from_pretrained(CLIPModel.from_pretrained({name}), folder).eval()\n"
        f"texts = [{json.dumps(prompt['hypothesis_template'].format(label), ensure_ascii=False)}]\n"
        'inputs = processor(text=texts, images=image, padding=True, return_tensors="pt")\n'
        "clip(**inputs).logits_per_image\n```\n"
    )
    ModelCard(text).save(path)

"""From a checkpoint of the public code, once it is read, to an adapter: checked against its base, with class names."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_class_names, clean_class_name
from ..config import CONFIGS, PromptConfig
from ..core.layout import encode_words, special_token_ids


__all__ = ["checkpoint_to_adapter"]

# Words round the class name that the public code leaves in the prompts.
_START = "a photo of a"
_TCP_WORDS = ("person doing",)
_TCP_ENDINGS = (" texture.", *(f", a type of {what}." for what in ("pet", "flower", "aircraft", "food")))
_TCP_ENDINGS += (", a type of car",)


def checkpoint_to_adapter(
    checkpoint: dict[str, Any],
    embedding: Tensor,
    tokenizer: Any,
    class_names: list[str] | None = None,
    class_token_position: str = "end",
    check_base: bool = True,
    template: str | None = None,
    positions: Tensor | None = None,
) -> tuple[PromptConfig, dict[str, Tensor]]:
    """What [`read_coop_checkpoint`] gives, as [`read_adapter`] gives an adapter.

    The checkpoint holds neither the names of its classes nor the class token's position, so both are given here. What
    it does hold, the embeddings of SOS and of the class names, is compared with the base's; words that the public code
    leaves in the prompts beside the class name (MaPLe's "of a", TCP's ", a type of pet") are read off them.

    Args:
        checkpoint (`dict`): from [`read_coop_checkpoint`].
        embedding (`torch.Tensor`): `(vocabulary, dim)`, the base's token embeddings.
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        class_names (`list[str]`, *optional*): the classes, in the order of the labels. For a unified context any
            list. Without it, the names are read off the checkpoint's embeddings, in lower case.
        class_token_position (`str`, *optional*, defaults to `"end"`): `TRAINER.COOP.CLASS_TOKEN_POSITION` of the
            training: `"end"`, `"middle"` or `"front"`. Other methods than CoOp have the end alone.
        check_base (`bool`, *optional*, defaults to `True`): whether a base with other token embeddings is refused.
        template (`str`, *optional*, defaults to `"a photo of a {}."`): the hand-written prompt that the training used:
            TCP's class-aware tokens come from it, and VPT's class embeddings.
        positions (`torch.Tensor`, *optional*): `(length, dim)`, the base's text position embeddings, to compare too.

    Returns:
        its configuration, which names no base, and its tensors.

    Raises:
        ValueError: the checkpoint was learned on another base, or does not go with the class names.
    """
    context, path, method = checkpoint["context"], checkpoint["path"], checkpoint["method"]
    tensors = checkpoint["tensors"]
    names = None if class_names is None else check_class_names(class_names)
    if method != "coop" and class_token_position != "end":
        raise ValueError(
            f"{path} is of the method {method!r}, whose public code has the class name at the end alone: leave "
            f"class_token_position={class_token_position!r} out."
        )
    class_specific = context is not None and context.dim() == 3
    if class_specific and names is not None and len(names) != len(context):
        raise ValueError(
            f"{path} has contexts for {len(context)} classes, and `class_names` has {len(names)}: pass the names of "
            "the classes that it was learned on, in the order of their labels."
        )
    embedding = embedding.detach()
    if context is not None and embedding.shape[1] != context.shape[-1]:
        raise ValueError(
            f"the context's vectors have {context.shape[-1]} dimensions, and the base's token embeddings have "
            f"{embedding.shape[1]}: {path} was learned on another CLIP model."
        )
    if check_base:
        _check_prefix(checkpoint, embedding, tokenizer)
        _check_positions(checkpoint, positions)
    fixed_words, ending, read = _read_prompts(checkpoint, embedding, tokenizer)
    if names is None:
        names = read
        if names is None and class_specific:
            raise ValueError(
                f"{path} is class-specific, and its class names cannot be read off it: pass `class_names=[...]`, the "
                f"{len(context)} names in the order of their labels."
            )
    elif class_specific and check_base:
        _check_names(checkpoint, names, embedding, tokenizer)
    options: dict[str, Any] = {"class_names": names, "original_crop": True}
    if template is not None:
        options["template"] = template
    if context is not None:
        options["n_ctx"] = context.shape[-2]
    if method == "coop":
        options |= {"class_token_position": class_token_position, "class_specific": class_specific}
        options["merge_full_stop"] = class_token_position != "end"  # at the end, the original's rule is ours
    if method in ("cocoop", "deep_text", "ivlp", "maple"):
        options["ctx_init"] = None  # what is learned replaces the start
    if method in ("deep_text", "ivlp", "maple", "tcp"):
        options["fixed_words"] = fixed_words
    if method == "tcp":
        options["ending"] = ending
    if "deep_text" in tensors:
        options["depth"] = len(tensors["deep_text"]) + 1
    if "visual" in tensors:
        depth, options["n_vision"] = tensors["visual"].shape[:2]
        options["depth" if method == "vpt" else "vision_depth"] = depth
    return CONFIGS[method](**options), tensors


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Whether embeddings are the same but for what fp16 and an average leave of them."""
    expected = expected.detach().float().cpu()
    return found.shape == expected.shape and torch.allclose(found.float(), expected, atol=1e-3, rtol=1e-2)


def _check_prefix(checkpoint: dict[str, Any], embedding: Tensor, tokenizer: Any) -> None:
    prefix = checkpoint["token_prefix"]
    if prefix is None or not len(prefix):
        return
    if not _is_near(prefix[0, 0], embedding[special_token_ids(tokenizer)[0]]):
        raise ValueError(
            f"{checkpoint['path']} was learned on another CLIP model: its embedding of SOS is not the base's. Pass "
            "the base that `MODEL.BACKBONE.NAME` of the training names (transformers has the ViT ones), or "
            "`check_base=False` if you know better."
        )


def _check_positions(checkpoint: dict[str, Any], expected: Tensor | None) -> None:
    found = checkpoint["positions"]
    if found is None or expected is None:
        return
    if not _is_near(found, expected):
        raise ValueError(
            f"{checkpoint['path']} was learned on another CLIP model: its text position embeddings are not the "
            "base's. Pass the base that `MODEL.BACKBONE.NAME` of the training names, or `check_base=False` if you "
            "know better."
        )


def _check_names(checkpoint: dict[str, Any], names: list[str], embedding: Tensor, tokenizer: Any) -> None:
    """Compares the tokens of each name with the embeddings that the checkpoint holds of it."""
    suffix = checkpoint["token_suffix"]
    if suffix is None:
        return
    eos = special_token_ids(tokenizer)[1]
    wrong = []
    for index, ids in enumerate(encode_words(tokenizer, [clean_class_name(name) + "." for name in names])):
        ids = [*ids, eos]
        if not _is_near(suffix[index, : len(ids)], embedding[torch.tensor(ids, device=embedding.device)]):
            wrong.append(index)
    if wrong:
        read = _read_prompts(checkpoint, embedding, tokenizer)[2]
        first = wrong[0]
        hint = f"; it was learned as {read[first]!r}" if read else ""
        raise ValueError(
            f"{len(wrong)} of {len(names)} class names are not those that {checkpoint['path']} was learned on, first "
            f"{names[first]!r} (number {first}){hint}. Check names and order, or leave `class_names` out to have them "
            "read off the checkpoint."
        )


def _read_prompts(
    checkpoint: dict[str, Any], embedding: Tensor, tokenizer: Any
) -> tuple[str | None, str, list[str] | None]:
    """Words between context and class name, what follows the name, and the class names, as far as they can be read.

    Without names, the words are those of the public configurations: what its "a photo of a" has beyond the context.
    """
    method, words, endings = checkpoint["method"], [], ["."]
    if method in ("deep_text", "ivlp", "maple"):
        ids = encode_words(tokenizer, [_START])[0][len(checkpoint["context"]) :]
        words = [tokenizer.decode(ids).strip()] if ids else []
    elif method == "tcp":
        words, endings = list(_TCP_WORDS), [*_TCP_ENDINGS, "."]
    sentences = _sentences(checkpoint, embedding, tokenizer)
    for before in [*words, None] if sentences else []:
        for ending in endings:
            names = _names_between(sentences, before, ending, tokenizer)
            if names is not None:
                return before, ending, names
    return (words[0] if words and method != "tcp" else None), ".", None


def _names_between(sentences: list[list[int]], before: str | None, ending: str, tokenizer: Any) -> list[str] | None:
    """What stands in each sentence between words and an ending, or `None` if these are not there."""
    head, tail = (tokenizer.decode(encode_words(tokenizer, [text or "."])[0]).strip() for text in (before, ending))
    head = head if before else ""
    names = []
    for text in tokenizer.batch_decode(sentences):
        text = text.strip()
        if not text.startswith(head) or not text.endswith(tail):
            return None
        names.append(text[len(head) : len(text) - len(tail)].strip())
    try:
        check_class_names(names)
    except ValueError:
        return None
    front = f"{before} " if before else ""
    again = encode_words(tokenizer, [f"{front}{name}{ending}" for name in names])
    return names if again == sentences else None


def _sentences(checkpoint: dict[str, Any], embedding: Tensor, tokenizer: Any) -> list[list[int]]:
    """The tokens of each class behind the context, up to EOS, by their embeddings; none if these are missing or not
    the base's. PromptSRC's average leaves them rounded, so what is not found exactly is looked for nearby."""
    suffix = checkpoint["token_suffix"]
    if suffix is None or not len(suffix) or checkpoint["context"] is None:
        return []
    eos = special_token_ids(tokenizer)[1]
    rows = embedding.to("cpu", suffix.dtype).float()
    ids: dict[bytes, int | None] = {row.tobytes(): i for i, row in reversed(list(enumerate(rows.numpy())))}
    sentences = []
    for vectors in suffix:
        sentence = []
        for vector in vectors.float():
            key = vector.numpy().tobytes()
            if key not in ids:
                nearest = int(torch.cdist(vector[None], rows)[0].argmin())
                ids[key] = nearest if _is_near(vector, rows[nearest]) else None
            token = ids[key]
            if token is None:
                return []
            if token == eos:
                break
            sentence.append(token)
        else:
            return []
        sentences.append(sentence)
    return sentences

"""Words to positions: where SOS, the context slots, the class tokens, "." and EOS stand in each prompt.

A prompt is a row of pieces. Which token stands before which is all that this file decides; it holds no vectors.

    end      [SOS] [V]1 ... [V]M [CLASS .] [EOS]
    middle   [SOS] [V]1 ... [V]⌊M/2⌋ [CLASS] [V]⌊M/2⌋+1 ... [V]M [.] [EOS]
    front    [SOS] [CLASS] [V]1 ... [V]M [.] [EOS]
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_class_names, clean_class_name
from .texts import is_clip_tokenizer, read_as_clip, warn_about_ftfy


__all__ = ["PromptLayout", "encode_after", "encode_words", "fill_template", "make_layout", "special_token_ids"]
__all__ += ["tokenize_texts", "warn_about_equal_prompts"]

# Marks a context slot in `PromptLayout.tokens`: slot k of the context is -1 - k. Token ids are never negative.
_SLOT = -1
_ANCHOR = "a"  # a word that any tokenizer knows, to see how a text is encoded that stands behind another


@dataclass(frozen=True)
class PromptLayout:
    """Where everything stands in the prompts of a list of classes.

    Attributes:
        tokens (`list[list[int]]`): for each class the prompt from SOS to EOS, without padding. A value of 0 or more
            is a token id; -1 - k is context slot k.
        name_lengths (`list[int]`): for each class the number of tokens of its name. At the end, where the name
            and its full stop are one piece of text, a token that covers both counts as the name's.
        n_ctx (`int`): number of context slots.
        class_token_position (`str`): `"end"`, `"middle"` or `"front"`.
        eos_token_id (`int`): id of EOS.
        pad_token_id (`int`, *optional*, defaults to that of EOS): id of the padding.
        pads_left (`bool`, *optional*, defaults to `False`): whether the tokenizer pads in front.
        masks_padding (`bool`, *optional*, defaults to `False`): whether the tokenizer gives a mask of the padding.
    """

    tokens: list[list[int]]
    name_lengths: list[int]
    n_ctx: int
    class_token_position: str
    eos_token_id: int
    pad_token_id: int | None = None
    pads_left: bool = False
    masks_padding: bool = False

    @property
    def num_classes(self) -> int:
        """How many prompts there are."""
        return len(self.tokens)

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.tokens))

    @property
    def num_shared_slots(self) -> int:
        """How many context slots stand before every class name: M at the end, ⌊M/2⌋ in the middle, 0 in front."""
        return split_context(self.class_token_position, self.n_ctx)

    def padded(self, length: int | None = None, classes: range | None = None) -> tuple[Tensor, Tensor]:
        """The prompts as one rectangle.

        Args:
            length (`int`, *optional*, defaults to the longest prompt): number of columns.
            classes (`range`, *optional*, defaults to all): which prompts.

        Returns:
            tokens `(num_classes, length)`, int64, as in `tokens` and padding behind (or before) them; and the position
            of EOS `(num_classes,)`, int64.
        """
        length = length or self.max_length
        pad = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
        own = self.tokens if classes is None else [self.tokens[c] for c in classes]
        if self.pads_left:
            return torch.tensor([[pad] * (length - len(row)) + row for row in own]), torch.full(
                (len(own),), length - 1
            )
        rows = [row + [pad] * (length - len(row)) for row in own]
        return torch.tensor(rows), torch.tensor([len(row) - 1 for row in own])


def split_context(class_token_position: str, n_ctx: int) -> int:
    """How many of `n_ctx` context tokens stand before the class name: all at the end, ⌊M/2⌋ in the middle, none in
    front."""
    return {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[class_token_position]


def encode_words(tokenizer: Any, texts: list[str], before: str = "") -> list[list[int]]:
    """Token ids of each text, without SOS and EOS; CLIP's tokenizer gets it as the public code reads it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the base model's tokenizer.
        texts (`list[str]`): the texts.
        before (`str`, *optional*, defaults to nothing): what each text is encoded behind.

    Raises:
        ValueError: a text contains one of the tokenizer's special tokens.
    """
    whole = [before + text for text in texts]
    whole = read_as_clip(whole) if is_clip_tokenizer(tokenizer) else whole
    encoded = tokenizer(whole, add_special_tokens=False)["input_ids"]
    # A word that the vocabulary lacks is not a special token that somebody wrote.
    special = set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}
    special.add(getattr(tokenizer, "eos_token_id", None))
    for text, ids in zip(texts, encoded):
        if not special.isdisjoint(ids):
            names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(special & set(ids)))
            raise ValueError(f"{text!r} contains the tokenizer's special token {names}; write it without.")
    return encoded


def encode_after(tokenizer: Any, texts: list[str], space: str = " ") -> list[list[int]]:
    """Token ids of each text as it is encoded behind another word, with `space` between them.

    CLIP's tokenizer knows no difference; those that write a space into the token that follows it do.
    """
    word = encode_words(tokenizer, [_ANCHOR])[0]
    encoded = encode_words(tokenizer, texts, _ANCHOR + space)
    if any(ids[: len(word)] != word for ids in encoded):
        return encode_words(tokenizer, texts)
    return [ids[len(word) :] for ids in encoded]


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text: SOS and EOS, CLS and SEP, or EOS alone."""
    ids = list(tokenizer("")["input_ids"])
    if not ids:
        raise ValueError(
            f"{type(tokenizer).__name__} puts 0 tokens round a text; a CLIP-like model's tokenizer ends it with EOS."
        )
    return (ids[:1], ids[1:]) if len(ids) > 1 else ([], ids)


def special_token_ids(tokenizer: Any) -> tuple[int, int]:
    """(SOS id, EOS id) of a tokenizer that puts one token before and behind a text, as CLIP's does."""
    before, behind = frame(tokenizer)
    if len(before) != 1 or len(behind) != 1:
        raise ValueError(
            f"{type(tokenizer).__name__} does not put SOS and EOS round a text, as CLIP's tokenizer does."
        )
    return before[0], behind[0]


def _padding(tokenizer: Any) -> dict[str, Any]:
    return {
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
        "pads_left": getattr(tokenizer, "padding_side", "right") == "left",
        "masks_padding": "attention_mask" in getattr(tokenizer, "model_input_names", ()),
    }


def make_layout(
    tokenizer: Any,
    class_names: list[str],
    n_ctx: int,
    class_token_position: str = "end",
    max_positions: int = 77,
    fixed_words: str | None = None,
    ending: str = ".",
    merge_full_stop: bool = False,
) -> PromptLayout:
    """Lays out the prompts of a list of classes.

    At the end, the class name and the full stop are encoded as one piece of text, as in a sentence that a person
    writes: BPE may merge the last character of the name with the full stop (")" and "." in "kite (bird)."). In the
    middle and in front they are apart, so each is encoded alone, unless `merge_full_stop` says otherwise.

    Classes with the same tokens, as those of one name, get the same prompt, and a warning.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the base model's tokenizer.
        class_names (`list[str]`): class names; underscores become spaces.
        n_ctx (`int`): number of context tokens M.
        class_token_position (`str`, *optional*, defaults to `"end"`): `"end"`, `"middle"` or `"front"`.
        max_positions (`int`, *optional*, defaults to 77): positions of the text tower.
        fixed_words (`str`, *optional*): words that stand unchanged behind the context tokens before the class name, as
            "of a" does in MaPLe's code.
        ending (`str`, *optional*, defaults to `"."`): what follows the class name.
        merge_full_stop (`bool`, *optional*, defaults to `False`): in the middle and in front, take the public code's
            rule: name and full stop are encoded together, and as many tokens as the name alone has are its own. So a
            token that covers both stands with the name, and no full stop behind the context.

    Raises:
        ValueError: a class name that the tokenizer turns into nothing, or a prompt with more than `max_positions`
            tokens; names the classes, and says by how many tokens they are too long.
    """
    class_names = check_class_names(class_names)
    before, behind = frame(tokenizer)
    slots = [_SLOT - k for k in range(n_ctx)]
    first = split_context(class_token_position, n_ctx)
    words = encode_after(tokenizer, [fixed_words])[0] if fixed_words else []
    cleaned = [clean_class_name(name) for name in class_names]
    if is_clip_tokenizer(tokenizer):
        warn_about_ftfy(cleaned)
    encode_name = encode_after if first else encode_words
    period = encode_after(tokenizer, [ending], space="")[0]
    sentences = encode_name(tokenizer, [name + ending for name in cleaned])
    rows, name_lengths, too_long = [], [], []
    for name, name_ids, sentence in zip(class_names, encode_name(tokenizer, cleaned), sentences):
        if not name_ids:
            raise ValueError(f"the tokenizer finds no token in the class name {name!r}: give the class another name.")
        if class_token_position == "end":
            body = [*slots, *words, *sentence]
            ends_apart = period and sentence[-len(period) :] == period
            name_lengths.append(len(sentence) - len(period) if ends_apart else len(sentence))
        else:
            own, rest = name_ids, period
            if merge_full_stop:
                own, rest = sentence[: len(name_ids)], sentence[len(name_ids) :]
            body = [*slots[:first], *words, *own, *slots[first:], *rest]
            name_lengths.append(len(name_ids))
        rows.append([*before, *body, *behind])
        if len(rows[-1]) > max_positions:
            too_long.append((name, len(rows[-1]) - max_positions))
    if too_long:
        worst = max(excess for _, excess in too_long)
        shown = ", ".join(f"{name!r} (by {excess} token{'s' * (excess > 1)})" for name, excess in too_long[:5])
        more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        advice = f"lower `n_ctx` to {n_ctx - worst} or shorten the names" if n_ctx > worst else "shorten the names"
        raise ValueError(
            f"with n_ctx={n_ctx} the prompts of these classes are longer than the text tower's {max_positions} "
            f"positions: {shown}{more}. Please {advice}."
        )
    layout = PromptLayout(rows, name_lengths, n_ctx, class_token_position, behind[-1], **_padding(tokenizer))
    warn_about_equal_prompts(layout, class_names)
    return layout


def warn_about_equal_prompts(layout: PromptLayout, class_names: list[str]) -> None:
    """Warns of classes that have the same tokens: a name that stands there twice, or differs in case alone."""
    seen: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(layout.tokens):
        seen.setdefault(tuple(row), []).append(index)
    equal = [classes for classes in seen.values() if len(classes) > 1]
    if equal:
        pairs = [", ".join(f"{class_names[c]!r} ({c})" for c in classes[:4]) for classes in equal[:5]]
        more = f"; and {len(equal) - 5} more" if len(equal) > 5 else ""
        warnings.warn(
            f"these classes have the same prompt: {'; '.join(pairs)}{more}. Their tokens are the same, so a context "
            "for all classes gives them the same scores. Labels and accuracy go by index, as in the public code; give "
            "them different names to tell them apart.",
            stacklevel=3,
        )


def fill_template(template: str, class_names: list[str]) -> list[str]:
    """Puts each class name, underscores as spaces, into `{}` of a hand-written template."""
    if template.count("{}") != 1:
        raise ValueError(f"a template must contain `{{}}` exactly once, got {template!r}.")
    return [template.replace("{}", clean_class_name(name)) for name in class_names]


def tokenize_texts(tokenizer: Any, texts: list[str], max_positions: int = 77, truncate: bool = False) -> PromptLayout:
    """Lays out finished texts, such as filled templates: a layout without context slots.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the base model's tokenizer.
        texts (`list[str]`): the texts.
        max_positions (`int`, *optional*, defaults to 77): positions of the text tower.
        truncate (`bool`, *optional*, defaults to `False`): cut what is too long instead of raising.

    Raises:
        ValueError: a text with more than `max_positions` tokens; names it.
    """
    before, behind = frame(tokenizer)
    texts = list(texts)
    if is_clip_tokenizer(tokenizer):
        warn_about_ftfy(texts)
    room = max_positions - len(before) - len(behind)
    rows = []
    for text, ids in zip(texts, encode_words(tokenizer, texts)):
        if len(ids) > room and not truncate:
            raise ValueError(
                f"the text {text!r} has {len(ids) + max_positions - room} tokens with SOS and EOS, and the text tower "
                f"has {max_positions} positions: shorten it by {len(ids) - room}."
            )
        rows.append([*before, *ids[:room], *behind])
    return PromptLayout(rows, [len(row) - 2 for row in rows], 0, "end", behind[-1], **_padding(tokenizer))

"""Words to positions: where SOS, the context slots, the class tokens, "." and EOS stand in each prompt.

A prompt is a row of pieces. Which token stands before which is all that this file decides; it holds no vectors.

    end      [SOS] [V]1 ... [V]M [CLASS .] [EOS]
    middle   [SOS] [V]1 ... [V]⌊M/2⌋ [CLASS] [V]⌊M/2⌋+1 ... [V]M [.] [EOS]
    front    [SOS] [CLASS] [V]1 ... [V]M [.] [EOS]
"""

from dataclasses import dataclass

import torch

from ..checks import check_class_names, clean_class_name


__all__ = ["PromptLayout", "encode_words", "fill_template", "make_layout", "tokenize_texts"]

# Marks a context slot in `PromptLayout.tokens`: slot k of the context is -1 - k. Token ids are never negative.
_SLOT = -1


@dataclass(frozen=True)
class PromptLayout:
    """Where everything stands in the prompts of a list of classes.

    Attributes:
        tokens (`list[list[int]]`): for each class the prompt from SOS to EOS, without padding. A value of 0 or more
            is a token id; -1 - k is context slot k.
        name_lengths (`list[int]`): for each class the number of BPE tokens of its name. At the end, where the name
            and its full stop are one piece of text, a token that covers both counts as the name's.
        n_ctx (`int`): number of context slots.
        class_token_position (`str`): `"end"`, `"middle"` or `"front"`.
        eos_token_id (`int`): id of EOS, also used for padding.
    """

    tokens: list[list[int]]
    name_lengths: list[int]
    n_ctx: int
    class_token_position: str
    eos_token_id: int

    @property
    def num_classes(self) -> int:
        return len(self.tokens)

    @property
    def max_length(self) -> int:
        return max(map(len, self.tokens))

    @property
    def num_shared_slots(self) -> int:
        """How many context slots stand before every class name: M at the end, ⌊M/2⌋ in the middle, 0 in front."""
        return {"end": self.n_ctx, "middle": self.n_ctx // 2, "front": 0}[self.class_token_position]

    def padded(self, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts as one rectangle.

        Args:
            length (`int`, *optional*, defaults to the longest prompt): number of columns.

        Returns:
            tokens `(num_classes, length)`, int64, as in `tokens` and EOS behind the first EOS; and the position of
            the first EOS `(num_classes,)`, int64.
        """
        length = length or self.max_length
        rows = [row + [self.eos_token_id] * (length - len(row)) for row in self.tokens]
        return torch.tensor(rows), torch.tensor([len(row) - 1 for row in self.tokens])


def encode_words(tokenizer, texts: list[str]) -> list[list[int]]:
    """BPE token ids of each text, without SOS and EOS.

    Raises:
        ValueError: a text contains one of the tokenizer's special tokens.
    """
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    for text, ids in zip(texts, encoded):
        if not special.isdisjoint(ids):
            names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(special & set(ids)))
            raise ValueError(f"{text!r} contains the tokenizer's special token {names}; write it without.")
    return encoded


def special_token_ids(tokenizer) -> tuple[int, int]:
    """(SOS id, EOS id), read off what the tokenizer puts round an empty text."""
    ids = tokenizer("")["input_ids"]
    if len(ids) < 2:
        raise ValueError(
            f"{type(tokenizer).__name__} puts {len(ids)} tokens round a text; a CLIP tokenizer puts SOS and EOS."
        )
    return ids[0], ids[1]


def make_layout(
    tokenizer, class_names, n_ctx: int, class_token_position: str = "end", max_positions: int = 77
) -> PromptLayout:
    """Lays out the prompts of a list of classes.

    At the end, the class name and the full stop are encoded as one piece of text, as in a sentence that a person
    writes: BPE may merge the last character of the name with the full stop (")" and "." in "kite (bird)."). In the
    middle and in front they are apart, so each is encoded alone.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the base model's tokenizer.
        class_names (`list[str]`): class names; underscores become spaces.
        n_ctx (`int`): number of context tokens M.
        class_token_position (`str`, *optional*, defaults to `"end"`): `"end"`, `"middle"` or `"front"`.
        max_positions (`int`, *optional*, defaults to 77): positions of the text tower.

    Raises:
        ValueError: a class name that the tokenizer turns into nothing, two names with the same tokens, or a prompt
            with more than `max_positions` tokens; names the classes, and says by how many tokens they are too long.
    """
    class_names = check_class_names(class_names)
    sos, eos = special_token_ids(tokenizer)
    slots = [_SLOT - k for k in range(n_ctx)]
    cleaned = [clean_class_name(name) for name in class_names]
    period = encode_words(tokenizer, ["."])[0]
    sentences = encode_words(tokenizer, [name + "." for name in cleaned])
    rows, name_lengths, too_long = [], [], []
    for name, name_ids, sentence in zip(class_names, encode_words(tokenizer, cleaned), sentences):
        if not name_ids:
            raise ValueError(f"the tokenizer finds no token in the class name {name!r}: give the class another name.")
        if class_token_position == "end":
            body = slots + sentence
            name_lengths.append(len(sentence) - len(period) if sentence[-len(period) :] == period else len(sentence))
        else:
            first = n_ctx // 2 if class_token_position == "middle" else 0
            body = slots[:first] + name_ids + slots[first:] + period
            name_lengths.append(len(name_ids))
        rows.append([sos, *body, eos])
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
    seen: dict[tuple[int, ...], str] = {}
    for name, row in zip(class_names, rows):
        other = seen.setdefault(tuple(row), name)
        if other is not name:
            raise ValueError(
                f"the class names {other!r} and {name!r} have the same tokens (the tokenizer ignores case, or knows "
                "no difference), so they cannot be told apart. Merge them or give them different names."
            )
    return PromptLayout(rows, name_lengths, n_ctx, class_token_position, eos)


def fill_template(template: str, class_names) -> list[str]:
    """Puts each class name, underscores as spaces, into `{}` of a hand-written template."""
    if template.count("{}") != 1:
        raise ValueError(f"a template must contain `{{}}` exactly once, got {template!r}.")
    return [template.replace("{}", clean_class_name(name)) for name in class_names]


def tokenize_texts(tokenizer, texts: list[str], max_positions: int = 77) -> PromptLayout:
    """Lays out finished texts, such as filled templates: a layout without context slots.

    Raises:
        ValueError: a text with more than `max_positions` tokens; names it. Nothing is cut off silently.
    """
    sos, eos = special_token_ids(tokenizer)
    rows = []
    for text, ids in zip(texts, encode_words(tokenizer, list(texts))):
        rows.append([sos, *ids, eos])
        if len(rows[-1]) > max_positions:
            raise ValueError(
                f"the text {text!r} has {len(rows[-1])} tokens with SOS and EOS, and the text tower has "
                f"{max_positions} positions: shorten it by {len(rows[-1]) - max_positions}."
            )
    return PromptLayout(rows, [len(row) - 2 for row in rows], 0, "end", eos)

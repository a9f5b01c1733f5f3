"""Texts as the public CLIP code reads them: repaired by `ftfy`, HTML entities replaced, before they are tokenized."""

import html
import re
import warnings
from collections.abc import Iterable
from typing import Any

from ..checks import some


try:
    import ftfy
except ImportError:  # the extra "text"
    ftfy = None


__all__ = ["is_clip_tokenizer", "read_as_clip", "warn_about_ftfy"]

# What ftfy writes otherwise: curly quotes, ligatures, letters of full and half width, control characters; and UTF-8
# that was read as Latin-1 or Windows-1252 ("cafÃ©"): a leading byte and one that follows it, as letters.
_OTHERWISE = re.compile(
    "[\u02bc\u2018-\u201f\ufb00-\ufb06\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u3000\uff01-\uffee"
    "\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc]"
    "|[\xc2-\xc5\xd0\xd1\xe2\xe3][\x80-\xbf\u20ac\u2020-\u2026\u0152\u0153\u0160\u0161\u017d\u017e\u0178\u02c6\u02dc"
    "\u0192\u2013\u2014\u2030\u2039\u203a\u2122]"
)


def is_clip_tokenizer(tokenizer: Any) -> bool:
    """Whether a tokenizer is CLIP's own; those of other families read texts as their own pipelines do."""
    return any(kind.__name__ in ("CLIPTokenizer", "CLIPTokenizerFast") for kind in type(tokenizer).__mro__)


def read_as_clip(texts: list[str]) -> list[str]:
    """Texts as the public CLIP code reads them: through `ftfy.fix_text` if it is installed, then twice through
    `html.unescape`. Most texts stay as they are."""
    return [text if text.isascii() and "&" not in text else _repaired(text) for text in texts]


def _repaired(text: str) -> str:
    if ftfy is not None:
        text = ftfy.fix_text(text)
    return html.unescape(html.unescape(text))


def warn_about_ftfy(texts: Iterable[str]) -> None:
    """Warns of texts that the public code reads otherwise, because `ftfy` is not installed here."""
    if ftfy is not None:
        return
    found = [text for text in texts if not text.isascii() and _OTHERWISE.search(text)]
    if found:
        warnings.warn(
            "the public CLIP code writes these texts otherwise before it reads them, so they have other tokens there: "
            f"{some([text[:80] for text in found])}. Install ftfy (`pip install coop_hf[text]`) for the same tokens, "
            "or write plain quotes and letters.",
            stacklevel=3,
        )

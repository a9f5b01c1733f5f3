"""CuPL: prompts that a language model writes for each class (https://arxiv.org/abs/2209.03320).

A language model answers questions such as "What does a lorikeet look like?"; a class is the mean of its sentences,

    w_c = normalise( mean over the sentences s of class c of normalise(g(s)) ),    g the text tower,

and is used as any other class embeddings, with `coop_hf.baselines.zero_shot_logits`. The file of sentences has the
published form, `{class name: [sentence, ...]}`.
"""

import copy
import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..atomic import write_text
from ..checks import check_class_names, check_counts, clean_class_name
from ..core.layout import encode_words, fill_template
from .zero_shot import _TEXTS, family_of, get_tokenizer, mean_text_embeddings


__all__ = [
    "CUPL_QUESTIONS",
    "cupl_class_embeddings",
    "fill_question",
    "generate_prompts",
    "prompts_of_classes",
    "read_prompts",
    "write_prompts",
]

MAX_PROMPT_FILE_BYTES = 256 * 2**20
TOO_LONG = ("error", "truncate")

# The paper's questions (its appendix), under CoOp's names of the data sets. "a {}" becomes "an {}" before a vowel.
CUPL_QUESTIONS: dict[str, tuple[str, ...]] = {name: tuple(own) for name, own in _TEXTS["cupl_questions"].items()}


# ---------------------------------------------------------------------- the file


def _check_prompts(prompts: Any, source: str) -> dict[str, list[str]]:
    if not isinstance(prompts, dict) or not prompts:
        raise ValueError(f"{source} must be a JSON object {{class name: [sentence, ...]}} with at least one class.")
    for name, sentences in prompts.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{source} has an empty class name.")
        if not isinstance(sentences, list) or not sentences:
            raise ValueError(
                f"{source} must give class {name[:80]!r} a list of at least one sentence, it gives "
                f"{str(sentences)[:80]!r}."
            )
        for index, sentence in enumerate(sentences):
            if not isinstance(sentence, str) or not sentence.strip():
                raise ValueError(f"{source}: sentence {index} of class {name[:80]!r} is {str(sentence)[:80]!r}.")
    return prompts


def class_key(name: str) -> str:
    """What class names are compared by: without case, underscores as spaces."""
    return clean_class_name(name).casefold()


def prompts_of_classes(prompts: dict[str, list[str]], class_names: list[str]) -> list[list[str]]:
    """The sentences of each class, in the order of the classes.

    Names are compared without case, and with underscores as spaces.

    Args:
        prompts (`dict[str, list[str]]`): as [`read_prompts`] gives them.
        class_names (`list[str]`): the classes.

    Returns:
        `list[list[str]]`.

    Raises:
        ValueError: classes without sentences; names each, with the closest name that is there.
    """
    by_key: dict[str, list[str]] = {}
    for name, sentences in prompts.items():
        if class_key(name) in by_key:
            raise ValueError(f"two classes of the prompts are called {clean_class_name(name)!r}, but for case or '_'.")
        by_key[class_key(name)] = sentences
    missing = [name for name in class_names if class_key(name) not in by_key]
    if missing:
        shown = []
        for name in missing[:10]:
            close = difflib.get_close_matches(class_key(name), by_key, n=1)
            shown.append(repr(name) + (f" (there is {close[0]!r})" if close else ""))
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(
            f"{len(missing)} of {len(class_names)} classes have no sentences: {', '.join(shown)}{more}. Rename them "
            "in one of the two lists, or generate sentences for them."
        )
    return [list(by_key[class_key(name)]) for name in class_names]


def read_prompts(path: str | os.PathLike, class_names: list[str] | None = None) -> dict[str, list[str]]:
    """Reads a file of sentences in CuPL's published form, and checks it.

    Args:
        path (`str` or `os.PathLike`): a JSON file, `{class name: [sentence, ...]}`.
        class_names (`list[str]`, *optional*): classes that must be there. The result has these, under these names and
            in this order.

    Returns:
        `dict[str, list[str]]`.

    Raises:
        ValueError: no such JSON, a class with an empty list, an empty sentence, or missing classes; names them.
    """
    if os.path.getsize(path) > MAX_PROMPT_FILE_BYTES:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes; at most {MAX_PROMPT_FILE_BYTES:,} are read.")
    try:
        with open(path, encoding="utf-8") as file:
            prompts = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {str(error)[:200]}.") from None
    prompts = _check_prompts(prompts, str(path))
    if class_names is None:
        return prompts
    return dict(zip(class_names, prompts_of_classes(prompts, check_class_names(class_names))))


def write_prompts(path: str | os.PathLike, prompts: dict[str, list[str]]) -> None:
    """Writes sentences in CuPL's published form; the file appears whole or not at all.

    Raises:
        ValueError: no classes, a class with an empty list, or an empty sentence.
    """
    _check_prompts(prompts, "`prompts`")
    write_text(path, json.dumps(prompts, indent=4, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------- embeddings


def cupl_class_embeddings(
    model: Any,
    tokenizer: Any,
    class_names: list[str],
    prompts: dict[str, list[str]],
    templates: str | Sequence[str] = (),
    template_weight: float | None = None,
    too_long: str = "error",
    batch_size: int = 256,
) -> torch.Tensor:
    """Class embeddings from sentences, alone or mixed with hand-written templates.

    With s̄ the mean of the normalised embeddings of a class's sentences, t̄ that of its templates and λ the weight of
    the templates, w_c = normalise((1 - λ) s̄ + λ t̄).

    Args:
        model (`CoOpModel` or `CLIPModel`): whose text tower; nothing in it is changed.
        tokenizer (`PreTrainedTokenizerBase` or `CLIPProcessor`): the base's; `None` with a `CoOpModel` takes its own.
        class_names (`list[str]`): the classes.
        prompts (`dict[str, list[str]]`): sentences, as [`read_prompts`] or [`generate_prompts`] gives them.
        templates (`str` or `list[str]`, *optional*): templates to mix in, with `{}` once in each.
        template_weight (`float`, *optional*): λ, from 0 to 1. By default every text counts the same, sentence or
            template: λ is the templates' share of a class's texts.
        too_long (`str`, *optional*, defaults to `"error"`): what to do with a sentence that has more tokens than the
            tower has positions: `"error"`, or `"truncate"` it, as the published code does.
        batch_size (`int`, *optional*, defaults to 256): texts that go through the tower at a time; bounds memory.

    Returns:
        `torch.Tensor` `(num_classes, projection_dim)`, fp32, normalised.

    Raises:
        ValueError: classes without sentences, sentences that are too long (says how many, and names the first), or a
            weight out of range.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"`too_long` must be one of {', '.join(map(repr, TOO_LONG))}, got {too_long!r}.")
    if template_weight is not None and not 0 <= template_weight <= 1:
        raise ValueError(f"`template_weight` must be a number from 0 to 1, got {template_weight!r}.")
    class_names = check_class_names(class_names)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if template_weight and not templates:
        raise ValueError(f"`template_weight` is {template_weight}, but there are no `templates` to mix in.")
    family, tokenizer = family_of(model), get_tokenizer(model, tokenizer)
    sentences = prompts_of_classes(_check_prompts(prompts, "`prompts`"), class_names)
    if too_long == "error":
        _check_lengths(tokenizer, class_names, sentences, family.max_positions)
    means = mean_text_embeddings(model, tokenizer, sentences, batch_size, truncate=too_long == "truncate")
    if templates:
        by_template = [fill_template(template, class_names) for template in templates]
        template_means = mean_text_embeddings(model, tokenizer, [list(own) for own in zip(*by_template)], batch_size)
        weights = torch.tensor([len(templates) / (len(templates) + len(own)) for own in sentences])
        if template_weight is not None:
            weights = torch.full_like(weights, template_weight)
        means = torch.lerp(means, template_means, weights.to(means.device)[:, None])
    return F.normalize(means, dim=-1)


def _check_lengths(tokenizer: Any, class_names: list[str], sentences: list[list[str]], max_positions: int) -> None:
    flat = [(name, text) for name, own in zip(class_names, sentences) for text in own]
    lengths = [len(ids) + 2 for ids in encode_words(tokenizer, [text for _, text in flat])]
    too_long = [(name, text, length) for (name, text), length in zip(flat, lengths) if length > max_positions]
    if too_long:
        name, text, length = too_long[0]
        raise ValueError(
            f"{len(too_long)} of {len(flat)} sentences have more tokens than the text tower's {max_positions} "
            f"positions; the first is one of {name!r}, with {length}: {text[:200]!r}. Shorten them, or pass "
            "too_long='truncate'."
        )


# ---------------------------------------------------------------------- generation


def fill_question(question: str, class_name: str) -> str:
    """A question about one class: `{}` is its name, and "a {}" becomes "an {}" before a vowel."""
    if question.count("{}") != 1:
        raise ValueError(f"a question must contain `{{}}` exactly once, where the class name goes, got {question!r}.")
    name = clean_class_name(class_name)
    if name[:1].lower() in "aeiou":
        question = re.sub(r"\b([aA]) \{\}", r"\1n {}", question)
    return question.replace("{}", name)


def _class_seed(seed: int, class_name: str) -> int:
    """A seed of each class's own: its sentences don't depend on the other classes, nor on where a run was resumed."""
    digest = hashlib.sha256(f"{seed}\n{clean_class_name(class_name)}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _first_sentence(text: str, stop: str | None) -> str:
    """The text up to the stop string, on one line, with the stop string put back; empty if there is nothing."""
    text = text.lstrip()
    if stop:
        text = text.split(stop)[0]
    text = " ".join(text.split())
    return text + stop if text and stop else text


def _encode_questions(tokenizer: Any, texts: list[str], use_chat_template: bool) -> list[list[int]]:
    if not use_chat_template:
        return tokenizer(texts)["input_ids"]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template writes its own


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, rows: list[list[int]], stop: str | None, options: dict) -> list[str]:
    """One sampled answer to each row of token ids."""
    if tokenizer.pad_token is None:  # a copy: the caller's tokenizer stays as it is
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    skip = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    stopping = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    output = model.generate(**batch, pad_token_id=tokenizer.pad_token_id, **stopping, **options)
    return tokenizer.batch_decode(output[:, skip:], skip_special_tokens=True)


def generate_prompts(
    model: Any,
    tokenizer: Any,
    class_names: list[str],
    questions: str | Sequence[str],
    num_sentences: int = 10,
    path: str | os.PathLike | None = None,
    temperature: float = 0.99,
    max_new_tokens: int = 50,
    stop: str | None = ".",
    batch_size: int = 32,
    seed: int = 0,
    use_chat_template: bool | None = None,
    progress: bool = True,
    max_rounds: int = 5,
) -> dict[str, list[str]]:
    """Lets a language model write sentences about each class.

    Sampling is the paper's: temperature 0.99 over the whole vocabulary, at most 50 tokens, up to the first ".". Empty
    answers are asked for again.

    Args:
        model (`PreTrainedModel`): any transformers model with `generate` (causal, or encoder-decoder).
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; not changed.
        class_names (`list[str]`): the classes.
        questions (`str` or `list[str]`): with `{}` once in each, such as `CUPL_QUESTIONS["OxfordPets"]`.
        num_sentences (`int`, *optional*, defaults to 10): answers to each question, as in the paper.
        path (`str` or `os.PathLike`, *optional*): JSON file, written again, whole, after each class. Classes that it
            already holds are not generated again: an interrupted run goes on where it stopped. The file does not
            record the settings; delete it to start with others.
        temperature (`float`, *optional*, defaults to 0.99): of sampling; 0 takes the likeliest token, and then one
            answer for each question is enough.
        max_new_tokens (`int`, *optional*, defaults to 50): longest answer, in tokens.
        stop (`str`, *optional*, defaults to `"."`): where an answer ends; it is kept. `None` lets it run on.
        batch_size (`int`, *optional*, defaults to 32): answers written at a time.
        seed (`int`, *optional*, defaults to 0): with it and the class's name each class has its own random numbers.
            The sentences of a class don't depend on the other classes. The global generators are left as they were.
        use_chat_template (`bool`, *optional*, defaults to whether the tokenizer has one): ask as a user's message.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar over the classes.
        max_rounds (`int`, *optional*, defaults to 5): how often empty answers are asked for again.

    Returns:
        `dict[str, list[str]]`: for each class its sentences, question by question.

    Raises:
        ValueError: bad arguments, or a model that keeps answering nothing; names the class.
    """
    class_names = check_class_names(class_names)
    questions = [questions] if isinstance(questions, str) else list(questions)
    if not questions:
        raise ValueError('`questions` is empty: pass at least one, such as "What does a {} look like?".')
    check_counts(
        num_sentences=num_sentences, max_new_tokens=max_new_tokens, batch_size=batch_size, max_rounds=max_rounds
    )
    if temperature < 0:
        raise ValueError(f"`temperature` must be 0 or more, got {temperature!r}.")
    for question in questions:
        fill_question(question, class_names[0])
    if use_chat_template is None:
        use_chat_template = getattr(tokenizer, "chat_template", None) is not None
    if temperature:
        options = {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    else:
        options = {"do_sample": False}
    options["max_new_tokens"] = max_new_tokens

    done: dict[str, list[str]] = {}
    if path is not None and os.path.exists(path):
        done = read_prompts(path)
    known = {class_key(name): name for name in done}
    todo = [name for name in dict.fromkeys(class_names) if class_key(name) not in known]
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        for name in tqdm(todo, desc="CuPL", unit="class", disable=not progress):
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(_class_seed(seed, name))
                rows = _encode_questions(tokenizer, [fill_question(q, name) for q in questions], use_chat_template)
                done[name] = _write_class(
                    model, tokenizer, name, rows, num_sentences, stop, batch_size, max_rounds, options
                )
            if path is not None:
                write_prompts(path, done)
    finally:
        model.train(was_training)
    by_key = {class_key(name): sentences for name, sentences in done.items()}
    return {name: by_key[class_key(name)] for name in class_names}


def _write_class(
    model: Any, tokenizer: Any, name: str, rows: list[list[int]], num_sentences: int, stop: str | None,
    batch_size: int, max_rounds: int, options: dict,
) -> list[str]:  # fmt: skip
    slots: list[str] = [""] * (len(rows) * num_sentences)
    for _ in range(max_rounds):
        empty = [index for index, sentence in enumerate(slots) if not sentence]
        for start in range(0, len(empty), batch_size):
            batch = empty[start : start + batch_size]
            answers = _answers(model, tokenizer, [rows[index // num_sentences] for index in batch], stop, options)
            for index, answer in zip(batch, answers):
                slots[index] = _first_sentence(answer, stop)
    sentences = [sentence for sentence in slots if sentence]
    if not sentences:
        raise ValueError(
            f"the language model answered nothing about {name!r} in {max_rounds} rounds: try another model, other "
            "questions, a larger `max_new_tokens`, or `stop=None`."
        )
    return sentences

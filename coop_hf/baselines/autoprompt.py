"""AutoPrompt for CLIP: a prompt of M real words, found by gradient-guided search (https://arxiv.org/abs/2010.15980).

The context of CoOp is restricted to rows of the token embedding. In each step one slot m is chosen; with e(w) the
embedding of word w and L the cross-entropy on the training images, the k words with the smallest

    e(w) · ∂L/∂v_m        (first order: how L changes if v_m becomes e(w); the paper's equation 2)

are candidates; L is computed exactly for each, and the best one stays if it is better than the word in the slot.
The result is a text that works in any CLIP with the same tokenizer, pasted before the class name.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..checks import check_class_names, check_counts, clean_class_name
from ..config import CoOpConfig
from ..core.layout import encode_words, special_token_ids
from ..deploy.merging import prompt_template
from ..interpret import nearest_rows
from ..modeling import CoOpModel
from .zero_shot import get_tokenizer


__all__ = ["DiscretePrompt", "autoprompt", "project_context", "prompt_vocabulary"]

_CLASSES_AT_A_TIME = 1024  # prompts in one text pass of candidates; bounds memory with many classes


@dataclass
class DiscretePrompt:
    """A prompt made of vocabulary entries.

    Args:
        text (`str`): the words, with spaces between.
        template (`str`): the whole prompt, with `{}` for the class name: paste it into any CLIP.
        token_ids (`list[int]`): M token ids; the tokenizer turns `text` back into them.
        class_token_position (`str`): `"end"`, `"middle"` or `"front"`.
        loss (`float`): mean cross-entropy on the images given.
        accuracy (`float`): accuracy on them, a fraction.
        learned_accuracy (`float`, *optional*): for a projected context, the accuracy of its learned vectors.
        distances (`list[float]`, *optional*): for a projected context, how far each word is from its vector.
        history (`list[dict]`, *optional*): of a search: every step as `{"step", "slot", "token", "loss", "accepted"}`;
            `loss` is the value of the objective.
        seed (`int`, *optional*): of the search.
    """

    text: str
    template: str
    token_ids: list[int]
    class_token_position: str
    loss: float
    accuracy: float
    learned_accuracy: float | None = None
    distances: list[float] | None = None
    history: list[dict] = field(default_factory=list)
    seed: int | None = None

    def to_config(self, class_names: list[str] | None = None) -> CoOpConfig:
        """A `CoOpConfig` whose context starts as these words: `model.add_adapter("words", prompt.to_config())`."""
        return CoOpConfig(
            n_ctx=len(self.token_ids),
            class_token_position=self.class_token_position,
            ctx_init=self.text,
            template=self.template,
            class_names=class_names,
        )


def prompt_vocabulary(
    tokenizer: Any, class_names: list[str] | None = None, ascii_words: bool = True, min_length: int = 1
) -> list[int]:
    """Token ids that may stand in a discrete prompt: what a person can type and the tokenizer turns back into them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the base model's tokenizer.
        class_names (`list[str]`, *optional*): their words are left out, so that no class is named in every prompt.
        ascii_words (`bool`, *optional*, defaults to `True`): only words of ASCII letters; `False` also takes digits,
            punctuation, emoji and other scripts.
        min_length (`int`, *optional*, defaults to 1): shortest word, in characters.

    Returns:
        `list[int]`, ascending. Special tokens and pieces that only stand inside words never are among them.
    """
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    words = [tokenizer.decode([i]).strip() for i in ids]
    banned = {word.casefold() for name in class_names or [] for word in clean_class_name(name).split()}
    kept = [
        (i, word)
        for i, word in zip(ids, words)
        if len(word) >= min_length
        and word.casefold() not in banned
        and not set("\ufffd{}") & set(word)
        and (not ascii_words or (word.isascii() and word.isalpha()))
    ]
    encoded = tokenizer([word for _, word in kept], add_special_tokens=False)["input_ids"] if kept else []
    return [i for (i, _), own in zip(kept, encoded) if list(own) == [i]]


def _as_text(tokenizer: Any, token_ids: list[int], layout: Any, class_names: list[str]) -> tuple[str, str] | None:
    """(text, template) of the ids, or `None` where a full prompt would not be tokenised back into them."""
    words = [tokenizer.decode([i]).strip() for i in token_ids]
    template = prompt_template(words, layout.class_token_position)
    if template.count("{}") != 1 or not all(words):
        return None
    texts = [template.replace("{}", clean_class_name(name)) for name in class_names]
    encoded = tokenizer([" ".join(words), *texts], add_special_tokens=False)["input_ids"]
    expected = [[token_ids[-1 - t] if t < 0 else t for t in row[1:-1]] for row in layout.tokens]
    return (" ".join(words), template) if [list(ids) for ids in encoded] == [list(token_ids), *expected] else None


def _check_examples(model: Any, image_embeds: torch.Tensor, labels: torch.Tensor, class_names: list[str]) -> tuple:
    image_embeds = torch.as_tensor(image_embeds).detach()
    labels = torch.as_tensor(labels).long()
    dim = model.family.projection_dim
    if image_embeds.ndim != 2 or image_embeds.shape[1] != dim or labels.shape != image_embeds.shape[:1]:
        raise ValueError(
            f"expected `image_embeds` (num_examples, {dim}) from `model.get_image_features` and as many labels, got "
            f"{tuple(image_embeds.shape)} and {tuple(labels.shape)}."
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"labels must be class indices from 0 to {len(class_names) - 1}, and there must be some.")
    device = model.device
    return F.normalize(image_embeds.float(), dim=-1).to(device), labels.to(device)


class _Search:
    """Losses of discrete prompts on one set of images. Makes a `CoOpModel` of its own on the given one's base."""

    def __init__(
        self,
        model: Any,
        class_names: list[str] | None,
        position: str,
        num_tokens: int,
        image_embeds: torch.Tensor,
        labels: torch.Tensor,
    ):
        self.class_names = check_class_names(class_names or model.class_names or [])
        self.image_embeds, self.labels = _check_examples(model, image_embeds, labels, self.class_names)
        self.tokenizer, family = model.tokenizer, model.family
        config = CoOpConfig(n_ctx=num_tokens, class_token_position=position)
        start = torch.zeros(num_tokens, family.token_embedding.embedding_dim)
        self.model = CoOpModel(
            model.base_model, config, self.class_names, model.processor, text_pass=model.text_pass, context=start
        )
        assert self.model.adapter.class_prompts is not None
        self.prompts = self.model.adapter.class_prompts
        self.layout = self.prompts.layout
        with align_module_device(family.token_embedding):
            self.table = family.token_embedding.weight.detach().float()

    def rows(self, token_ids: Any) -> torch.Tensor:
        return self.table[torch.as_tensor(token_ids, device=self.table.device)]

    def gradient(self, token_ids: list[int], examples: Any) -> tuple[float, torch.Tensor]:
        """The loss, and its gradient `(num_tokens, dim)` with respect to the context."""
        context = self.model.context
        context.data = self.rows(token_ids).to(context.device)
        loss = self.model(image_embeds=self.image_embeds[examples], labels=self.labels[examples]).loss
        assert loss is not None
        (gradient,) = torch.autograd.grad(loss, context)
        return loss.item(), gradient

    @torch.no_grad()
    def losses(
        self, candidates: list[list[int]], examples: Any, batch_size: int, objective: str = "loss"
    ) -> torch.Tensor:
        """What is to be minimised, exactly, for each candidate prompt, `batch_size` of them in one text pass."""
        scale, labels, images = self.model.logit_scale, self.labels[examples], self.image_embeds[examples]
        losses = []
        for start in range(0, len(candidates), batch_size):
            batch = candidates[start : start + batch_size]
            features = self.prompts.features(self.rows(batch)[:, None], self.model.text_pass, _CLASSES_AT_A_TIME)
            features = F.normalize(features.float(), dim=-1)  # (candidates, num_classes, projection_dim)
            logits = scale * torch.einsum("nd,kcd->knc", images, features)
            loss = F.cross_entropy(logits.transpose(1, 2), labels.expand(len(batch), -1), reduction="none").mean(dim=1)
            if objective == "accuracy":  # wrong images; among prompts with equally many the loss, squeezed below 1
                loss = (logits.argmax(dim=2) != labels).sum(dim=1) + (loss / (1 + loss)).double()
            losses.append(loss)
        return torch.cat(losses)

    @torch.no_grad()
    def score(self, context: torch.Tensor) -> tuple[float, float]:
        """(loss, accuracy) of any context on all images."""
        self.model.context.data = context.detach().float().to(self.model.context.device)
        output = self.model(image_embeds=self.image_embeds, labels=self.labels)
        return output.loss.item(), (output.logits.argmax(dim=-1) == self.labels).float().mean().item()

    def result(self, token_ids: list[int], **more: Any) -> DiscretePrompt:
        text = _as_text(self.tokenizer, token_ids, self.layout, self.class_names)
        if text is None:
            words = " ".join(self.tokenizer.decode([i]).strip() for i in token_ids)
            raise ValueError(
                f"the words {words!r} are not tokenised back into the same ids together with the class names; use a "
                "vocabulary from `prompt_vocabulary`."
            )
        loss, accuracy = self.score(self.rows(token_ids))
        return DiscretePrompt(*text, list(token_ids), self.layout.class_token_position, loss, accuracy, **more)


def autoprompt(
    model: CoOpModel,
    image_embeds: torch.Tensor,
    labels: torch.Tensor,
    class_names: list[str] | None = None,
    num_tokens: int | None = None,
    class_token_position: str = "end",
    num_steps: int = 50,
    top_k: int = 32,
    batch_size: int | None = None,
    candidate_batch_size: int | None = None,
    vocabulary: list[int] | None = None,
    init: str | None = None,
    objective: str = "loss",
    seed: int = 0,
    progress: bool = False,
) -> DiscretePrompt:
    """Finds a prompt of `num_tokens` words for the images given.

    Args:
        model (`CoOpModel`): gives base, tokenizer and classes; it is not changed.
        image_embeds (`torch.Tensor`): `(num_examples, projection_dim)`, cached image features, normalised or not.
        labels (`torch.Tensor`): `(num_examples,)`, class indices.
        class_names (`list[str]`, *optional*, defaults to the model's): the classes.
        num_tokens (`int`, *optional*, defaults to 4, or to the tokens of `init`): number of words M.
        class_token_position (`str`, *optional*, defaults to `"end"`): where the class name stands.
        num_steps (`int`, *optional*, defaults to 50): steps; each looks at one slot, all in turn, in random order.
        top_k (`int`, *optional*, defaults to 32): candidates of a step. With all images as batch, a slot that comes
            up again before the prompt has changed gets the next `top_k`, and the search ends once no single word of
            the vocabulary makes the prompt better.
        batch_size (`int`, *optional*, defaults to all): images of a step, drawn anew each time. The text pass costs
            the same for any number.
        candidate_batch_size (`int`, *optional*, defaults to 1 on the CPU, else 8): candidates in one text pass; the
            losses are the same. 1 computes what the classes of a candidate share only once, which is the least work;
            more fill a GPU better.
        vocabulary (`list[int]`, *optional*, defaults to `prompt_vocabulary(tokenizer, class_names)`): allowed ids.
        init (`str`, *optional*): words to start from, such as a hand-written prompt; random words by default.
        objective (`str`, *optional*, defaults to `"loss"`): by what candidates are compared: `"loss"`, the
            cross-entropy, or `"accuracy"`, the number of wrong images and then the loss. The gradient is always the
            loss's. A base whose logits are too sure of themselves lets the loss fall while accuracy falls too.
        seed (`int`, *optional*, defaults to 0): of the start, the order of slots and the batches.
        progress (`bool`, *optional*, defaults to `False`): show a progress bar.

    Returns:
        [`DiscretePrompt`]. Its loss and accuracy are those on `image_embeds`: measure it on other images.

    Raises:
        ValueError: shapes or labels that don't fit, an empty vocabulary, an unknown objective, or a start that is no
            `num_tokens` tokens, or has words of more than one token.
    """
    if candidate_batch_size is None:
        candidate_batch_size = 1 if model.device.type == "cpu" else 8
    start = None
    if init is not None:
        start = list(encode_words(get_tokenizer(model, None), [init])[0])
        if num_tokens is not None and len(start) != num_tokens:
            raise ValueError(f"init={init!r} has {len(start)} tokens, and num_tokens is {num_tokens}.")
        num_tokens = len(start)
    num_tokens = 4 if num_tokens is None else num_tokens
    check_counts(num_tokens=num_tokens, num_steps=num_steps, top_k=top_k, candidate_batch_size=candidate_batch_size)
    if batch_size is not None:
        check_counts(batch_size=batch_size)
    if objective not in ("loss", "accuracy"):
        raise ValueError(f"`objective` must be 'loss' or 'accuracy', got {objective!r}.")
    search = _Search(model, class_names, class_token_position, num_tokens, image_embeds, labels)
    if start is not None and _as_text(search.tokenizer, start, search.layout, search.class_names) is None:
        raise ValueError(f"init={init!r} has words that the tokenizer cuts into pieces: start from other words.")
    if vocabulary is None:
        vocabulary = prompt_vocabulary(search.tokenizer, search.class_names)
    allowed = torch.tensor(sorted(set(vocabulary)), dtype=torch.long)
    if len(allowed) == 0 or allowed[0] < 0 or allowed[-1] >= len(search.table):
        raise ValueError(f"`vocabulary` must hold token ids from 0 to {len(search.table) - 1}, and at least one.")
    special_ids = {*search.tokenizer.all_special_ids, *special_token_ids(search.tokenizer)}
    if not special_ids.isdisjoint(allowed.tolist()):
        raise ValueError("`vocabulary` must not hold the tokenizer's special tokens.")
    generator = torch.Generator().manual_seed(seed)
    current = start or allowed[torch.randint(len(allowed), (num_tokens,), generator=generator)].tolist()
    number = len(search.labels)
    full = batch_size is None or batch_size >= number
    examples: Any = slice(None)
    history: list[dict] = []
    order: list[int] = []
    looked_at = [0] * num_tokens  # how many candidates of each slot this very prompt has been compared with
    allowed_rows = search.rows(allowed)
    for step in tqdm(range(num_steps), desc="AutoPrompt", disable=not progress):
        if not order:
            order = torch.randperm(num_tokens, generator=generator).tolist()
        slot = order.pop()
        if not full:
            examples = torch.randperm(number, generator=generator)[:batch_size].to(search.labels.device)
        loss, gradient = search.gradient(current, examples)
        if objective != "loss":
            loss = search.losses([current], examples, 1, objective).item()
        change = allowed_rows @ gradient[slot].to(allowed_rows.device)
        best_first = [i for i in allowed[change.cpu().sort(stable=True).indices].tolist() if i != current[slot]]
        best_first = best_first[looked_at[slot] : looked_at[slot] + top_k]
        candidates = [[*current[:slot], i, *current[slot + 1 :]] for i in best_first]
        losses = torch.empty(0)
        if candidates:
            losses = search.losses(candidates, examples, candidate_batch_size, objective).cpu()
        accepted = False
        for index in losses.sort(stable=True).indices.tolist():
            if losses[index] >= loss - (1e-6 * max(loss, 1) if objective == "loss" else 1e-6):  # more than rounding
                break
            if _as_text(search.tokenizer, candidates[index], search.layout, search.class_names) is not None:
                current, loss, accepted = candidates[index], losses[index].item(), True
                break
        token = search.tokenizer.decode([current[slot]]).strip()
        history.append({"step": step, "slot": slot, "token": token, "loss": loss, "accepted": accepted})
        if full and accepted:
            looked_at = [0] * num_tokens
        elif full:
            looked_at[slot] += top_k
            if min(looked_at) >= len(allowed):
                break
    return search.result(current, history=history, seed=seed)


def project_context(
    model: CoOpModel,
    image_embeds: torch.Tensor,
    labels: torch.Tensor,
    metric: str = "euclidean",
    vocabulary: list[int] | None = None,
    adapter_name: str | None = None,
) -> DiscretePrompt:
    """Replaces each vector of a learned context by its nearest word, and measures what is left of the accuracy.

    Args:
        model (`CoOpModel`): with a learned, unified context; it is not changed.
        image_embeds (`torch.Tensor`): `(num_examples, projection_dim)`, image features to measure on.
        labels (`torch.Tensor`): `(num_examples,)`, class indices.
        metric (`str`, *optional*, defaults to `"euclidean"`): or `"cosine"`.
        vocabulary (`list[int]`, *optional*, defaults to `prompt_vocabulary(tokenizer, class_names)`): allowed ids.
        adapter_name (`str`, *optional*, defaults to the active adapter): which adapter.

    Returns:
        [`DiscretePrompt`], with `accuracy` of the words, `learned_accuracy` of the vectors, and `distances`.

    Raises:
        ValueError: no such adapter, a class-specific context, or shapes and labels that don't fit.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.adapters:
        raise ValueError(f"there is no adapter named {name!r}; this model has {', '.join(map(repr, model.adapters))}.")
    adapter: Any = model.adapters[name]
    config, context = adapter.config, adapter.context.detach()
    if config.class_specific:
        raise ValueError(
            "a class-specific context has other words for each class and makes no common prompt; see what it says "
            "with `coop_hf.interpret.nearest_tokens`, or learn a unified one."
        )
    search = _Search(model, config.class_names, config.class_token_position, config.n_ctx, image_embeds, labels)
    if vocabulary is None:
        vocabulary = prompt_vocabulary(search.tokenizer, search.class_names)
    allowed = torch.tensor(sorted(set(vocabulary)), dtype=torch.long)
    distances, places = nearest_rows(context, search.rows(allowed), top_k=1, metric=metric)
    learned_accuracy = search.score(context)[1]
    token_ids = allowed[places[:, 0].cpu()].tolist()
    return search.result(token_ids, learned_accuracy=learned_accuracy, distances=distances[:, 0].tolist())

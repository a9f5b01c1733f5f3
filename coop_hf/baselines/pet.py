"""PET for CLIP: soft labels from several prompts teach one learned prompt (https://arxiv.org/abs/2001.07676).

The patterns of the paper are prompts here: hand-written templates, CuPL's sentences, learned contexts. With s_p(c | x)
the logit of class c under prompt p, w_p the accuracy of p on the few labelled images ("weighted" in the paper; or 1,
"uniform") and a temperature T, an unlabelled image x gets the soft label (the paper's section 3.3)

    q(· | x) = softmax( Σ_p w_p s_p(· | x) / (T Σ_p w_p) )

and a student, an ordinary CoOp context, minimises over the unlabelled images U and the labelled ones L

    mean over U of KL(q(· | x) ‖ student(· | x))  +  λ · mean over L of cross-entropy(y, student(· | x)).
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..adapters.coop import init_context
from ..checks import check_counts
from ..modeling import CoOpModel
from .zero_shot import class_embeddings, zero_shot_logits


__all__ = ["PetResult", "fit_pet", "prompt_weights", "soft_label_loss", "soft_labels", "teacher_logits"]

WEIGHTINGS = ("accuracy", "uniform")


@dataclass
class PetResult:
    """How a student was taught; the student itself is the model's active adapter.

    Args:
        weights (`torch.Tensor`): `(num_prompts,)`, weights of the prompts in the last round, which sum to 1; from the
            second round on the last one is that of the student before.
        soft_labels (`torch.Tensor`): `(num_unlabelled, num_classes)`, of the last round.
        history (`list[dict]`): for each round `{"round", "num_unlabelled", "weights", "loss"}`.
    """

    weights: torch.Tensor
    soft_labels: torch.Tensor
    history: list[dict] = field(default_factory=list)


def teacher_logits(model: CoOpModel, prompts: list, image_embeds: torch.Tensor) -> torch.Tensor:
    """Logits of images under several prompts.

    Args:
        model (`CoOpModel`): gives base and classes; its adapter is not used.
        prompts (`list`): each one a template such as `"a photo of a {}."`, a list of templates (an ensemble), or class
            embeddings `(num_classes, projection_dim)`, as from [`cupl_class_embeddings`] or, for a learned prompt,
            `other_model.get_text_features()`.
        image_embeds (`torch.Tensor`): `(num_examples, projection_dim)`, normalised or not.

    Returns:
        `torch.Tensor` `(num_prompts, num_examples, num_classes)`, fp32.

    Raises:
        ValueError: no prompts, or class embeddings of another shape.
    """
    if isinstance(prompts, (str, torch.Tensor)) or len(prompts) == 0:
        raise ValueError(
            "`prompts` must be a list of templates, lists of templates or class embeddings; at least one."
        )
    expected = (len(model.class_names or ()), model.family.projection_dim)
    logits = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, torch.Tensor):
            prompt = class_embeddings(model, None, model.class_names or [], prompt)
        elif prompt.shape != expected:
            raise ValueError(
                f"prompt {index} gives class embeddings of shape {tuple(prompt.shape)}; expected {expected}, one for "
                "each of the model's classes."
            )
        logits.append(zero_shot_logits(model, prompt.detach(), image_embeds=image_embeds))
    return torch.stack(logits)


def prompt_weights(logits: torch.Tensor, labels: torch.Tensor, weighting: str = "accuracy") -> torch.Tensor:
    """The weight of each prompt, from its accuracy on labelled images.

    Args:
        logits (`torch.Tensor`): `(num_prompts, num_labelled, num_classes)`.
        labels (`torch.Tensor`): `(num_labelled,)`, class indices.
        weighting (`str`, *optional*, defaults to `"accuracy"`): `"accuracy"`: proportional to the share of right
            predictions; `"uniform"`: all the same, as they are too if no prompt gets any image right.

    Returns:
        `torch.Tensor` `(num_prompts,)`, fp32; they sum to 1.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` must be one of {', '.join(map(repr, WEIGHTINGS))}, got {weighting!r}.")
    weights = (logits.argmax(dim=-1) == labels.to(logits.device)).float().mean(dim=-1)
    if weighting == "uniform" or weights.sum() == 0:
        weights = torch.ones_like(weights)
    return weights / weights.sum()


def soft_labels(logits: torch.Tensor, weights: torch.Tensor | None = None, temperature: float = 2.0) -> torch.Tensor:
    """Soft labels: softmax of the weighted mean of the prompts' logits, divided by a temperature.

    Args:
        logits (`torch.Tensor`): `(num_prompts, num_examples, num_classes)`, as from [`teacher_logits`].
        weights (`torch.Tensor`, *optional*, defaults to equal ones): `(num_prompts,)`, not negative; divided by their
            sum.
        temperature (`float`, *optional*, defaults to 2.0): above 1 makes labels softer; the paper's value is 2.

    Returns:
        `torch.Tensor` `(num_examples, num_classes)`; rows sum to 1.

    Raises:
        ValueError: shapes that don't fit, negative weights or none above 0, a temperature that is not positive.
    """
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be a positive number, got {temperature!r}.")
    if weights is None:
        weights = torch.ones(len(logits))
    weights = torch.as_tensor(weights, dtype=torch.float32, device=logits.device)
    if logits.dim() != 3 or weights.shape != logits.shape[:1]:
        raise ValueError(
            "expected `logits` (num_prompts, num_examples, num_classes) and one weight for each prompt, got "
            f"{tuple(logits.shape)} and {tuple(weights.shape)}."
        )
    if (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"`weights` must not be negative, and one must be above 0, got {weights.tolist()}.")
    return (torch.einsum("p,pnc->nc", weights / weights.sum(), logits) / temperature).softmax(dim=-1)


def soft_label_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """KL(targets ‖ softmax(logits)), the mean over the images; its gradient is (softmax(logits) - targets) / n."""
    return F.kl_div(logits.log_softmax(dim=-1), targets, reduction="batchmean")


def _most_confident(targets: torch.Tensor, share: float) -> torch.Tensor:
    """Rows with the surest labels: of each predicted class the same share, at least one; ascending."""
    confidence, predicted = targets.max(dim=-1)
    rows = []
    for label in predicted.unique():
        own = torch.nonzero(predicted == label)[:, 0]
        best_first = own[confidence[own].sort(descending=True, stable=True).indices]
        rows.append(best_first[: math.ceil(share * len(own) - 1e-9)])
    return torch.cat(rows).sort().values


def fit_pet(
    model: CoOpModel,
    prompts: list,
    image_embeds: torch.Tensor,
    labels: torch.Tensor,
    unlabelled_embeds: torch.Tensor,
    weighting: str = "accuracy",
    temperature: float = 2.0,
    label_weight: float = 1.0,
    num_rounds: int = 1,
    growth: float = 2.0,
    num_steps: int = 200,
    learning_rate: float = 1e-2,
    seed: int | None = None,
    progress: bool = False,
) -> PetResult:
    """Teaches the model's active adapter what several prompts say about unlabelled images.

    Every step sees all images: Adam, a cosine to 0.

    Args:
        model (`CoOpModel`): its active adapter is the student; any kind of context. Saved, loaded and used as always.
        prompts (`list`): the teachers, see [`teacher_logits`].
        image_embeds (`torch.Tensor`): `(num_labelled, projection_dim)`, the few labelled images.
        labels (`torch.Tensor`): `(num_labelled,)`, class indices.
        unlabelled_embeds (`torch.Tensor`): `(num_unlabelled, projection_dim)`, images without labels.
        weighting (`str`, *optional*, defaults to `"accuracy"`): see [`prompt_weights`]. A teacher that was trained on
            the labelled images looks better on them than it is.
        temperature (`float`, *optional*, defaults to 2.0): T of the soft labels.
        label_weight (`float`, *optional*, defaults to 1.0): λ, weight of the labelled images; 0: soft labels alone.
        num_rounds (`int`, *optional*, defaults to 1): rounds as in iPET. In each but the first, the student before is
            one more teacher, and the student starts again.
        growth (`float`, *optional*, defaults to 2.0): by how much the number of unlabelled images grows from a round
            to the next, the surest of each class first; the last round takes all.
        num_steps (`int`, *optional*, defaults to 200): steps of a round.
        learning_rate (`float`, *optional*, defaults to 1e-2): at the start.
        seed (`int`, *optional*): draws a new start of the context from its configuration; by default the student
            starts from the context as it is. Nothing else is random.
        progress (`bool`, *optional*, defaults to `False`): show a progress bar.

    Returns:
        [`PetResult`].

    Raises:
        ValueError: shapes, labels or options that don't fit, or an adapter that was loaded for prediction.

    Example:

    ```python
    >>> result = fit_pet(model, ["a photo of a {}.", "a drawing of a {}."], image_embeds, labels, unlabelled_embeds)
    >>> model.save_pretrained("student")
    ```
    """
    check_counts(num_rounds=num_rounds, num_steps=num_steps)
    if not label_weight >= 0 or not growth >= 1:
        raise ValueError(f"`label_weight` must be at least 0 and `growth` at least 1, got {label_weight}, {growth}.")
    if not model.context.requires_grad:
        raise ValueError(f"the adapter {model.active_adapter!r} was loaded for prediction: use is_trainable=True.")
    labels = torch.as_tensor(labels).long().to(model.device)
    num_classes = len(model.class_names or ())
    if len(labels) != len(image_embeds) or len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"expected {len(image_embeds)} labels, at least one, from 0 to {num_classes - 1}.")
    if len(unlabelled_embeds) == 0:
        raise ValueError("`unlabelled_embeds` is empty: without unlabelled images, train with CoOpTrainer.")
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = init_context(model.config, model.family.token_embedding, model.tokenizer, num_classes)
        model.context.data.copy_(start)
    start = model.context.detach().clone()

    image_embeds = torch.as_tensor(image_embeds).detach().float().to(model.device)
    unlabelled_embeds = torch.as_tensor(unlabelled_embeds).detach().float().to(model.device)
    on_labelled = teacher_logits(model, prompts, image_embeds)
    on_unlabelled = teacher_logits(model, prompts, unlabelled_embeds)
    history = []
    with tqdm(total=num_rounds * num_steps, desc="PET", disable=not progress) as bar:
        for number in range(1, num_rounds + 1):
            if number > 1:
                with torch.no_grad():
                    students = [model(image_embeds=x).logits[None] for x in (image_embeds, unlabelled_embeds)]
                previous = len(on_labelled) if number == 2 else -1  # only the last student teaches
                on_labelled = torch.cat([on_labelled[:previous], students[0]])
                on_unlabelled = torch.cat([on_unlabelled[:previous], students[1]])
                model.context.data.copy_(start)
            weights = prompt_weights(on_labelled, labels, weighting)
            targets = soft_labels(on_unlabelled, weights, temperature)
            rows = _most_confident(targets, growth ** (number - num_rounds))
            loss = _teach(
                model,
                image_embeds,
                labels,
                unlabelled_embeds[rows],
                targets[rows],
                label_weight,
                num_steps,
                learning_rate,
                bar,
            )
            history.append({"round": number, "num_unlabelled": len(rows), "weights": weights.tolist(), "loss": loss})
    return PetResult(weights, targets, history)


def _teach(
    model: CoOpModel, image_embeds: torch.Tensor, labels: torch.Tensor, unlabelled: torch.Tensor,
    targets: torch.Tensor, label_weight: float, num_steps: int, learning_rate: float, bar: tqdm,
) -> float:  # fmt: skip
    """One round of training; returns the loss of the last step."""
    both = torch.cat([unlabelled, image_embeds])
    optimizer = torch.optim.Adam([model.context], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    was_training = model.training
    model.train()
    for _ in range(num_steps):
        logits = model(image_embeds=both).logits
        loss = soft_label_loss(logits[: len(unlabelled)], targets)
        if label_weight:
            loss = loss + label_weight * F.cross_entropy(logits[len(unlabelled) :], labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()}: lower the learning rate, or check the images.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    model.train(was_training)
    model.zero_grad()
    return loss.item()

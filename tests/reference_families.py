"""CoOp on every family once more, written from the paper and transformers alone; no line of it is `coop_hf`'s.

The prompt of a class is written as a sentence with the word "x" for every context vector, as a person would write it:

    end     x x x x sea lion.
    middle  x x sea lion x x.
    front   sea lion x x x x.

The family's own tokenizer reads the sentence in one go and pads it as the family's zero-shot pipeline does; the
family's own text model reads the ids; a hook on its word embedding puts the context vectors where the placeholders
stand. So mask, positions, norms, pooling, projection and padding are all the family's.
"""

import torch
from family_kit import text_kwargs


PLACEHOLDER = "x"


def clean(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def sentence(name: str, n_ctx: int, position: str) -> str:
    """The prompt of one class with a placeholder for each context vector."""
    before = slots_before(n_ctx, position)
    return " ".join([*[PLACEHOLDER] * before, clean(name), *[PLACEHOLDER] * (n_ctx - before)]) + "."


def slots_before(n_ctx: int, position: str) -> int:
    return {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]


def placeholder_ids(tokenizer) -> list[int]:
    """The token of the placeholder at the start of a text and behind a space, which may differ."""
    ids = tokenizer(f"{PLACEHOLDER} {PLACEHOLDER}", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 and tokenizer.unk_token_id not in ids, "the reference itself is wrong: no single token"
    return ids


def slots(tokenizer, name: str, n_ctx: int, position: str, width: int) -> list[int]:
    """Columns of the context vectors in the row of one class, padded to `width`, counted from both ends."""

    def count(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    length = len(tokenizer(sentence(name, n_ctx, position))["input_ids"])
    in_front = len(tokenizer("")["input_ids"]) - 1  # SOS, where there is one; all families have EOS
    full_stop = count(PLACEHOLDER + ".") - count(PLACEHOLDER)
    before = slots_before(n_ctx, position)
    after = n_ctx - before
    end = length - 1 - (full_stop if after else 0)
    padding = width - length if tokenizer.padding_side == "left" else 0
    return [padding + column for column in [*range(in_front, in_front + before), *range(end - after, end)]]


def reference_features(base, processor, class_names, context, position: str) -> torch.Tensor:
    """Class embeddings `(num_classes, projection_dim)`, projected, not normalised, with gradients to `context`.

    Args:
        base, processor: as `family_kit.make_family` gives them.
        class_names (`list[str]`): names without the word "x".
        context (`torch.Tensor`): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`.
        position (`str`): `"end"`, `"middle"` or `"front"`.
    """
    tokenizer, n_ctx = processor.tokenizer, context.shape[-2]
    texts = [sentence(name, n_ctx, position) for name in class_names]
    inputs = tokenizer(texts, return_tensors="pt", **text_kwargs(base))
    ids = inputs["input_ids"]
    where = torch.isin(ids, torch.tensor(placeholder_ids(tokenizer)))
    assert (where.sum(dim=1) == n_ctx).all(), "the reference itself is wrong: a placeholder merged, or a name has one"
    columns = where.nonzero()[:, 1].reshape(len(texts), n_ctx)
    expected = [slots(tokenizer, name, n_ctx, position, ids.shape[1]) for name in class_names]
    assert columns.tolist() == expected, "the reference itself is wrong: placeholders stand elsewhere"

    def write_context(module, args, output):
        vectors = context.to(output.dtype).expand(len(texts), -1, -1)
        return output.scatter(1, columns[..., None].expand(-1, -1, output.shape[-1]), vectors)

    (embedding,) = (
        module
        for name, module in base.text_model.named_modules()
        if name.endswith((".token_embedding", ".word_embeddings"))
    )
    handle = embedding.register_forward_hook(write_context)
    try:
        return base.get_text_features(**inputs).pooler_output
    finally:
        handle.remove()


def reference_logits(base, text_features, image_features) -> torch.Tensor:
    """The family's scores of features, in fp32: temperature or logit scale, and SigLIP's bias."""
    text = text_features.float() / text_features.float().norm(dim=-1, keepdim=True)
    image = image_features.float() / image_features.float().norm(dim=-1, keepdim=True)
    if hasattr(base, "temperature"):
        return image @ text.T / base.temperature.detach().float()
    bias = base.logit_bias.detach().float() if hasattr(base, "logit_bias") else 0.0
    return base.logit_scale.detach().float().exp() * image @ text.T + bias

"""CoOp once more, written from the paper alone: slow, full-length, and sharing no line with `coop_hf`.

The prompt of a class is written out as a sentence with the placeholder word "x" for every context vector, tokenised in
one go and padded to all positions of the tower. CLIP's own text model then reads these ids; a hook on its token
embedding puts the context vectors where the placeholders stand. So mask, position embeddings, pooling (both rules of
`eos_token_id`) and projection are all CLIP's.
"""

import torch


def sentence(name, n_ctx, position):
    """The prompt of one class with "x" for each context vector."""
    name = " ".join(name.replace("_", " ").split())
    half = n_ctx // 2
    if position == "end":
        return " ".join(["x"] * n_ctx + [name + "."])
    before = {"middle": half, "front": 0}[position]
    return " ".join(["x"] * before + [name] + ["x"] * (n_ctx - before) + ["."])


def slots(ids, n_ctx, position, eos_token_id):
    """Columns of the context vectors in one padded row of ids; those behind the name are counted from EOS."""
    eos = ids.index(eos_token_id)
    if position == "end":
        return list(range(1, 1 + n_ctx))
    before = n_ctx // 2 if position == "middle" else 0
    after = n_ctx - before
    return list(range(1, 1 + before)) + list(range(eos - 1 - after, eos - 1))


def reference_features(base, tokenizer, class_names, context, position, length=None):
    """Class embeddings (num_classes, projection_dim), projected and not normalised, with gradients to `context`."""
    n_ctx = context.shape[-2]
    placeholder = tokenizer("x")["input_ids"][1]
    texts = [sentence(name, n_ctx, position) for name in class_names]
    length = length or base.config.text_config.max_position_embeddings
    rows = tokenizer(texts, padding="max_length", max_length=length)["input_ids"]
    assert all(len(row) == length for row in rows)
    places = [slots(row, n_ctx, position, tokenizer.eos_token_id) for row in rows]
    assert all(rows[c][p] == placeholder for c in range(len(rows)) for p in places[c]), "the reference itself is wrong"
    where = torch.tensor(places)

    def write_context(module, inputs, output):
        vectors = context.to(output.dtype)
        if vectors.dim() == 2:
            vectors = vectors.unsqueeze(0).repeat(len(rows), 1, 1)
        index = where.to(output.device).unsqueeze(-1).expand(-1, -1, output.shape[-1])
        return output.scatter(1, index, vectors)

    handle = base.text_model.embeddings.token_embedding.register_forward_hook(write_context)
    try:
        return base.get_text_features(input_ids=torch.tensor(rows)).pooler_output
    finally:
        handle.remove()


def reference_logits(base, text_features, image_features):
    """exp(logit_scale) times the cosine, in fp32."""
    text = text_features.float() / text_features.float().norm(dim=-1, keepdim=True)
    image = image_features.float() / image_features.float().norm(dim=-1, keepdim=True)
    return torch.exp(base.logit_scale.detach().float()) * image @ text.t()


def zero_shot_features(base, tokenizer, class_names, template):
    """Class embeddings of a hand-written prompt, as CLIP's own documentation computes them."""
    texts = [template.format(name.replace("_", " ")) for name in class_names]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return base.get_text_features(**inputs).pooler_output


def relative_error(value, expected):
    """Norm of the difference over the norm of what is expected."""
    return ((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()

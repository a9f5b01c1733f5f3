"""The other prompt learners once more, written from their formulas alone: slow, full-length, a row for each class.

A stock `CLIPModel` reads ids that are padded to all positions; hooks put the prompts where they belong. Every image
goes through the whole image tower, and every function takes what is learned as plain tensors, so that each gradient
can be compared. Functions named `*_features` return class embeddings and image embeddings as the towers give them, not
normalised. The objectives are closed forms in double precision, values and gradients, without autograd.

CoCoOp https://arxiv.org/abs/2203.05557, VPT https://arxiv.org/abs/2203.12119, MaPLe https://arxiv.org/abs/2210.03117,
KgCoOp https://arxiv.org/abs/2303.13283, ProGrad https://arxiv.org/abs/2205.14865, TCP https://arxiv.org/abs/2311.18231,
PromptSRC https://arxiv.org/abs/2307.06948, TPT https://arxiv.org/abs/2209.07511, SigLIP
https://arxiv.org/abs/2303.15343. Where a paper and its official code differ, this is the code.
"""

import contextlib
import math

import torch
from reference import reference_features
from transformers import CLIPConfig, CLIPModel


def make_deep_base(
    tokenizer,
    layers=3,
    vision_layers=3,
    width=32,
    vision_width=48,
    projection_dim=32,
    positions=40,
    eos_token_id=2,
    hidden_act="quick_gelu",
    seed=0,
):
    """A small random CLIPModel with layers in both towers, and weights so large that no place is without effect."""
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": positions,
            "hidden_act": hidden_act,
            "eos_token_id": eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 2 * vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 4,
            "hidden_act": hidden_act,
            "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=projection_dim,
    )
    model = CLIPModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "logit_scale":
            parameter.fill_(math.log(10.0))
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif "embedding" in name:
            parameter.copy_(0.3 * noise)
        elif parameter.dim() >= 2:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.1 * noise)
    return model


# ---------------------------------------------------------------------- the towers


def padded_rows(base, tokenizer, texts):
    """Ids (texts, all positions)."""
    length = base.config.text_config.max_position_embeddings
    rows = tokenizer(texts, padding="max_length", max_length=length)["input_ids"]
    assert all(len(row) == length for row in rows), "a text is longer than the tower"
    return torch.tensor(rows)


def prompt_rows(base, tokenizer, class_names, n_ctx, template="{}."):
    """Ids of "x x ... template" with `n_ctx` placeholders, which stand at the positions 1 to `n_ctx`."""
    placeholder = tokenizer("x")["input_ids"][1]
    names = [" ".join(name.replace("_", " ").split()) for name in class_names]
    rows = padded_rows(base, tokenizer, [" ".join(["x"] * n_ctx + [template.format(name)]) for name in names])
    assert (rows[:, 1 : 1 + n_ctx] == placeholder).all(), "the reference itself is wrong"
    return rows


@contextlib.contextmanager
def hooks(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def before_layer(layer, change):
    """Hook that changes the hidden states at a block's input."""

    def hook(module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def text_pass(base, rows, prompts=None, places=None):
    """Class embeddings (num_classes, projection_dim) with `prompts`, layer -> (n, dim) or (num_classes, n, dim).

    Layer 0 takes the place of token embeddings, so position embeddings are added to it; layer k > 0 takes the place of
    hidden states at the input of block k. `places` (num_classes, n) are the columns; by default those behind SOS.
    """

    def write(hidden, vectors):
        vectors = vectors.to(hidden.dtype)
        if vectors.dim() == 2:
            vectors = vectors.unsqueeze(0).repeat(len(rows), 1, 1)
        columns = torch.arange(1, 1 + vectors.shape[1]).repeat(len(rows), 1) if places is None else places
        return hidden.scatter(1, columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]), vectors)

    handles = []
    for layer, vectors in (prompts or {}).items():
        if layer == 0:
            embedding = base.text_model.embeddings.token_embedding
            handles.append(embedding.register_forward_hook(lambda m, i, hidden, v=vectors: write(hidden, v)))
        else:
            block = base.text_model.encoder.layers[layer]
            handles.append(before_layer(block, lambda hidden, v=vectors: write(hidden, v)))
    with hooks(*handles):
        return base.get_text_features(input_ids=rows).pooler_output


def vision_pass(base, pixel_values, prompts=None):
    """Image embeddings (images, projection_dim) with `prompts`, layer -> (n, vision_dim).

    Layer 0 is appended to the patches after the position embeddings, before the first norm; layer k > 0 takes the
    place of the last n tokens at the input of block k.
    """

    def batch(vectors, hidden):
        return vectors.to(hidden.dtype).unsqueeze(0).repeat(len(hidden), 1, 1)

    def append(hidden, vectors):
        return torch.cat([hidden, batch(vectors, hidden)], dim=1)

    def replace(hidden, vectors):
        return torch.cat([hidden[:, : -len(vectors)], batch(vectors, hidden)], dim=1)

    handles = []
    for layer, vectors in (prompts or {}).items():
        if layer == 0:
            embedding = base.vision_model.embeddings
            handles.append(embedding.register_forward_hook(lambda m, i, hidden, v=vectors: append(hidden, v)))
        else:
            block = base.vision_model.encoder.layers[layer]
            handles.append(before_layer(block, lambda hidden, v=vectors: replace(hidden, v)))
    with hooks(*handles):
        return base.get_image_features(pixel_values).pooler_output


def normalised(features):
    return features / features.norm(dim=-1, keepdim=True)


def cosine_logits(base, text_features, image_features):
    """(images, num_classes), of class embeddings (num_classes, dim) or of each image (images, num_classes, dim)."""
    text, image = normalised(text_features), normalised(image_features)
    cosines = (image.unsqueeze(-2) * text).sum(-1)
    return base.logit_scale.detach().exp() * cosines + getattr(base, "logit_bias", 0.0)


def template_features(base, tokenizer, class_names, template="a photo of a {}."):
    """Class embeddings of a hand-written prompt, at full length."""
    texts = [template.format(" ".join(name.replace("_", " ").split())) for name in class_names]
    return text_pass(base, padded_rows(base, tokenizer, texts))


def ensemble_features(base, tokenizer, class_names, templates):
    """PromptSRC's: the mean over the templates of the features as they are, normalised once, at the end."""
    features = [template_features(base, tokenizer, class_names, template) for template in templates]
    return normalised(sum(features) / len(features))


def word_vectors(base, tokenizer, words, n):
    """The embeddings of the first n tokens of `words`, without positions."""
    ids = torch.tensor(tokenizer(words)["input_ids"][1 : 1 + n])
    return base.text_model.embeddings.token_embedding(ids).detach()


# ---------------------------------------------------------------------- the methods


def coop_features(base, tokenizer, class_names, pixel_values, context, position="end"):
    text = reference_features(base, tokenizer, class_names, context, position)
    return text, vision_pass(base, pixel_values)


def cocoop_shift(image_embeds, meta_net):
    """pi(v) = W2 relu(W1 v + b1) + b2, with `meta_net` = (W1, b1, W2, b2) and normalised image embeddings."""
    weight1, bias1, weight2, bias2 = meta_net
    hidden = image_embeds @ weight1.t() + bias1
    return hidden * (hidden > 0) @ weight2.t() + bias2


def cocoop_features(base, tokenizer, class_names, pixel_values, context, meta_net, position="end"):
    """CoCoOp: a text pass for each image, with context_m + pi(v). Class embeddings are (images, num_classes, dim)."""
    image = vision_pass(base, pixel_values)
    shifts = cocoop_shift(normalised(image), meta_net)
    text = [reference_features(base, tokenizer, class_names, context + shift, position) for shift in shifts]
    return torch.stack(text), image


def deep_text_features(base, tokenizer, class_names, pixel_values, prompts, template="{}."):
    """Deep text prompts: `prompts[0]` is the context, `prompts[k]` enters at block k. `template` has fixed words."""
    rows = prompt_rows(base, tokenizer, class_names, prompts[0].shape[-2], template)
    return text_pass(base, rows, dict(enumerate(prompts))), vision_pass(base, pixel_values)


def vpt_features(base, tokenizer, class_names, pixel_values, prompts, template="a photo of a {}."):
    """VPT: one prompt is shallow, several are deep; the text is the hand-written prompt."""
    text = template_features(base, tokenizer, class_names, template)
    return text, vision_pass(base, pixel_values, dict(enumerate(prompts)))


def ivlp_features(base, tokenizer, class_names, pixel_values, text_prompts, vision_prompts, template="{}."):
    """Independent prompts in both towers. Two text tokens of "a photo of a" leave `template="of a {}."`."""
    rows = prompt_rows(base, tokenizer, class_names, text_prompts[0].shape[-2], template)
    text = text_pass(base, rows, dict(enumerate(text_prompts)))
    return text, vision_pass(base, pixel_values, dict(enumerate(vision_prompts)))


def maple_features(base, tokenizer, class_names, pixel_values, prompts, couplings, template="of a {}."):
    """MaPLe: the visual prompt of layer k is W_k p_k + b_k of its text prompt, with `couplings[k]` = (W_k, b_k)."""
    vision = [prompt @ weight.t() + bias for prompt, (weight, bias) in zip(prompts, couplings)]
    return ivlp_features(base, tokenizer, class_names, pixel_values, prompts, vision, template)


def tcp_tokens(class_embeds, meta_net, n):
    """The class-aware tokens (num_classes, n, width): W2 quick_gelu(W1 T + b1) + b2 of normalised T, cut into n."""
    weight1, bias1, weight2, bias2 = meta_net
    hidden = class_embeds @ weight1.t() + bias1
    flat = hidden / (1 + torch.exp(-1.702 * hidden)) @ weight2.t() + bias2
    return torch.stack(flat.chunk(n, dim=-1), dim=1)


def tcp_features(
    base, tokenizer, class_names, pixel_values, context, meta_net, class_embeds=None, layer=8, template="{}."
):
    """TCP: the class-aware tokens stand at the context's places from the input of text block `layer` on.

    `class_embeds` (num_classes, dim), normalised; by default those of "a photo of a {}.". `layer` counts from 0.
    """
    if class_embeds is None:
        class_embeds = normalised(template_features(base, tokenizer, class_names)).detach()
    rows = prompt_rows(base, tokenizer, class_names, len(context), template)
    tokens = tcp_tokens(class_embeds, meta_net, len(context))
    return text_pass(base, rows, {0: context, layer: tokens}), vision_pass(base, pixel_values)


def entropy_of_mean(logits):
    """Entropy of the mean over the views (views, num_classes) of the predicted probabilities."""
    mean = torch.softmax(logits, dim=-1).mean(0)
    return -(mean * torch.log(mean)).sum()


def tpt(base, tokenizer, class_names, views, context, lr=5e-3, share=0.1, weight_decay=0.01, eps=1e-8, position="end"):
    """TPT on the views (views, 3, height, width) of one image, of which the first is the image itself.

    Returns a dict: `context` after the step, `gradient`, `loss` before it, `kept` (numbers of the confident views) and
    `logits` (num_classes,) of the first view with the new context. AdamW's first step, whose two moments are the
    gradient and its square, is c (1 - lr * weight_decay) - lr * g / (|g| + eps).
    """
    with torch.no_grad():
        image = vision_pass(base, views)
    context = context.detach().clone().requires_grad_()
    logits = cosine_logits(base, reference_features(base, tokenizer, class_names, context, position), image)
    probabilities = torch.softmax(logits.detach(), dim=-1)
    entropies = -(probabilities * torch.log(probabilities)).sum(-1)
    kept = sorted(range(len(views)), key=lambda i: entropies[i].item())[: max(1, int(len(views) * share))]
    loss = entropy_of_mean(logits[kept])
    (gradient,) = torch.autograd.grad(loss, context)
    with torch.no_grad():
        new = context * (1 - lr * weight_decay) - lr * gradient / (gradient.abs() + eps)
        text = reference_features(base, tokenizer, class_names, new, position)
        prediction = cosine_logits(base, text, image[:1])[0]
    return {
        "context": new.detach(),
        "gradient": gradient,
        "loss": loss.item(),
        "kept": kept,
        "logits": prediction,
    }


# ---------------------------------------------------------------------- the objectives
# Each returns the value and the gradients to what it is given, in double precision. Logits and embeddings count as
# given independently of each other; `pull_back` puts their gradients together into those of what was learned.


def counted(labels):
    """Rows that have a label: -100 counts for nothing."""
    return (labels != -100).nonzero().flatten()


def log_softmax(logits):
    logits = logits.detach().double()
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return logits - logits.exp().sum(-1, keepdim=True).log()


def cross_entropy(logits, labels):
    """(1/B) sum_i -log p_i,y, and (p - onehot) / B."""
    rows = counted(labels)
    log_p, gradient = log_softmax(logits), torch.zeros_like(logits, dtype=torch.float64)
    loss = -log_p[rows, labels[rows]].sum() / len(rows)
    gradient[rows] = log_p[rows].exp() / len(rows)
    gradient[rows, labels[rows]] -= 1 / len(rows)
    return loss, {"logits": gradient}


def kgcoop(logits, labels, text, frozen_text, weight=8.0):
    """CE + weight * mean_c (1 - cos(t_c, t0_c)): as in the official code, half of the paper's squared distance.

    The embeddings may have any length: the gradient to t is the cosine's own, (cos t/|t| - t0/|t0|) / |t|.
    """
    loss, gradients = cross_entropy(logits, labels)
    text, frozen_text = text.detach().double(), frozen_text.detach().double()
    unit, frozen_unit = normalised(text), normalised(frozen_text)
    cosines = (unit * frozen_unit).sum(-1, keepdim=True)
    share = weight / cosines.numel()
    gradient = share * (cosines * unit - frozen_unit) / text.norm(dim=-1, keepdim=True)
    return loss + share * (1 - cosines).sum(), {**gradients, "text": gradient}


def distillation(logits, labels, frozen_logits):
    """ProGrad's general loss: -(1/B) sum_i sum_c p0_ic log p_ic, and (p - p0) / B."""
    rows = counted(labels)
    log_p, p0 = log_softmax(logits), log_softmax(frozen_logits).exp()
    gradient = torch.zeros_like(log_p)
    gradient[rows] = (log_p.exp() - p0)[rows] / len(rows)
    return -(p0 * log_p)[rows].sum() / len(rows), {"logits": gradient}


def prograd_gradients(data_gradients, general_gradients, weight=1.0):
    """ProGrad, tensor by tensor: a conflict's part along the general gradient is taken out of the data's gradient."""
    gradients = {}
    for name, data in data_gradients.items():
        data, general = data.detach().double(), general_gradients[name].detach().double()
        product = (data * general).sum()
        gradients[name] = data - weight * product / (general * general).sum() * general if product < 0 else data
    return gradients


def promptsrc(
    logits,
    labels,
    text,
    image,
    frozen_text,
    frozen_image,
    frozen_logits=None,
    scale=None,
    text_weight=25.0,
    image_weight=10.0,
    logits_weight=1.0,
):
    """CE + 25 mean|t - t0| + 10 mean|v - v0| + (1 / (B C)) sum KL(p0 || p); all embeddings normalised.

    `frozen_logits` are `scale` * v0 t0' unless given.
    """
    loss, gradients = cross_entropy(logits, labels)
    text, frozen_text = text.detach().double(), frozen_text.detach().double()
    image, frozen_image = image.detach().double(), frozen_image.detach().double()
    if frozen_logits is None:
        frozen_logits = scale * frozen_image @ frozen_text.t()
    rows = counted(labels)
    log_p, log_p0 = log_softmax(logits), log_softmax(frozen_logits)
    pairs = len(rows) * logits.shape[-1]
    loss = loss + text_weight * (text - frozen_text).abs().sum() / text.numel()
    loss = loss + image_weight * (image - frozen_image)[rows].abs().sum() / (len(rows) * image.shape[-1])
    loss = loss + logits_weight * (log_p0.exp() * (log_p0 - log_p))[rows].sum() / pairs
    gradients["logits"][rows] += logits_weight * (log_p.exp() - log_p0.exp())[rows] / pairs
    gradients["text"] = text_weight * torch.sign(text - frozen_text) / text.numel()
    gradients["image"] = torch.zeros_like(image)
    gradients["image"][rows] = image_weight * torch.sign(image - frozen_image)[rows] / (len(rows) * image.shape[-1])
    return loss, gradients


def sigmoid_loss(logits, labels):
    """SigLIP: -(1/B) sum_i sum_c log sigmoid(z_ic l_ic), z = 1 for the label and -1 else; a mean over images alone."""
    rows = counted(labels)
    logits = logits.detach().double()
    signs = -torch.ones_like(logits)
    signs[rows, labels[rows]] = 1.0
    margins = signs * logits
    losses = torch.where(margins > 0, torch.log1p(torch.exp(-margins)), torch.log1p(torch.exp(margins)) - margins)
    gradient = torch.zeros_like(logits)
    gradient[rows] = (-signs / (1 + torch.exp(margins)))[rows] / len(rows)
    return losses[rows].sum() / len(rows), {"logits": gradient}


def pull_back(tensors, gradients, **outputs):
    """Gradients of the learned `tensors` (dict) from those of `outputs`: logits, and the normalised text and image."""
    names = [name for name in outputs if name in gradients]
    pulled = torch.autograd.grad(
        [outputs[name] for name in names],
        list(tensors.values()),
        [gradients[name].to(outputs[name].dtype) for name in names],
        retain_graph=True,
        allow_unused=True,
    )
    return {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(tensors.items(), pulled)}


def gaussian_weights(epochs, mean, std):
    """w_i proportional to N(i; mean, std^2) for the epochs i = 1 ... `epochs`, with sum 1."""
    values = [math.exp(-0.5 * ((epoch - mean) / std) ** 2) for epoch in range(1, epochs + 1)]
    return [value / sum(values) for value in values]


def gaussian_average(states, mean, std):
    """PromptSRC's average of what was learned (a list of dicts of tensors, one an epoch), in double precision."""
    weights = gaussian_weights(len(states), mean, std)
    return {k: sum(w * state[k].double() for w, state in zip(weights, states)) for k in states[0]}

"""Writes checkpoints as the public code of the prompt learners does, from given tensors.

All of it is trained by Dassl, which saves each registered model as `<output>/<its name>/model.pth.tar-<epoch>`.
CoCoOp, KgCoOp, ProGrad and TCP register the prompt learner; MaPLe, VPT, IVLP and PromptSRC the whole model, under the
names of OpenAI's CLIP and without its token embeddings. Each writer returns the file's path and the state dict in it,
whose tensors have the dtypes of a run with `precision` ("fp16" or "fp32"): what was learned is rounded there, so
compare with the state dict, not with what was given.

The public code writes 512 and 768 for the widths, 4 for TCP's class-aware tokens; here these are the base's and n_ctx.
"""

from collections import OrderedDict

import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR


DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
BUFFERS = ("token_prefix", "token_suffix")


def save(output, name, state, learned, epoch, optimizer_class=torch.optim.SGD, **extra):
    """The checkpoint file of the model `name`; the optimizer knows all its parameters and moved those in `learned`."""
    parameters = {key: torch.nn.Parameter(v.clone()) for key, v in state.items() if not key.endswith(BUFFERS)}
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {"eps": 1e-3}
    optimizer = optimizer_class(parameters.values(), lr=0.002, weight_decay=5e-4, **options)
    for key in learned:
        parameters[key].grad = torch.ones_like(parameters[key])
    optimizer.step()
    optimizer.zero_grad()
    scheduler = CosineAnnealingLR(optimizer, epoch)
    checkpoint = {
        "state_dict": state,
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        # The warm-up's scheduler keeps its successor, a whole object with the optimizer in it.
        "scheduler": {**scheduler.state_dict(), "successor": scheduler, "warmup_epoch": 1, "cons_lr": 1e-5},
        "val_result": np.float64(63.5),
        **extra,
    }
    path = output / name / f"model.pth.tar-{epoch}"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    (path.parent / "checkpoint").write_text(path.name + "\n")
    return path


def token_buffers(base, tokenizer, class_names, n_ctx, dtype, sentence):
    """`token_prefix`, the embedding of SOS, and `token_suffix`, of all that follows the context, padded with id 0.

    `sentence` is the prompt with "{}" for the class name; the first `n_ctx` of its tokens are the context's.
    """
    embedding = base.text_model.embeddings.token_embedding.weight.detach()
    rows = torch.zeros(len(class_names), base.config.text_config.max_position_embeddings, dtype=torch.long)
    for row, name in zip(rows, class_names):
        ids = tokenizer(sentence.format(name.replace("_", " ")))["input_ids"]
        row[: len(ids)] = torch.tensor(ids)
    embedded = embedding[rows].to(dtype)
    return OrderedDict(token_prefix=embedded[:, :1].clone(), token_suffix=embedded[:, 1 + n_ctx :].clone())


def as_words(n_ctx, words):
    """The prompt's beginning: the words that the context started from, else an "X" for each vector."""
    return words or " ".join(["X"] * n_ctx)


def plain(tensor, dtype=torch.float32):
    return tensor.detach().to(dtype).clone()


def linear(name, weight, bias, dtype):
    return {f"{name}.weight": plain(weight, dtype), f"{name}.bias": plain(bias, dtype)}


# ---------------------------------------------------------------------- the prompt learner alone


def prompt_learner(base, tokenizer, class_names, context, dtype, sentence):
    buffers = token_buffers(base, tokenizer, class_names, context.shape[-2], dtype, sentence)
    return OrderedDict(ctx=plain(context, dtype), **buffers)


def write_cocoop(
    output, base, tokenizer, class_names, context, meta_net, words="", precision="fp16", epoch=10, **extra
):
    """`context` (n, width); `meta_net` (W1, b1, W2, b2) with W1 (dim // 16, dim) and W2 (width, dim // 16)."""
    dtype = DTYPES[precision]
    sentence = as_words(len(context), words) + " {}."
    state = prompt_learner(base, tokenizer, class_names, context, dtype, sentence)
    state.update(linear("meta_net.linear1", *meta_net[:2], dtype) | linear("meta_net.linear2", *meta_net[2:], dtype))
    return save(output, "prompt_learner", state, set(state) - {*BUFFERS}, epoch, **extra), state


def write_kgcoop(output, base, tokenizer, class_names, context, precision="fp16", epoch=100, **extra):
    """`context` (n, width) or (classes, n, width); beside it stand a bias and a layer that nothing uses."""
    dtype, width = DTYPES[precision], context.shape[-1]
    sentence = as_words(context.shape[-2], "") + " {}."
    state = prompt_learner(base, tokenizer, class_names, context, dtype, sentence)
    generator = torch.Generator().manual_seed(99)
    unused = [torch.randn(*shape, generator=generator) for shape in ((1, width), (width, width), (width,))]
    state["bias_vectors"] = plain(0.02 * unused[0], dtype)
    state.move_to_end("bias_vectors", last=False)
    state.move_to_end("ctx", last=False)
    state.update(linear("meta_net.linear1", *unused[1:], dtype))
    return save(output, "prompt_learner", state, {"ctx"}, epoch, **extra), state


def write_prograd(output, base, tokenizer, class_names, context, words="", precision="fp16", epoch=100, **extra):
    """`context` (n, width) or (classes, n, width): no other file than CoOp's. Words stand in the last places."""
    dtype, n_ctx = DTYPES[precision], context.shape[-2]
    blanks = ["X"] * (n_ctx - len(words.split()))
    sentence = " ".join([*blanks, *words.split()]) + " {}."
    state = prompt_learner(base, tokenizer, class_names, context, dtype, sentence)
    return save(output, "prompt_learner", state, {"ctx"}, epoch, **extra), state


def write_tcp(
    output, base, tokenizer, class_names, context, meta_net, rest="{}.", precision="fp16", epoch=50, **extra
):
    """`meta_net` (W1, b1, W2, b2) with W1 (dim // 4, dim) and W2 (n * width, dim // 4); `rest` follows the context."""
    dtype = DTYPES[precision]
    sentence = as_words(len(context), "") + " " + rest
    state = prompt_learner(base, tokenizer, class_names, context, dtype, sentence)
    state.update(linear("meta_net.linear1", *meta_net[:2], dtype) | linear("meta_net.linear2", *meta_net[2:], dtype))
    learned = set(state) - {*BUFFERS}
    return save(output, "prompt_learner", state, learned, epoch, torch.optim.Adam, **extra), state


# ---------------------------------------------------------------------- the whole model


def blocks(layers, prefix, dtype):
    """The blocks of one tower under OpenAI's names: q, k and v are one matrix; norms stay fp32."""
    state = OrderedDict()
    for number, layer in enumerate(layers):
        name = f"{prefix}.transformer.resblocks.{number}"
        projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        state[f"{name}.attn.in_proj_weight"] = plain(torch.cat([p.weight for p in projections]), dtype)
        state[f"{name}.attn.in_proj_bias"] = plain(torch.cat([p.bias for p in projections]), dtype)
        state.update(
            linear(f"{name}.attn.out_proj", layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias, dtype)
        )
        state.update(linear(f"{name}.ln_1", layer.layer_norm1.weight, layer.layer_norm1.bias, torch.float32))
        state.update(linear(f"{name}.mlp.c_fc", layer.mlp.fc1.weight, layer.mlp.fc1.bias, dtype))
        state.update(linear(f"{name}.mlp.c_proj", layer.mlp.fc2.weight, layer.mlp.fc2.bias, dtype))
        state.update(linear(f"{name}.ln_2", layer.layer_norm2.weight, layer.layer_norm2.bias, torch.float32))
    return state


def image_encoder(base, dtype, prefix="image_encoder"):
    tower, embeddings = base.vision_model, base.vision_model.embeddings
    state = OrderedDict()
    state[f"{prefix}.class_embedding"] = plain(embeddings.class_embedding)
    state[f"{prefix}.positional_embedding"] = plain(embeddings.position_embedding.weight)
    state[f"{prefix}.proj"] = plain(base.visual_projection.weight.t(), dtype)
    state[f"{prefix}.conv1.weight"] = plain(embeddings.patch_embedding.weight, dtype)
    state.update(linear(f"{prefix}.ln_pre", tower.pre_layrnorm.weight, tower.pre_layrnorm.bias, torch.float32))
    state.update(blocks(tower.encoder.layers, prefix, dtype))
    state.update(linear(f"{prefix}.ln_post", tower.post_layernorm.weight, tower.post_layernorm.bias, torch.float32))
    return state


def text_encoder(base, dtype, prefix="text_encoder"):
    tower = base.text_model
    state = OrderedDict()
    state[f"{prefix}.positional_embedding"] = plain(tower.embeddings.position_embedding.weight)
    state[f"{prefix}.text_projection"] = plain(base.text_projection.weight.t(), dtype)
    state.update(blocks(tower.encoder.layers, prefix, dtype))
    norm = tower.final_layer_norm
    state.update(linear(f"{prefix}.ln_final", norm.weight, norm.bias, torch.float32))
    return state


def whole_model(base, learner, dtype):
    """`learner`: the prompt learner's own state dict."""
    state = OrderedDict(logit_scale=plain(base.logit_scale))
    state.update({f"prompt_learner.{key}": value for key, value in learner.items()})
    state.update(image_encoder(base, dtype))
    state.update(text_encoder(base, dtype))
    return state


def deep_prompts(text_prompts, vision_prompts):
    """The prompts that live in the towers; fp32 in every run, and all but one named "shallow"."""
    state = {}
    for number, prompt in enumerate(text_prompts):
        if number > 0:
            state[f"text_encoder.transformer.resblocks.{number}.VPT_shallow"] = plain(prompt)
    for number, prompt in enumerate(vision_prompts):
        place = f"transformer.resblocks.{number}.VPT_shallow" if number > 0 else "VPT"
        state[f"image_encoder.{place}"] = plain(prompt)
    return state


def write_maple(
    output, base, tokenizer, class_names, prompts, couplings, words="a photo of a", precision="fp16", epoch=5, **extra
):
    """`prompts`: (n, width) for each of the J layers; `couplings`: (W, b) of each, W (vision width, width)."""
    dtype = DTYPES[precision]
    sentence = as_words(len(prompts[0]), words) + " {}."
    learner = prompt_learner(base, tokenizer, class_names, prompts[0], dtype, sentence)
    learner.update(linear("proj", *couplings[0], torch.float16))  # halved in every run
    for number, prompt in enumerate(prompts[1:]):
        learner[f"compound_prompts_text.{number}"] = plain(prompt)
    for number, (weight, bias) in enumerate(couplings[1:]):
        learner.update(linear(f"compound_prompt_projections.{number}", weight, bias, torch.float32))
    state = whole_model(base, learner, dtype)
    learned = {f"prompt_learner.{key}" for key in learner if key not in BUFFERS}
    return save(output, "MultiModalPromptLearner", state, learned, epoch, **extra), state


def write_vpt(output, base, prompts, epoch=5, **extra):
    """`prompts`: (n, vision width) for each of the J layers. There is no prompt learner in it, and all is fp32."""
    state = whole_model(base, {}, torch.float32)
    learned = deep_prompts([], prompts)
    state.update(learned)
    return save(output, "prompt_learner", state, learned, epoch, **extra), state


def write_ivlp(
    output,
    base,
    tokenizer,
    class_names,
    text_prompts,
    vision_prompts,
    words="a photo of a",
    precision="fp16",
    epoch=5,
    **extra,
):
    """`text_prompts`: (n, width), `vision_prompts`: (n, vision width) for each layer; the latter may be empty."""
    dtype = DTYPES[precision]
    sentence = as_words(len(text_prompts[0]), words) + " {}."
    learner = prompt_learner(base, tokenizer, class_names, text_prompts[0], dtype, sentence)
    state = whole_model(base, learner, dtype)
    deep = deep_prompts(text_prompts, vision_prompts)
    state.update(deep)
    return save(output, "VLPromptLearner", state, {"prompt_learner.ctx", *deep}, epoch, **extra), state


def write_promptsrc(
    output,
    base,
    tokenizer,
    class_names,
    text_prompts,
    vision_prompts,
    words="a photo of a",
    precision="fp16",
    epoch=20,
    mean=15,
    std=1,
    **extra,
):
    """As IVLP's, with the frozen image tower beside the other, and all of it summed up over the epochs.

    The average over the epochs is taken of every tensor in the tensor's own dtype. What did not learn therefore comes
    back rounded; what learned is given here as its average.
    """
    dtype = DTYPES[precision]
    sentence = as_words(len(text_prompts[0]), words) + " {}."
    learner = prompt_learner(base, tokenizer, class_names, text_prompts[0], dtype, sentence)
    learner.update(image_encoder(base, dtype, "ZS_image_encoder"))
    state = whole_model(base, learner, dtype)
    weights = np.exp(-0.5 * ((np.arange(1, epoch + 1) - mean) / std) ** 2)
    weights = weights / weights.sum()
    for key, value in state.items():
        if key != "prompt_learner.ctx":
            state[key] = sum(value * float(weight) for weight in weights)
    deep = deep_prompts(text_prompts, vision_prompts)
    state.update(deep)
    return save(output, "VLPromptLearner", state, {"prompt_learner.ctx", *deep}, epoch, **extra), state

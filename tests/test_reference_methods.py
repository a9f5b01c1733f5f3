"""The references of `reference_methods` held to plain CLIP, to CoOp's reference and to PyTorch's own losses."""

import pytest
import reference_methods as ref
import torch
import transformers
from reference import reference_features, relative_error, zero_shot_features
from torch.nn import functional as F


NAMES = ["cat", "sea_lion", "a dog of the sea"]
TIGHT = 2e-6


def draw(*shape, seed=0, scale=0.5):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[2, "true"], ids=["eos 2", "eos true"])
def deep_base(request, tokenizer):
    eos = tokenizer.eos_token_id if request.param == "true" else 2
    act = "gelu" if request.param == "true" else "quick_gelu"
    return ref.make_deep_base(tokenizer, eos_token_id=eos, hidden_act=act)


@pytest.fixture(scope="module")
def pixels():
    return draw(3, 3, 16, 16, seed=1, scale=1.0)


def hidden_at(block, run):
    """The hidden states at a block's input during `run()`."""
    seen = []
    with ref.hooks(ref.before_layer(block, lambda hidden: seen.append(hidden) or hidden)):
        run()
    return seen[0].detach()


def close(value, expected, tolerance=TIGHT):
    return relative_error(value, expected) < tolerance


# ---------------------------------------------------------------------- the towers


def test_nothing_prompted_is_plain_clip(deep_base, tokenizer, pixels):
    expected = deep_base.get_image_features(pixels).pooler_output
    assert torch.equal(ref.vision_pass(deep_base, pixels), expected)
    text = ref.template_features(deep_base, tokenizer, NAMES)
    assert close(text, zero_shot_features(deep_base, tokenizer, NAMES, "a photo of a {}."))
    inputs = tokenizer(["a photo of a cat."], return_tensors="pt")
    own = deep_base(pixel_values=pixels, **inputs).logits_per_image
    assert close(ref.cosine_logits(deep_base, text[:1], expected), own)


def test_context_alone_is_coop(deep_base, tokenizer):
    for context in (draw(4, 32), draw(3, 4, 32)):
        rows = ref.prompt_rows(deep_base, tokenizer, NAMES, 4)
        expected = reference_features(deep_base, tokenizer, NAMES, context, "end")
        assert torch.equal(ref.text_pass(deep_base, rows, {0: context}), expected)


def test_vision_prompts_stand_where_they_should(deep_base, pixels):
    """Block by block, without hooks."""
    first, second = draw(2, 48, seed=2), draw(2, 48, seed=3)
    tower = deep_base.vision_model
    hidden = torch.cat([tower.embeddings(pixels), first.expand(3, -1, -1)], dim=1)
    hidden = tower.pre_layrnorm(hidden)
    assert hidden.shape[1] == 1 + 4 + 2
    for number, block in enumerate(tower.encoder.layers):
        if number == 1:
            hidden = torch.cat([hidden[:, :5], second.expand(3, -1, -1)], dim=1)
        hidden = block(hidden, None)
    expected = deep_base.visual_projection(tower.post_layernorm(hidden[:, 0]))
    assert close(ref.vision_pass(deep_base, pixels, {0: first, 1: second}), expected)


def test_text_prompts_stand_where_they_should(deep_base, tokenizer):
    context, second = draw(2, 32, seed=2), draw(2, 32, seed=3)
    tower, rows = deep_base.text_model, ref.prompt_rows(deep_base, tokenizer, NAMES, 2, "of a {}.")
    embeddings = tower.embeddings.token_embedding(rows)
    hidden = torch.cat([embeddings[:, :1], context.expand(3, -1, -1), embeddings[:, 3:]], dim=1)
    hidden = hidden + tower.embeddings.position_embedding.weight
    mask = torch.full((40, 40), float("-inf")).triu(1)[None, None].expand(3, 1, -1, -1)
    for number, block in enumerate(tower.encoder.layers):
        if number == 1:
            hidden = torch.cat([hidden[:, :1], second.expand(3, -1, -1), hidden[:, 3:]], dim=1)
        hidden = block(hidden, mask)
    ends = (rows == tokenizer.eos_token_id).int().argmax(-1)
    expected = deep_base.text_projection(tower.final_layer_norm(hidden)[torch.arange(3), ends])
    assert close(ref.text_pass(deep_base, rows, {0: context, 1: second}), expected)


def test_deep_prompts_equal_to_what_stands_there_change_nothing(deep_base, tokenizer, pixels):
    context, first = draw(4, 32), draw(2, 48)
    rows = ref.prompt_rows(deep_base, tokenizer, NAMES, 4)
    shallow = ref.text_pass(deep_base, rows, {0: context})
    vision = ref.vision_pass(deep_base, pixels[:1], {0: first})
    text_prompts, vision_prompts = {0: context}, {0: first}
    for layer in (1, 2):
        block = deep_base.text_model.encoder.layers[layer]
        hidden = hidden_at(block, lambda: ref.text_pass(deep_base, rows, {0: context}))[:, 1:5]
        assert torch.allclose(hidden[0], hidden[1], atol=1e-6), "a causal tower: the same for every class"
        text_prompts[layer] = hidden[0]
        block = deep_base.vision_model.encoder.layers[layer]
        vision_prompts[layer] = hidden_at(block, lambda: ref.vision_pass(deep_base, pixels[:1], {0: first}))[0, -2:]
    assert close(ref.text_pass(deep_base, rows, text_prompts), shallow)
    assert close(ref.vision_pass(deep_base, pixels[:1], vision_prompts), vision)
    text_prompts[2] = text_prompts[2] + draw(4, 32, seed=7)  # not a constant, which the norms would take out again
    vision_prompts[2] = vision_prompts[2] + draw(2, 48, seed=8)
    assert not close(ref.text_pass(deep_base, rows, text_prompts), shallow, 1e-3)
    assert not close(ref.vision_pass(deep_base, pixels[:1], vision_prompts), vision, 1e-3)


def test_places_of_the_context(deep_base, tokenizer):
    """The middle position: two vectors in front of the name, two in front of the full stop."""
    context = draw(4, 32)
    texts = [f"x x {name.replace('_', ' ')} x x ." for name in NAMES]
    rows = ref.padded_rows(deep_base, tokenizer, texts)
    ends = (rows == tokenizer.eos_token_id).int().argmax(-1)
    places = torch.stack([torch.tensor([1, 2, end - 3, end - 2]) for end in ends.tolist()])
    expected = reference_features(deep_base, tokenizer, NAMES, context, "middle")
    assert torch.equal(ref.text_pass(deep_base, rows, {0: context}, places), expected)
    deep = ref.text_pass(deep_base, rows, {0: context, 1: draw(3, 4, 32, seed=1)}, places)
    assert not close(deep, expected, 1e-2)


def other_family(name):
    towers = [{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}] * 2
    text = {**towers[0], "vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49}
    vision = {**towers[1], "image_size": 16, "patch_size": 8}
    if name == "siglip":
        text["projection_size"] = 32
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    else:
        config = transformers.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {"siglip": transformers.SiglipModel, "metaclip_2": transformers.MetaClip2Model}[name](config).eval()
    for number, parameter in enumerate(model.requires_grad_(False).parameters()):
        if parameter.dim() >= 2:
            parameter.copy_(draw(*parameter.shape, seed=number))
    return model


@pytest.mark.parametrize("name", ["siglip", "metaclip_2"])
def test_the_passes_of_other_families(name, pixels):
    base = other_family(name)
    rows = torch.tensor([[48, 1, 1, 7, 49] + [49] * 7, [48, 1, 1, 8, 9, 10, 49] + [49] * 5])
    expected = base.get_text_features(input_ids=rows).pooler_output
    assert torch.equal(ref.text_pass(base, rows), expected)
    block = base.text_model.encoder.layers[1]
    standing = hidden_at(block, lambda: ref.text_pass(base, rows))[:, 1:3]
    same = {0: base.text_model.embeddings.token_embedding(rows[:, 1:3]), 1: standing}
    assert close(ref.text_pass(base, rows, same), expected)
    assert not close(ref.text_pass(base, rows, {**same, 1: draw(2, 32)}), expected, 1e-2)
    first = draw(2, 32)
    shallow = ref.vision_pass(base, pixels[:1], {0: first})
    assert not close(shallow, ref.vision_pass(base, pixels[:1]), 1e-2)
    block = base.vision_model.encoder.layers[1]
    standing = hidden_at(block, lambda: ref.vision_pass(base, pixels[:1], {0: first}))[0, -2:]
    assert close(ref.vision_pass(base, pixels[:1], {0: first, 1: standing}), shallow)
    own = base(input_ids=rows, pixel_values=pixels).logits_per_image
    assert torch.allclose(ref.cosine_logits(base, expected, ref.vision_pass(base, pixels)), own, atol=1e-5)


def test_hooks_are_gone_after_an_error(deep_base, pixels):
    expected = ref.vision_pass(deep_base, pixels)
    with pytest.raises(RuntimeError):
        ref.vision_pass(deep_base, pixels, {0: draw(2, 48), 1: draw(2, 47)})
    assert torch.equal(ref.vision_pass(deep_base, pixels), expected)


# ---------------------------------------------------------------------- the methods


def meta_net(inputs=32, hidden=2, outputs=32, seed=5):
    """Large enough that the images, which are alike, do not all give the same."""
    shapes = [(hidden, inputs), (hidden,), (outputs, hidden), (outputs,)]
    return [draw(*shape, seed=seed + i, scale=2.0) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_cocoop_with_a_constant_meta_net_is_coop(deep_base, tokenizer, pixels, position):
    context = draw(4, 32)
    weight1, bias1, weight2, bias2 = meta_net()
    for bias in (torch.zeros(32), bias2):
        net = (weight1, bias1, torch.zeros_like(weight2), bias)
        text, image = ref.cocoop_features(deep_base, tokenizer, NAMES, pixels, context, net, position)
        expected, plain = ref.coop_features(deep_base, tokenizer, NAMES, pixels, context + bias, position)
        assert torch.equal(image, plain) and close(text, expected.expand(3, -1, -1))
        assert close(ref.cosine_logits(deep_base, text, image), ref.cosine_logits(deep_base, expected, plain))


def test_cocoop_reads_each_image_alone_and_normalised(deep_base, tokenizer, pixels):
    context, net = draw(4, 32), meta_net(hidden=8)
    text, image = ref.cocoop_features(deep_base, tokenizer, NAMES, pixels, context, net)
    alone = ref.cocoop_features(deep_base, tokenizer, NAMES, pixels[1:2], context, net)[0]
    assert close(text[1:2], alone) and not close(text[0], text[1], 1e-2)
    linear1, linear2 = torch.nn.Linear(32, 8), torch.nn.Linear(8, 32)
    for parameter, value in zip([*linear1.parameters(), *linear2.parameters()], net):
        parameter.data = value
    expected = linear2(torch.relu(linear1(F.normalize(image, dim=-1))))
    assert torch.allclose(ref.cocoop_shift(ref.normalised(image), net), expected, atol=1e-6)
    shifted = reference_features(deep_base, tokenizer, NAMES, context + expected[1], "end")
    assert close(text[1], shifted.detach())


def test_methods_of_depth_one(deep_base, tokenizer, pixels):
    context, vision = draw(4, 32), draw(2, 48)
    coop, plain = ref.coop_features(deep_base, tokenizer, NAMES, pixels, context)
    assert torch.equal(ref.deep_text_features(deep_base, tokenizer, NAMES, pixels, [context])[0], coop)
    text, image = ref.ivlp_features(deep_base, tokenizer, NAMES, pixels, [context], [vision])
    assert torch.equal(text, coop) and not close(image, plain, 1e-3)
    vpt_text, vpt_image = ref.vpt_features(deep_base, tokenizer, NAMES, pixels, [vision])
    assert torch.equal(vpt_image, image)
    assert torch.equal(vpt_text, ref.template_features(deep_base, tokenizer, NAMES))
    assert torch.equal(ref.ivlp_features(deep_base, tokenizer, NAMES, pixels, [context], [])[1], plain)


def test_maple_starts_at_the_hand_written_prompt(deep_base, tokenizer, pixels):
    """ "of a" stays in the prompt as fixed words."""
    start = ref.word_vectors(deep_base, tokenizer, "a photo of a", 2)
    coupling = (draw(48, 32), draw(48))
    text, _ = ref.maple_features(deep_base, tokenizer, NAMES, pixels, [start], [coupling])
    assert close(text, ref.template_features(deep_base, tokenizer, NAMES))


def test_maple_is_ivlp_with_projected_prompts(deep_base, tokenizer, pixels):
    prompts = [draw(2, 32, seed=i) for i in range(3)]
    couplings = [(draw(48, 32, seed=10 + i), draw(48, seed=20 + i)) for i in range(3)]
    text, image = ref.maple_features(deep_base, tokenizer, NAMES, pixels, prompts, couplings)
    vision = [F.linear(p, w, b) for p, (w, b) in zip(prompts, couplings)]
    expected = ref.ivlp_features(deep_base, tokenizer, NAMES, pixels, prompts, vision, "of a {}.")
    assert close(text, expected[0]) and close(image, expected[1])
    constant = [(torch.zeros(48, 32), b) for _, b in couplings]
    image = ref.maple_features(deep_base, tokenizer, NAMES, pixels, prompts, constant)[1]
    assert close(image, ref.vision_pass(deep_base, pixels, {i: b.expand(2, -1) for i, (_, b) in enumerate(constant)}))


@pytest.mark.parametrize("layer", [1, 2])
def test_tcp(deep_base, tokenizer, pixels, layer):
    context = draw(4, 32)
    rows = ref.prompt_rows(deep_base, tokenizer, NAMES, 4)
    net = meta_net(32, 8, 4 * 32)
    constant = (net[0], net[1], torch.zeros_like(net[2]), net[3])
    text, image = ref.tcp_features(deep_base, tokenizer, NAMES, pixels, context, constant, layer=layer)
    shared = net[3].reshape(4, 32)
    assert close(text, ref.text_pass(deep_base, rows, {0: context, layer: shared}))
    assert torch.equal(image, ref.vision_pass(deep_base, pixels))
    block = deep_base.text_model.encoder.layers[layer]
    standing = hidden_at(block, lambda: ref.text_pass(deep_base, rows, {0: context}))[0, 1:5]
    same = (net[0], net[1], torch.zeros_like(net[2]), standing.flatten())
    text, _ = ref.tcp_features(deep_base, tokenizer, NAMES, pixels, context, same, layer=layer)
    assert close(text, reference_features(deep_base, tokenizer, NAMES, context, "end"))


def test_tcp_tokens():
    class_embeds, net = ref.normalised(draw(3, 32)), meta_net(32, 8, 4 * 32)
    hidden = F.linear(class_embeds, net[0], net[1])
    expected = F.linear(hidden * torch.sigmoid(1.702 * hidden), net[2], net[3]).reshape(3, 4, 32)
    assert torch.allclose(ref.tcp_tokens(class_embeds, net, 4), expected, atol=1e-6)


def test_ensemble(deep_base, tokenizer):
    templates = ["a photo of a {}.", "{} of sea.", "a {}"]
    means = torch.stack([zero_shot_features(deep_base, tokenizer, NAMES, t) for t in templates]).mean(0)
    assert close(ref.ensemble_features(deep_base, tokenizer, NAMES, templates), F.normalize(means, dim=-1))


def test_tpt(deep_base, tokenizer):
    views, context = draw(24, 3, 16, 16, seed=3, scale=1.0), draw(4, 32)
    out = ref.tpt(deep_base, tokenizer, NAMES, views, context)
    text, image = ref.coop_features(deep_base, tokenizer, NAMES, views, context)
    entropies = torch.distributions.Categorical(logits=ref.cosine_logits(deep_base, text, image)).entropy()
    assert set(out["kept"]) == set(entropies.argsort()[:2].tolist())
    learned = torch.nn.Parameter(context.clone())
    optimizer = torch.optim.AdamW([learned], lr=5e-3)
    text = reference_features(deep_base, tokenizer, NAMES, learned, "end")
    kept = ref.cosine_logits(deep_base, text, image[out["kept"]])
    loss = torch.distributions.Categorical(probs=kept.softmax(-1).mean(0)).entropy()
    loss.backward()
    optimizer.step()
    assert abs(loss.item() - out["loss"]) < 1e-6 and close(out["gradient"], learned.grad, 1e-5)
    assert torch.allclose(out["context"], learned.detach(), atol=1e-6)
    after, _ = ref.coop_features(deep_base, tokenizer, NAMES, views[:1], learned.detach())
    assert close(out["logits"], ref.cosine_logits(deep_base, after, image[:1])[0], 1e-5)
    again = ref.tpt(deep_base, tokenizer, NAMES, views.roll(-out["kept"][0], 0), context)
    assert again["kept"][0] == 0 and close(again["context"], out["context"], 1e-5), "the image itself counts as well"
    still = ref.tpt(deep_base, tokenizer, NAMES, views, context, lr=0.0)
    assert torch.equal(still["context"], context)
    small = ref.tpt(deep_base, tokenizer, NAMES, views, context, lr=1e-4, weight_decay=0.0)
    text = reference_features(deep_base, tokenizer, NAMES, small["context"], "end")
    assert ref.entropy_of_mean(ref.cosine_logits(deep_base, text, image[out["kept"]])).item() < out["loss"]


@pytest.mark.parametrize("method", ["cocoop", "ivlp", "maple", "tcp"])
def test_every_learned_tensor_has_a_gradient(deep_base, tokenizer, pixels, method):
    prompts, vision = [draw(2, 32, seed=i) for i in range(3)], [draw(2, 48, seed=i) for i in range(3)]
    couplings = [(draw(48, 32, seed=10 + i), draw(48, seed=20 + i)) for i in range(3)]
    context, net, wide = draw(2, 32), meta_net(hidden=8), meta_net(32, 8, 2 * 32)
    cases = {
        "cocoop": (ref.cocoop_features, [context, net]),
        "ivlp": (ref.ivlp_features, [prompts, vision]),
        "maple": (ref.maple_features, [prompts, couplings]),
        "tcp": (lambda *a: ref.tcp_features(*a, layer=1), [context, wide]),
    }
    features, arguments = cases[method]
    leaves = torch.utils._pytree.tree_leaves(arguments)
    for leaf in leaves:
        leaf.requires_grad_()
    text, image = features(deep_base, tokenizer, NAMES, pixels, *arguments)
    F.cross_entropy(ref.cosine_logits(deep_base, text, image), torch.tensor([0, 2, 1])).backward()
    assert all(leaf.grad is not None and leaf.grad.norm() > 0 for leaf in leaves)


# ---------------------------------------------------------------------- the objectives


LABELS = [torch.tensor([0, 3, 1, 3, 2]), torch.tensor([0, -100, 1, -100, 2])]


def double(*shape, seed):
    return draw(*shape, seed=seed, scale=2.0).double().requires_grad_()


def agrees(closed, loss, **tensors):
    value, gradients = closed
    expected = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()))))
    assert set(gradients) == set(expected)
    assert torch.allclose(value, loss.detach(), rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("labels", LABELS)
def test_cross_entropy_and_distillation(labels):
    logits, frozen = double(5, 4, seed=1), double(5, 4, seed=2).detach()
    agrees(ref.cross_entropy(logits, labels), F.cross_entropy(logits, labels), logits=logits)
    rows = labels != -100
    loss = F.cross_entropy(logits[rows], frozen[rows].softmax(-1))
    agrees(ref.distillation(logits, labels, frozen), loss, logits=logits)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", [(4, 8), (5, 4, 8)], ids=["classes", "by image"])
def test_kgcoop(labels, shape):
    logits, text, frozen = double(5, 4, seed=1), double(*shape, seed=2), double(4, 8, seed=3).detach()
    distance = (1 - F.cosine_similarity(text, frozen.expand(shape), dim=-1)).mean()
    loss = F.cross_entropy(logits, labels) + 8 * distance
    agrees(ref.kgcoop(logits, labels, text, frozen), loss, logits=logits, text=text)
    assert torch.allclose(8 * distance, 4 * (ref.normalised(text) - ref.normalised(frozen)).square().sum(-1).mean()), (
        "half of the squared distance"
    )
    same = ref.kgcoop(logits, labels, frozen, frozen)
    assert torch.allclose(same[0], ref.cross_entropy(logits, labels)[0]) and same[1]["text"].abs().max() < 1e-12


@pytest.mark.parametrize("labels", LABELS)
def test_promptsrc(labels):
    logits, text, image = double(5, 4, seed=1), double(4, 8, seed=2), double(5, 8, seed=3)
    frozen_text, frozen_image = double(4, 8, seed=4).detach(), double(5, 8, seed=5).detach()
    frozen = 10 * frozen_image @ frozen_text.t()
    rows = labels != -100
    loss = F.cross_entropy(logits, labels) + 25 * F.l1_loss(text, frozen_text)
    loss = loss + 10 * F.l1_loss(image[rows], frozen_image[rows])
    targets = frozen[rows].log_softmax(-1)
    divergence = F.kl_div(logits[rows].log_softmax(-1), targets, reduction="sum", log_target=True)
    loss = loss + divergence / logits[rows].numel()
    closed = ref.promptsrc(logits, labels, text, image, frozen_text, frozen_image, scale=10.0)
    agrees(closed, loss, logits=logits, text=text, image=image)
    same = ref.promptsrc(logits, labels, frozen_text, frozen_image, frozen_text, frozen_image, frozen_logits=logits)
    assert torch.allclose(same[0], ref.cross_entropy(logits, labels)[0])


@pytest.mark.parametrize("labels", LABELS)
def test_sigmoid_loss(labels):
    logits = double(5, 4, seed=1)
    rows = labels != -100
    targets = F.one_hot(labels[rows], 4).double()
    loss = F.binary_cross_entropy_with_logits(logits[rows], targets, reduction="sum") / rows.sum()
    agrees(ref.sigmoid_loss(logits, labels), loss, logits=logits)
    extreme = torch.tensor([[800.0, -800.0]])
    assert (
        ref.sigmoid_loss(extreme, torch.tensor([0]))[0] == 0
        and ref.sigmoid_loss(extreme, torch.tensor([1]))[0] == 1600
    )


def test_prograd():
    data = {"a": draw(3, 4, seed=1), "b": draw(5, seed=2), "c": draw(2, seed=3)}
    general = {"a": draw(3, 4, seed=4) - data["a"], "b": draw(5, seed=5) + data["b"] * 9, "c": torch.zeros(2)}
    out = ref.prograd_gradients(data, general)
    assert (data["a"] * general["a"]).sum() < 0 < (data["b"] * general["b"]).sum()
    assert abs((out["a"] * general["a"]).sum()) < 1e-6, "nothing is left along the general gradient"
    unit = general["a"] / general["a"].norm()
    assert torch.allclose(out["a"].float(), data["a"] - (data["a"] * unit).sum() * unit, atol=1e-6)
    assert torch.equal(out["b"], data["b"].double()) and torch.equal(out["c"], data["c"].double())
    half = ref.prograd_gradients(data, general, weight=0.5)["a"]
    assert torch.allclose(half, (out["a"] + data["a"].double()) / 2)
    assert torch.equal(ref.prograd_gradients(data, general, weight=0.0)["a"], data["a"].double())


def test_pull_back_is_the_whole_gradient(deep_base, tokenizer, pixels):
    """PromptSRC's objective on IVLP, against differentiation from end to end."""
    labels = torch.tensor([0, 2, 1])
    tensors = {"text": [draw(2, 32, seed=i) for i in range(2)], "vision": [draw(2, 48, seed=i) for i in range(2)]}
    leaves = {f"{k}.{i}": t.requires_grad_() for k, ts in tensors.items() for i, t in enumerate(ts)}
    leaves["unused"] = torch.zeros(3, requires_grad=True)
    text, image = ref.ivlp_features(deep_base, tokenizer, NAMES, pixels, tensors["text"], tensors["vision"])
    outputs = {"logits": ref.cosine_logits(deep_base, text, image)}
    outputs |= {"text": ref.normalised(text), "image": ref.normalised(image)}
    frozen_text = ref.ensemble_features(deep_base, tokenizer, NAMES, ["a photo of a {}.", "{} of sea."])
    frozen_image = ref.normalised(ref.vision_pass(deep_base, pixels))
    scale = deep_base.logit_scale.exp()
    _, gradients = ref.promptsrc(
        outputs["logits"], labels, outputs["text"], outputs["image"], frozen_text, frozen_image, scale=scale
    )
    pulled = ref.pull_back(leaves, gradients, **outputs)
    loss = F.cross_entropy(outputs["logits"], labels) + 25 * F.l1_loss(outputs["text"], frozen_text)
    loss = loss + 10 * F.l1_loss(outputs["image"], frozen_image)
    teacher = (scale * frozen_image @ frozen_text.t()).log_softmax(-1)
    divergence = F.kl_div(outputs["logits"].log_softmax(-1), teacher, reduction="sum", log_target=True)
    loss = loss + divergence / outputs["logits"].numel()
    loss.backward()
    assert not pulled.pop("unused").any()
    for name, gradient in pulled.items():
        assert close(gradient, leaves[name].grad, 1e-5), name


def test_gaussian_average():
    weights = ref.gaussian_weights(20, 15, 1)
    assert sum(weights) == pytest.approx(1) and max(weights) == weights[14]
    normal = torch.distributions.Normal(15.0, 1.0).log_prob(torch.arange(1.0, 21.0)).exp()
    assert torch.allclose(torch.tensor(weights), normal / normal.sum(), atol=1e-6)
    states = [{"context": draw(2, 3, seed=i)} for i in range(4)]
    stacked = torch.stack([state["context"] for state in states]).double()
    assert torch.allclose(ref.gaussian_average(states, 2, 1e9)["context"], stacked.mean(0))
    assert torch.allclose(ref.gaussian_average(states, 3, 1e-2)["context"], stacked[2])

import hashlib

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.baselines.zero_shot import (
    HAND_TEMPLATES,
    IMAGENET_7_TEMPLATES,
    IMAGENET_80_TEMPLATES,
    class_embeddings,
    encode_texts,
    mean_text_embeddings,
    zero_shot_logits,
)
from coop_hf.demo.emoji import emoji_model_path


NAMES = ["cat", "sea_lion", "ground vehicle"]
TEMPLATES = ["a photo of a {}.", "{} texture.", "art of the {}."]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(emoji_model_path())


@pytest.fixture(scope="module")
def base(tokenizer):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    eos, sos = tokenizer.eos_token_id, tokenizer.bos_token_id
    text = {**tower, "vocab_size": len(tokenizer), "eos_token_id": eos, "bos_token_id": sos, "pad_token_id": eos}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**text, "max_position_embeddings": 40},
        vision_config={**tower, "image_size": 24, "patch_size": 8},
        projection_dim=16,
    )
    return CLIPModel(config).eval()


@torch.no_grad()
def by_transformers(base, tokenizer, text):
    """One text through transformers' own forward pass."""
    return F.normalize(base.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0], dim=-1)


def test_class_embeddings_are_clips_ensemble(base, tokenizer):
    got = class_embeddings(base, tokenizer, NAMES, TEMPLATES, batch_size=4)
    for name, row in zip(NAMES, got):
        texts = [t.replace("{}", name.replace("_", " ")) for t in TEMPLATES]
        mean = sum(by_transformers(base, tokenizer, text) for text in texts) / 3
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-6, rtol=0)
    assert got.dtype == torch.float32 and not got.requires_grad


def test_batches_and_entry_points_agree(base, tokenizer):
    whole = class_embeddings(base, tokenizer, NAMES, TEMPLATES)
    model = CoOpModel(base, CoOpConfig(n_ctx=2), NAMES, tokenizer)
    for size in (1, 2, 5, 100):
        torch.testing.assert_close(class_embeddings(model, None, NAMES, TEMPLATES, size), whole, atol=1e-6, rtol=0)
    # One template is what a CoOpModel gives while its adapter is disabled.
    with model.disable_adapter():
        output = model(image_embeds=torch.eye(16))
    single = class_embeddings(base, tokenizer, NAMES, "a photo of a {}.")
    torch.testing.assert_close(single, output.text_embeds, atol=1e-6, rtol=0)
    logits = zero_shot_logits(base, single, image_embeds=5 * torch.eye(16))
    torch.testing.assert_close(logits, output.logits, atol=1e-4, rtol=0)


def test_plain_pass_for_foreign_layers(base, tokenizer, monkeypatch):
    expected = encode_texts(base, tokenizer, ["a cat", "a photo of a sea lion."])
    monkeypatch.setattr("coop_hf.core.families.Clip.layer_class", "")
    got = encode_texts(base, tokenizer, ["a cat", "a photo of a sea lion."])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_uneven_numbers_of_texts(base, tokenizer):
    texts = [["a cat", "the cat", "one cat"], ["a dog"]]
    got = mean_text_embeddings(base, tokenizer, texts, batch_size=2)
    for own, row in zip(texts, got):
        expected = sum(by_transformers(base, tokenizer, text) for text in own) / len(own)
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)


def test_pixels_and_features_score_alike(base, tokenizer):
    pixels = torch.randn(2, 3, 24, 24)
    embeds = class_embeddings(base, tokenizer, NAMES, TEMPLATES)
    with torch.no_grad():
        features = base.get_image_features(pixel_values=pixels).pooler_output
    from_pixels = zero_shot_logits(base, embeds, pixel_values=pixels)
    torch.testing.assert_close(from_pixels, zero_shot_logits(base, embeds, image_embeds=features))
    cosine = F.cosine_similarity(features[:, None], embeds[None], dim=-1)
    torch.testing.assert_close(from_pixels, base.logit_scale.exp().detach() * cosine)


def test_half_precision_base(base, tokenizer):
    import copy

    half = copy.deepcopy(base).bfloat16()
    got = class_embeddings(half, tokenizer, NAMES, TEMPLATES)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(3))
    assert (got * class_embeddings(base, tokenizer, NAMES, TEMPLATES)).sum(dim=-1).min() > 0.99


def test_base_stays_as_it_was(base, tokenizer):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    grads = [p.requires_grad for p in base.parameters()]
    base.train()
    class_embeddings(base, tokenizer, NAMES, TEMPLATES)
    assert base.training and grads == [p.requires_grad for p in base.parameters()]
    base.eval()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_template_lists():
    assert len(IMAGENET_80_TEMPLATES) == len(set(IMAGENET_80_TEMPLATES)) == 80
    assert set(IMAGENET_7_TEMPLATES) < set(IMAGENET_80_TEMPLATES) and len(IMAGENET_7_TEMPLATES) == 7
    assert all(t.count("{}") == 1 for t in (*IMAGENET_80_TEMPLATES, *HAND_TEMPLATES.values()))
    # The published list, sorted, one a line.
    digest = hashlib.sha256("\n".join(sorted(IMAGENET_80_TEMPLATES)).encode()).hexdigest()
    assert digest == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"
    assert len(HAND_TEMPLATES) == 15 and HAND_TEMPLATES["Food101"] == "a photo of {}, a type of food."


def test_errors_say_what_to_do(base, tokenizer):
    with pytest.raises(ValueError, match="must contain"):
        class_embeddings(base, tokenizer, NAMES, "a photo")
    with pytest.raises(ValueError, match="`templates` is empty"):
        class_embeddings(base, tokenizer, NAMES, [])
    with pytest.raises(ValueError, match="shorten it by"):
        class_embeddings(base, tokenizer, ["cat " * 60], "a {}.")
    with pytest.raises(TypeError, match="AutoTokenizer"):
        class_embeddings(base, None, NAMES, TEMPLATES)
    with pytest.raises(TypeError, match="CLIPModel"):
        class_embeddings(torch.nn.Linear(2, 2), tokenizer, NAMES, TEMPLATES)
    embeds = class_embeddings(base, tokenizer, NAMES, TEMPLATES)
    with pytest.raises(ValueError, match="neither"):
        zero_shot_logits(base, embeds)
    with pytest.raises(ValueError, match="17 dimensions"):
        zero_shot_logits(base, embeds, image_embeds=torch.ones(1, 17))


def test_truncation_cuts_tokens(base, tokenizer):
    long = "cat " * 60
    got = encode_texts(base, tokenizer, [long], truncate=True)[0]
    torch.testing.assert_close(got, by_transformers(base, tokenizer, "cat " * 38), atol=1e-6, rtol=0)

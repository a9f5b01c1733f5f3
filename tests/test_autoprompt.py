import pytest
import torch
from conftest import make_base
from torch.nn import functional as F
from transformers import AutoTokenizer

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.baselines.autoprompt import _Search, autoprompt, project_context, prompt_vocabulary
from coop_hf.baselines.zero_shot import class_embeddings, zero_shot_logits
from coop_hf.demo.emoji import emoji_model_path


NAMES = ["cat", "sea_lion", "ground vehicle"]
POSITIONS = ["end", "middle", "front"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(emoji_model_path())


@pytest.fixture(scope="module")
def model(tokenizer):
    base = make_base(tokenizer, eos_token_id=tokenizer.eos_token_id)
    return CoOpModel(base, CoOpConfig(n_ctx=2), NAMES, tokenizer)


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(30, 24, generator=generator), torch.arange(30) % 3


@pytest.fixture(scope="module")
def words(tokenizer):
    return prompt_vocabulary(tokenizer, NAMES)[::40]


def loss_of_text(model, template, examples):
    """Mean cross-entropy of a written prompt, through tokenizer and zero-shot path."""
    embeds = class_embeddings(model.base_model, model.tokenizer, NAMES, template)
    logits = zero_shot_logits(model.base_model, embeds, image_embeds=examples[0])
    return F.cross_entropy(logits, examples[1]).item(), (logits.argmax(1) == examples[1]).float().mean().item()


def test_vocabulary(tokenizer):
    ids = prompt_vocabulary(tokenizer, ["cat", "Blue_dog"])
    words = [tokenizer.decode([i]).strip() for i in ids]
    assert len(ids) > 1000 and ids == sorted(set(ids)) and not set(ids) & set(tokenizer.all_special_ids)
    assert all(word.isascii() and word.isalpha() for word in words)
    assert not {"cat", "blue", "dog"} & set(words)
    assert "cat" in {tokenizer.decode([i]).strip() for i in prompt_vocabulary(tokenizer)}
    encoded = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert encoded == [[i] for i in ids]
    long = prompt_vocabulary(tokenizer, min_length=6)
    assert min(len(tokenizer.decode([i]).strip()) for i in long) == 6
    assert set(prompt_vocabulary(tokenizer)) < set(prompt_vocabulary(tokenizer, ascii_words=False))


def test_vocabulary_of_the_real_tokenizer(real_tokenizer):
    ids = prompt_vocabulary(real_tokenizer, ["cat"])
    assert {320, 1125, 539} <= set(ids) and 2368 not in ids  # a, photo, of; cat is the class
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # any row of words comes back as written
        row = [ids[i] for i in torch.randint(len(ids), (6,), generator=generator)]
        text = " ".join(real_tokenizer.decode([i]).strip() for i in row)
        assert real_tokenizer(f"{text} kite (bird).", add_special_tokens=False)["input_ids"][:6] == row


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("text_pass", ["shared", "plain"])
def test_candidate_losses_are_exact(model, examples, words, position, text_pass):
    own = CoOpModel(model.base_model, CoOpConfig(n_ctx=2), NAMES, model.tokenizer, text_pass=text_pass)
    search = _Search(own, None, position, 3, *examples)
    candidates = [words[k : k + 3] for k in range(5)]
    for batch_size in (1, 2, 5):
        losses = search.losses(candidates, slice(None), batch_size)
        for ids, loss in zip(candidates, losses.tolist()):
            texts = [model.tokenizer.decode([i]).strip() for i in ids]
            first = {"end": 3, "middle": 1, "front": 0}[position]
            template = " ".join([*texts[:first], "{}", *texts[first:]]) + "."
            assert loss == pytest.approx(loss_of_text(model, template, examples)[0], abs=1e-5)


def test_gradient_predicts_small_changes(model, examples, words):
    search = _Search(model, None, "end", 2, *examples)
    loss, gradient = search.gradient(words[:2], slice(None))
    rows = search.rows(words[:2]).clone()
    step = 1e-3 * F.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    change = search.score(rows + step)[0] - search.score(rows - step)[0]
    assert loss == pytest.approx(search.score(rows)[0], abs=1e-6)
    assert change == pytest.approx(2 * (gradient * step).sum().item(), abs=2e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_result_is_a_text_that_scores_as_told(model, examples, words, position):
    before = model.context.detach().clone()
    prompt = autoprompt(
        model, *examples, num_tokens=3, class_token_position=position, num_steps=9, top_k=4, vocabulary=words
    )
    encoded = model.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    assert encoded == prompt.token_ids and set(encoded) <= set(words)
    assert loss_of_text(model, prompt.template, examples) == pytest.approx((prompt.loss, prompt.accuracy), abs=1e-5)
    losses = [entry["loss"] for entry in prompt.history]
    assert all(later <= earlier + 1e-6 for earlier, later in zip(losses, losses[1:]))
    assert losses[-1] == pytest.approx(prompt.loss, abs=1e-5)
    # As an adapter it is the same prompt.
    model.add_adapter(position, prompt.to_config(NAMES))
    model.set_adapter(position)
    assert model(image_embeds=examples[0], labels=examples[1]).loss.item() == pytest.approx(prompt.loss, abs=1e-5)
    model.set_adapter("default")
    assert torch.equal(model.context, before) and model.context.grad is None


def test_search_ends_where_no_word_is_better(model, examples, words):
    words = words[:12]
    prompt = autoprompt(model, *examples, num_tokens=2, num_steps=500, top_k=5, vocabulary=words)
    assert len(prompt.history) < 500
    search = _Search(model, None, "end", 2, *examples)
    neighbours = [[w, prompt.token_ids[1]] for w in words] + [[prompt.token_ids[0], w] for w in words]
    assert search.losses(neighbours, slice(None), 8).min().item() >= prompt.loss - 1e-6


def test_seeds_batches_and_start(model, examples, words):
    options = {"num_tokens": 2, "num_steps": 6, "top_k": 4, "vocabulary": words}
    first = autoprompt(model, *examples, seed=1, **options)
    assert autoprompt(model, *examples, seed=1, **options) == first
    starts = {autoprompt(model, *examples, seed=s, **{**options, "num_steps": 1}).text for s in range(5)}
    assert len(starts) > 1
    drawn = autoprompt(model, *examples, seed=1, batch_size=10, **options)
    assert len(drawn.history) == 6 and drawn == autoprompt(model, *examples, seed=1, batch_size=10, **options)
    text = " ".join(model.tokenizer.decode([i]).strip() for i in words[:2])
    start_loss = loss_of_text(model, text + " {}.", examples)[0]
    assert autoprompt(model, *examples, init=text, **options).loss <= start_loss + 1e-5


def test_projection_of_a_learned_context(model, examples, words):
    own = CoOpModel(model.base_model, CoOpConfig(n_ctx=2), NAMES, model.tokenizer)
    table = model.base_model.text_model.embeddings.token_embedding.weight
    noise = 0.01 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    own.context.data = table[words[3:5]] + noise
    prompt = project_context(own, *examples)
    assert prompt.token_ids == words[3:5]
    assert prompt.distances == pytest.approx(noise.norm(dim=1).tolist(), abs=1e-5)
    assert prompt.accuracy == pytest.approx(loss_of_text(model, prompt.template, examples)[1])
    logits = own(image_embeds=examples[0]).logits
    assert prompt.learned_accuracy == pytest.approx((logits.argmax(1) == examples[1]).float().mean().item())
    assert project_context(own, *examples, vocabulary=words[:2]).token_ids[0] in words[:2]


def test_errors(model, examples, words, tokenizer):
    images, labels = examples
    with pytest.raises(ValueError, match=r"\(num_examples, 24\)"):
        autoprompt(model, images[:, :4], labels)
    with pytest.raises(ValueError, match="from 0 to 2"):
        autoprompt(model, images, labels + 1)
    with pytest.raises(ValueError, match="special tokens"):
        autoprompt(model, images, labels, vocabulary=[tokenizer.eos_token_id])
    with pytest.raises(ValueError, match="at least one"):
        autoprompt(model, images, labels, vocabulary=[])
    with pytest.raises(ValueError, match="has 1 tokens, and num_tokens is 2"):
        autoprompt(model, images, labels, num_tokens=2, init="a")
    with pytest.raises(ValueError, match="`top_k`"):
        autoprompt(model, images, labels, top_k=0)
    special = CoOpModel(model.base_model, CoOpConfig(n_ctx=2, class_specific=True), NAMES, tokenizer)
    with pytest.raises(ValueError, match="nearest_tokens"):
        project_context(special, images, labels)
    typable = set(prompt_vocabulary(tokenizer, ascii_words=False))
    pieces = [i for i in range(300, 900) if i not in typable]
    with pytest.raises(ValueError, match="not tokenised back"):
        autoprompt(model, images, labels, num_steps=1, vocabulary=pieces)


def test_the_objective_accuracy_counts_wrong_images(model, examples, words):
    images, labels = examples
    search = _Search(model, None, "end", 2, images, labels)
    candidates = [[a, b] for a in words[:3] for b in words[:3]]
    losses = search.losses(candidates, slice(None), 4)
    scores = search.losses(candidates, slice(None), 4, "accuracy")
    for ids, loss, score in zip(candidates, losses.tolist(), scores.tolist()):
        expected_loss, accuracy = search.score(search.rows(ids))
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert int(score) == round((1 - accuracy) * len(labels))
        assert score - int(score) == pytest.approx(loss / (1 + loss), abs=1e-4)
    start = search.result(candidates[0])
    found = autoprompt(model, images, labels, init=start.text, vocabulary=words, objective="accuracy", num_steps=12)
    assert found.accuracy >= start.accuracy and found.history[-1]["loss"] < len(labels)
    with pytest.raises(ValueError, match="'loss' or 'accuracy'"):
        autoprompt(model, images, labels, objective="f1")


def test_a_start_of_rare_words_is_refused_at_once(model, examples):
    with pytest.raises(ValueError, match="'zyxqv a' has words that the tokenizer cuts into pieces"):
        autoprompt(model, *examples, init="zyxqv a")

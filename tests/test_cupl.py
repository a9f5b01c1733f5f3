import json

import pytest
import torch
from conftest import SHARED
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from coop_hf.baselines import cupl
from coop_hf.baselines.cupl import (
    CUPL_QUESTIONS,
    cupl_class_embeddings,
    fill_question,
    generate_prompts,
    prompts_of_classes,
    read_prompts,
    write_prompts,
)
from coop_hf.baselines.zero_shot import class_embeddings


PUBLISHED = SHARED / "prompts" / "cupl_caltech101.json"
needs_published = pytest.mark.skipif(not PUBLISHED.is_file(), reason="no ../shared/data/prompts here")
NAMES = ["cat", "sea_lion"]
PROMPTS = {"Sea lion": ["A sea lion swims.", "It is big."], "cat": ["A cat sits.", "A cat is small.", "It purrs."]}
WORDS = "a an cat dog owl lion sea red big is has fur looks like what does look describe ?".split()
WORDS += ["abcdef"]  # what transformers tries a tokenizer with before it looks for stop strings


@pytest.fixture(scope="module")
def writer_tokenizer():
    vocab = {word: index for index, word in enumerate(["<eos>", "<unk>", ".", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def writer(writer_tokenizer):
    torch.manual_seed(0)
    size = len(writer_tokenizer)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()


QUESTIONS = ["What does a {} look like?", "Describe a {}"]


def write(writer, writer_tokenizer, names=("cat", "dog", "owl"), questions=QUESTIONS, number=3, **options):
    options = {"progress": False, "max_new_tokens": 12, **options}
    return generate_prompts(writer, writer_tokenizer, list(names), questions, number, **options)


# ------------------------------------------------------------------ files


@needs_published
def test_published_file(tmp_path):
    prompts = read_prompts(PUBLISHED)
    assert len(prompts) == 102
    assert {len(sentences) for sentences in prompts.values()} == {30}
    write_prompts(tmp_path / "copy.json", prompts)
    assert json.loads((tmp_path / "copy.json").read_text(encoding="utf-8")) == json.loads(PUBLISHED.read_text())
    some = list(prompts)[5:2:-1]
    assert list(read_prompts(PUBLISHED, some)) == some
    with pytest.raises(ValueError, match="1 of 2 classes have no sentences: 'gerenukk' .there is 'gerenuk'"):
        read_prompts(PUBLISHED, [some[0], "gerenukk"])


@needs_published
def test_published_sentences_on_the_real_tokenizer(real_base, real_tokenizer):
    prompts = read_prompts(PUBLISHED)
    embeds = cupl_class_embeddings(real_base, real_tokenizer, list(prompts), prompts, too_long="truncate")
    assert embeds.shape == (len(prompts), 24) and torch.isfinite(embeds).all()


def test_names_match_without_case_and_underscores():
    assert prompts_of_classes(PROMPTS, NAMES) == [PROMPTS["cat"], PROMPTS["Sea lion"]]
    with pytest.raises(ValueError, match="but for case"):
        prompts_of_classes({"cat": ["a"], "CAT": ["b"]}, ["cat"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "at least one class"),
        ('{"cat": []}', "class 'cat' a list of at least one"),
        ('{"cat": "A cat."}', "class 'cat' a list"),
        ('{"cat": ["A cat.", " "]}', "sentence 1 of class 'cat'"),
        ('{"cat": ["A cat.", 3]}', "sentence 1 of class 'cat'"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


# ------------------------------------------------------------------ embeddings


@torch.no_grad()
def by_transformers(base, tokenizer, texts):
    """The mean embedding of texts, each through transformers' own forward pass."""
    rows = [base.get_text_features(**tokenizer([t], return_tensors="pt")).pooler_output[0] for t in texts]
    return torch.stack([F.normalize(row, dim=-1) for row in rows]).mean(dim=0)


def test_embeddings_are_means_of_sentences(base, tokenizer):
    got = cupl_class_embeddings(base, tokenizer, NAMES, PROMPTS, batch_size=2)
    for row, name in zip(got, ("cat", "Sea lion")):
        expected = F.normalize(by_transformers(base, tokenizer, PROMPTS[name]), dim=-1)
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)


def test_mixing_with_templates(base, tokenizer):
    templates = ["a photo of a {}.", "art of the {}."]
    mixed = cupl_class_embeddings(base, tokenizer, NAMES, PROMPTS, templates)
    weighted = cupl_class_embeddings(base, tokenizer, NAMES, PROMPTS, templates, template_weight=0.3)
    for index, key in enumerate(("cat", "Sea lion")):
        texts = [t.replace("{}", NAMES[index].replace("_", " ")) for t in templates]
        pooled = by_transformers(base, tokenizer, PROMPTS[key] + texts)  # every text counts the same
        torch.testing.assert_close(mixed[index], F.normalize(pooled, dim=-1), atol=1e-6, rtol=0)
        parts = by_transformers(base, tokenizer, PROMPTS[key]), by_transformers(base, tokenizer, texts)
        expected = F.normalize(0.7 * parts[0] + 0.3 * parts[1], dim=-1)
        torch.testing.assert_close(weighted[index], expected, atol=1e-6, rtol=0)
    ends = [cupl_class_embeddings(base, tokenizer, NAMES, PROMPTS, templates, template_weight=w) for w in (0, 1)]
    torch.testing.assert_close(ends[0], cupl_class_embeddings(base, tokenizer, NAMES, PROMPTS))
    torch.testing.assert_close(ends[1], class_embeddings(base, tokenizer, NAMES, templates))


def test_long_sentences(base, tokenizer):
    prompts = {**PROMPTS, "cat": ["A cat.", "cat " * 60]}
    with pytest.raises(ValueError, match="1 of 4 sentences have more tokens than the text tower's 40.*'cat', with 62"):
        cupl_class_embeddings(base, tokenizer, NAMES, prompts)
    got = cupl_class_embeddings(base, tokenizer, NAMES, prompts, too_long="truncate")
    expected = F.normalize(by_transformers(base, tokenizer, ["A cat.", "cat " * 38]), dim=-1)
    torch.testing.assert_close(got[0], expected, atol=1e-6, rtol=0)


def test_bad_arguments(base, tokenizer):
    with pytest.raises(ValueError, match="'error', 'truncate'"):
        cupl_class_embeddings(base, tokenizer, NAMES, PROMPTS, too_long="cut")
    with pytest.raises(ValueError, match="from 0 to 1"):
        cupl_class_embeddings(base, tokenizer, NAMES, PROMPTS, "a {}.", template_weight=2)
    with pytest.raises(ValueError, match="no `templates`"):
        cupl_class_embeddings(base, tokenizer, NAMES, PROMPTS, template_weight=0.5)


# ------------------------------------------------------------------ generation


def test_questions():
    assert fill_question("What does a {} look like?", "apple_pie") == "What does an apple pie look like?"
    assert fill_question("A {} and the {x}", "dog") == "A dog and the {x}"
    assert fill_question("Describe the {} aircraft", "A380") == "Describe the A380 aircraft"
    assert all(q.count("{}") == 1 for questions in CUPL_QUESTIONS.values() for q in questions)
    assert [len(CUPL_QUESTIONS[key]) for key in ("Caltech101", "ImageNet", "StanfordCars")] == [3, 5, 9]
    with pytest.raises(ValueError, match="exactly once"):
        fill_question("What is that?", "cat")


def test_generation(writer, writer_tokenizer):
    prompts = write(writer, writer_tokenizer)
    assert list(prompts) == ["cat", "dog", "owl"] and all(len(own) == 6 for own in prompts.values())
    for sentence in sum(prompts.values(), []):
        assert sentence.endswith(".") and sentence.count(".") == 1 and sentence == " ".join(sentence.split())
        assert set(sentence[:-1].split()) <= {*WORDS, "<unk>"}
    assert len(set(sum(prompts.values(), []))) > 9  # sampled, not the likeliest


def test_generation_is_reproducible(writer, writer_tokenizer):
    state = torch.get_rng_state()
    prompts = write(writer, writer_tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert write(writer, writer_tokenizer) == prompts
    assert write(writer, writer_tokenizer, ["owl"])["owl"] == prompts["owl"]  # whatever the other classes
    assert write(writer, writer_tokenizer, seed=1) != prompts


def test_padding_changes_nothing(writer, writer_tokenizer):
    # Questions of different lengths in one batch, without sampling: the same answers as one by one.
    rows = writer_tokenizer(["a red dog", "what does a big owl look like ?", "sea lion"])["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 8}
    together = cupl._answers(writer, writer_tokenizer, rows, None, options)
    assert together == [cupl._answers(writer, writer_tokenizer, [row], None, options)[0] for row in rows]
    assert len(set(together)) == 3
    assert writer_tokenizer.pad_token is None


def test_interrupted_runs_go_on(writer, writer_tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "prompts.json"
    whole = write(writer, writer_tokenizer)
    real, calls = cupl._write_class, []

    def interrupted(model, tokenizer, name, *args):
        calls.append(name)
        if calls == ["cat", "dog"]:
            raise KeyboardInterrupt
        return real(model, tokenizer, name, *args)

    monkeypatch.setattr(cupl, "_write_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(writer, writer_tokenizer, path=path)
    assert list(read_prompts(path)) == ["cat"] and len(list(tmp_path.iterdir())) == 1
    calls.append("again")
    assert write(writer, writer_tokenizer, path=path) == whole == read_prompts(path)
    assert calls == ["cat", "dog", "again", "dog", "owl"]


def test_encoder_decoder_model(writer_tokenizer):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(writer_tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    prompts = write(T5ForConditionalGeneration(config).eval(), writer_tokenizer, ["cat"], number=2)
    assert len(prompts["cat"]) == 4 and all(sentence.endswith(".") for sentence in prompts["cat"])


def test_chat_template_is_used(writer, writer_tokenizer, monkeypatch):
    import copy

    chat = copy.deepcopy(writer_tokenizer)
    chat.chat_template = "{% for m in messages %}look {{ m['content'] }} look{% endfor %}"
    seen = []
    real = cupl._answers
    monkeypatch.setattr(cupl, "_answers", lambda m, t, rows, *a: seen.extend(rows) or real(m, t, rows, *a))
    write(writer, chat, ["cat"], ["what is a {}"], 1)
    assert chat.decode(seen[0]) == "look what is a cat look"
    write(writer, chat, ["cat"], ["what is a {}"], 1, use_chat_template=False)
    assert chat.decode(seen[-1]) == "what is a cat"


def test_silent_model_is_an_error(writer, writer_tokenizer, monkeypatch):
    monkeypatch.setattr(cupl, "_answers", lambda model, tokenizer, rows, *args: [" . "] * len(rows))
    with pytest.raises(ValueError, match="nothing about 'cat' in 5 rounds"):
        write(writer, writer_tokenizer)


def test_bad_generation_arguments(writer, writer_tokenizer):
    with pytest.raises(ValueError, match="`num_sentences`"):
        write(writer, writer_tokenizer, number=0)
    with pytest.raises(ValueError, match="`questions` is empty"):
        write(writer, writer_tokenizer, questions=[])
    with pytest.raises(ValueError, match="`temperature`"):
        write(writer, writer_tokenizer, temperature=-1)

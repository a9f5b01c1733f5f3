"""Class names as the public code treats them: repeated ones, how texts are read, the full stop in middle and front."""

import html
import json
import time
import types
import warnings

import datasets
import numpy as np
import pytest
import torch
from conftest import image_dataset, picture
from test_coop_checkpoint import NAMES, write_checkpoint
from test_trainer import arguments

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, LabelledImages
from coop_hf.checks import check_class_names, unique_names
from coop_hf.core import texts
from coop_hf.core.layout import encode_words, make_layout, tokenize_texts
from coop_hf.core.packing import first_fit
from coop_hf.data.few_shot import resolve_labels, sample_few_shot
from coop_hf.data.sources import as_dataset, read_coop_split, read_few_shot_indices
from coop_hf.data.transforms import eval_transform
from coop_hf.pipeline import CoOpImageClassificationPipeline
from coop_hf.training.metrics import classification_scores, make_compute_metrics


# CLIP's list for ImageNet has "missile" as 657 and 744, "sunglasses" as 836 and 837.
TWICE = ["cat", "sea", "dog", "sea", "cat"]
same_prompt = pytest.mark.filterwarnings("ignore:these classes have the same prompt")


# ---------------------------------------------------------------------- repeated names


def images_of(labels):
    return datasets.Dataset.from_dict(
        {"image": image_dataset(len(labels))["image"], "label": labels},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )


@same_prompt
@pytest.mark.parametrize("class_specific", [False, True], ids=["unified", "class-specific"])
def test_train_save_load_and_predict(base, processor, tmp_path, class_specific):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"'cat' \(0\), 'cat' \(4\); 'sea' \(1\), 'sea' \(3\)\. .*by index"):
        model = CoOpModel(base, CoOpConfig(2, class_specific=class_specific), TWICE, processor)
    data = images_of([0, 1, 2, 3, 4] * 2)
    args = arguments(tmp_path / "run", recipe="fast", max_steps=4, learning_rate=0.5, per_device_train_batch_size=10)
    trainer = CoOpTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    scores = trainer.evaluate()
    with torch.no_grad():
        pixels = processor(images=data["image"][:], return_tensors="pt")["pixel_values"]
        logits = model.eval()(pixel_values=pixels).logits
    assert logits.shape == (10, 5)
    equal = torch.allclose(logits[:, 0], logits[:, 4], atol=1e-5)
    assert equal != class_specific, "one context gives one name one score; class-specific ones are apart"
    right = logits.argmax(dim=-1).numpy() == np.array(data["label"])
    assert scores["eval_accuracy"] == pytest.approx(right.mean())  # by index, as in the public code
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["class_names"] == TWICE
    assert "sea" in (tmp_path / "adapter" / "README.md").read_text()
    loaded = CoOpModel.from_pretrained(tmp_path / "adapter", base_model=base, processor=processor)
    assert loaded.class_names == TWICE
    entries = loaded.predict(picture(0), top_k=None)
    assert sorted(entry["label"] for entry in entries) == sorted(TWICE), "both entries of a name"
    pipeline = CoOpImageClassificationPipeline(model=loaded)
    for given, expected in zip(pipeline(picture(0), top_k=5), entries):
        assert given["label"] == expected["label"] and given["score"] == pytest.approx(expected["score"], abs=1e-6)
    several = pipeline([picture(0), picture(1), picture(2)], batch_size=2, top_k=5)
    assert [sorted(e["label"] for e in own) for own in several] == [sorted(TWICE)] * 3


@same_prompt
@pytest.mark.parametrize("class_specific", [False, True], ids=["unified", "class-specific"])
def test_import(tokenizer, processor, base, tmp_path, class_specific):
    context = write_checkpoint(tmp_path / "c", tokenizer, base, names=TWICE, class_specific=class_specific)
    for names in (TWICE, None):  # given, or read off the embeddings
        model = CoOpModel.from_coop_checkpoint(tmp_path / "c", base, names, processor=processor)
        assert model.class_names == TWICE and torch.equal(model.context.detach(), context)


@same_prompt
def test_order_of_repeated_names(base, processor):
    """Of a name that stands there twice, the first stays the first."""
    torch.manual_seed(0)
    model = CoOpModel(base, CoOpConfig(2, class_specific=True), TWICE, processor)
    context = model.context.detach().clone()
    model.set_class_names(["sea", "cat", "cat", "dog", "sea"])
    assert torch.equal(model.context, context[[1, 0, 4, 2, 3]])
    with pytest.raises(ValueError, match=r"it has no vectors for 'dog'; the new list lacks 'cat'\."):
        model.set_class_names(["sea", "cat", "dog", "dog", "sea"])
    assert model.class_names == ["sea", "cat", "cat", "dog", "sea"]


def test_keys_of_tables_are_all_different():
    assert unique_names(["cat", "dog"]) == ["cat", "dog"]
    assert unique_names(TWICE) == ["cat (class 0)", "sea (class 1)", "dog", "sea (class 3)", "cat (class 4)"]
    names = unique_names(["a", "a", "a (class 0)", "a (class 1)", "a (class 0)'"])
    assert len(set(names)) == 5 and names[2:] == ["a (class 0)", "a (class 1)", "a (class 0)'"]
    scores = classification_scores([0, 1, 2, 1, 4], [0, 1, 2, 3, 4], TWICE)
    assert scores["accuracy"] == 0.8
    assert scores["per_class_accuracy"] == {
        "cat (class 0)": 1.0, "sea (class 1)": 1.0, "dog": 1.0, "sea (class 3)": 0.0, "cat (class 4)": 1.0,
    }  # fmt: skip
    compute = make_compute_metrics(TWICE, per_class=True)
    flat = compute(types.SimpleNamespace(predictions=torch.eye(5).numpy(), label_ids=np.arange(5)))
    assert sum(key.startswith("accuracy_per_class/") for key in flat) == 5


def test_labels_and_draws_with_repeated_names():
    by_index = images_of([0, 1, 2, 3, 4] * 3)
    names, labels = resolve_labels(by_index, class_names=TWICE)
    assert names == TWICE and labels.tolist() == by_index["label"][:]
    drawn = sample_few_shot(by_index, 2, class_names=TWICE)
    assert drawn["label"][:] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    folders = by_index.cast_column("label", datasets.ClassLabel(names=[f"n0{i}" for i in range(5)]))
    assert resolve_labels(folders, class_names=TWICE)[1].tolist() == by_index["label"][:]
    short = datasets.Dataset.from_dict({"label": [0]}, datasets.Features({"label": datasets.ClassLabel(names=["n"])}))
    with pytest.raises(ValueError, match="5 names, some of them twice, but .* 1 classes"):
        resolve_labels(short, class_names=TWICE)
    text = datasets.Dataset.from_dict({"label": ["dog", "sea"]})
    with pytest.raises(ValueError, match=r"'sea' in the column 'label' is the name of the classes 1, 3: .* indices"):
        resolve_labels(text, class_names=TWICE)
    assert resolve_labels(datasets.Dataset.from_dict({"label": ["dog"]}), class_names=TWICE)[1].tolist() == [2]


def test_split_file_with_a_name_for_two_labels(tmp_path, tokenizer):
    entries = [[f"{i}.jpg", i % 3, ["missile", "cat", "missile"][i % 3]] for i in range(6)]
    for file, _, _ in entries:
        (tmp_path / file).write_bytes(b"never decoded")
    (tmp_path / "split.json").write_text(json.dumps({"train": entries}))
    split = read_coop_split(tmp_path / "split.json", tmp_path)
    assert split["train"].features["label"].names == ["missile", "cat", "missile_"]
    names, labels = resolve_labels(split["train"])
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.warns(UserWarning, match=r"'missile' \(0\), 'missile_' \(2\)"):
        rows = make_layout(tokenizer, names, 1).tokens
    assert rows[0] == rows[2] != rows[1]
    assert resolve_labels(split["train"], class_names=["missile", "cat", "missile"])[1].tolist() == labels.tolist()
    data = [{"classname": "missile", "label": 2, "impath": "2.jpg"}]
    (tmp_path / "shots.json").write_text(json.dumps({"train": {"indices": [2], "data": data}}))
    assert read_few_shot_indices(tmp_path / "shots.json", split)["train"]["label"][:] == [2]

    class Torchvision(list):
        classes = ["missile", "cat", "missile"]

    made = as_dataset(Torchvision([(picture(0), 2)]))
    assert made.features["label"].names == ["missile", "cat", "missile_"] and made["label"][:] == [2]


# ---------------------------------------------------------------------- the original's reading of texts


class Ftfy(types.ModuleType):
    """Of what the real one repairs, what is tested here."""

    @staticmethod
    def fix_text(text):
        return text.replace("’", "'").replace("ﬁ", "fi").replace("ｃ", "c").replace("Ã©", "é")


@pytest.fixture(params=[False, True], ids=["without ftfy", "with ftfy"])
def with_ftfy(request, monkeypatch):
    monkeypatch.setattr(texts, "ftfy", Ftfy("ftfy") if request.param else None)
    return request.param


SAME = {"cat’s": "cat's", "ﬁsh": "fish", "ｃat": "cat", "cafÃ©": "café"}


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_curly_quotes_ligatures_and_wide_letters(tokenizer, with_ftfy, position):
    plain = [make_layout(tokenizer, [name], 2, position).tokens[0] for name in SAME.values()]
    if with_ftfy:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = make_layout(tokenizer, list(SAME), 2, position).tokens
        assert found == plain
    else:
        with pytest.warns(UserWarning, match=r"'cat’s', 'ﬁsh', 'ｃat', 'cafÃ©'.*pip install coop_hf\[text\]"):
            found = make_layout(tokenizer, list(SAME), 2, position).tokens
        assert all(row != other for row, other in zip(found, plain))


def test_entities_are_replaced_twice(tokenizer, with_ftfy):
    names = ["cat &amp; dog", "cat &amp;amp; dog", "caf&eacute;", "&lt;cat&gt;"]
    plain = [make_layout(tokenizer, [name], 2).tokens[0] for name in ("cat & dog", "cat & dog", "café", "<cat>")]
    with pytest.warns(UserWarning, match="same prompt"):
        assert make_layout(tokenizer, names, 2).tokens == plain
    assert tokenize_texts(tokenizer, ["a &amp; b"]).tokens == [tokenizer("a & b")["input_ids"]]
    with pytest.raises(ValueError, match="special token"):
        encode_words(tokenizer, ["&lt;|endoftext|&gt;"])


def test_init_words_and_templates(base, tokenizer, with_ftfy):
    config = CoOpConfig(ctx_init="a &amp; photo", template="a &amp; {}.")
    model = CoOpModel(base, config, ["cat"], tokenizer)
    rows = base.text_model.embeddings.token_embedding.weight[tokenizer("a & photo")["input_ids"][1:-1]]
    assert model.config.n_ctx == 3 and torch.equal(model.context, rows)
    with model.disable_adapter(), torch.no_grad():
        expected = base.get_text_features(**tokenizer(["a & cat."], return_tensors="pt")).pooler_output
        assert torch.allclose(model.get_text_features(), expected, atol=1e-5)
    if not with_ftfy:
        with pytest.warns(UserWarning, match="'a cat’s'"):
            CoOpModel(base, CoOpConfig(ctx_init="a cat’s"), ["cat"], tokenizer)


def test_other_texts_stay_as_they_are(tokenizer, with_ftfy):
    names = ["R&D", "café", "猫", "naïve", "Ångström", "Москва", "piñata 3", "AT&T", "a;b", "São Tomé", "…", "Σ"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout = make_layout(tokenizer, names, 2)
    expected = [tokenizer(f"{name}.", add_special_tokens=False)["input_ids"] for name in names]
    assert [row[3:-1] for row in layout.tokens] == expected


def test_other_tokenizers_read_texts_as_they_do():
    from test_families import make_family

    tokenizer = make_family("siglip")[1].tokenizer
    assert not texts.is_clip_tokenizer(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            encode_words(tokenizer, ["cat’s &amp;"])
            == tokenizer(["cat’s &amp;"], add_special_tokens=False)["input_ids"]
        )


def test_the_real_ftfy(real_tokenizer):
    """The public tokenizer's way, written down again: ftfy, `html.unescape` twice, lower case."""
    ftfy = pytest.importorskip("ftfy")
    for name in [*SAME, "â€œquotedâ€\x9d", "Schro\u0308dinger", "&amp;amp;copy;", "ＡＢＣ ﬂ", "l’été"]:
        text = html.unescape(html.unescape(ftfy.fix_text(name + "."))).lower()
        assert (
            encode_words(real_tokenizer, [name + "."]) == real_tokenizer([text], add_special_tokens=False)["input_ids"]
        )


def test_what_the_warning_is_given_for_is_what_ftfy_changes():
    ftfy = pytest.importorskip("ftfy")
    import unicodedata

    for code in [*range(0x80, 0x2000), *range(0x2030, 0x3100), *range(0xFB00, 0xFFFD)]:
        text = f"a{chr(code)}b"
        changes = unicodedata.normalize("NFC", ftfy.fix_text(text)) != unicodedata.normalize("NFC", text)
        if changes:
            assert texts._OTHERWISE.search(text), hex(code)


# ---------------------------------------------------------------------- the original's full stop

HARD = ["kite (bird)", "C++", "100%", "yahoo!", "u.s.", "dog (cat)", "a...", "Jack-o'-lantern", '"x"', "[cat]", "cat"]
HARD += [
    "St. Bernard",
    "7.5",
    "#",
    "...",
    "T-shirt?",
    "sea_lion",
    "kite (bird of prey)",
    "what's up?!",
    "10:30",
    "café!",
]


def original_prompt(tokenizer, name, n_ctx, position):
    """The public code's rule: "X X X name." is tokenized as a whole; behind the context, as many tokens as the name
    alone has are the name, and the rest, with EOS, goes behind the context."""
    name = name.replace("_", " ")
    name_length = len(tokenizer(name)["input_ids"]) - 2
    ids = tokenizer("X " * n_ctx + name + ".")["input_ids"]
    prefix, suffix = ids[:1], ids[1 + n_ctx :]
    slots = [-1 - k for k in range(n_ctx)]
    if position == "end":
        return prefix + slots + suffix
    half = n_ctx // 2 if position == "middle" else 0
    return prefix + slots[:half] + suffix[:name_length] + slots[half:] + suffix[name_length:]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_prompts_are_the_originals(real_tokenizer, position):
    merged = make_layout(real_tokenizer, HARD, 4, position, merge_full_stop=True)
    assert merged.tokens == [original_prompt(real_tokenizer, name, 4, position) for name in HARD]
    own = make_layout(real_tokenizer, HARD, 4, position)
    different = sum(a != b for a, b in zip(merged.tokens, own.tokens))
    assert different == 0 if position == "end" else different > 5
    assert merged.name_lengths == own.name_lengths or position == "end"


@pytest.mark.parametrize("position", ["middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True], ids=["unified", "class-specific"])
@pytest.mark.parametrize("text_pass", ["plain", "shared"])
def test_imported_checkpoints_score_as_in_the_original(
    tokenizer, processor, base, tmp_path, position, class_specific, text_pass
):
    """From the embeddings that the checkpoint itself holds, cut as the original cuts them."""
    names = ["cat", "kite (bird)", "sea!", "dog_house"]
    context = write_checkpoint(tmp_path / "c", tokenizer, base, names, class_specific=class_specific)
    state = torch.load(tmp_path / "c", weights_only=False)["state_dict"]
    half, tower, rows = (2 if position == "middle" else 0), base.text_model, []
    for c, name in enumerate(names):
        own = context[c] if class_specific else context
        prefix, suffix = state["token_prefix"][c], state["token_suffix"][c]
        length = len(tokenizer(name.replace("_", " "))["input_ids"]) - 2
        rows.append(torch.cat([prefix, own[:half], suffix[:length], own[half:], suffix[length:]]))
    embeddings = torch.stack(rows)
    eos = [len(tokenizer("X X X X " + name.replace("_", " ") + ".")["input_ids"]) - 1 for name in names]
    length = embeddings.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None].expand(len(names), 1, -1, -1)
    with torch.no_grad():
        hidden = embeddings + tower.embeddings.position_embedding.weight[:length]
        hidden = tower.final_layer_norm(tower.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state)
        expected = base.text_projection(hidden[torch.arange(len(names)), eos])
        model = CoOpModel.from_coop_checkpoint(
            tmp_path / "c", base, names, position, processor=processor, text_pass=text_pass
        )
        assert torch.allclose(model.get_text_features(), expected, atol=1e-5)
        model.save_pretrained(tmp_path / "adapter")
        loaded = CoOpModel.from_pretrained(tmp_path / "adapter", base_model=base, processor=processor)
        assert torch.allclose(loaded.get_text_features(), expected, atol=1e-5)
        plain = CoOpModel(base, CoOpConfig(4, position, class_specific), names, processor, context=context)
        assert not torch.allclose(plain.get_text_features(), expected, atol=1e-2), "names too easy to tell"


def test_the_rule_stands_in_files_only_where_it_is_the_originals():
    assert "merge_full_stop" not in json.loads(CoOpConfig(n_ctx=4).to_json())
    values = json.loads(CoOpConfig(n_ctx=4, class_token_position="middle", merge_full_stop=True).to_json())
    assert values["merge_full_stop"] is True and CoOpConfig.from_dict(values).merge_full_stop
    assert CoOpConfig.from_dict({"n_ctx": 4}).merge_full_stop is False


# ---------------------------------------------------------------------- labels, and very many classes


def test_labels_outside_the_classes(base, tokenizer):
    model = CoOpModel(base, CoOpConfig(2), ["cat", "dog"], tokenizer)
    embeds = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    for labels, message in (([0, 2, 1], "label 2 at position 1"), ([0, 1, -1], "label -1 at position 2")):
        with pytest.raises(ValueError, match=f"{message} is outside the 2 classes: labels go from 0 to 1"):
            model(image_embeds=embeds, labels=torch.tensor(labels))
    assert model(image_embeds=embeds, labels=torch.tensor([0, -100, 1])).loss.isfinite()


def test_trainer_refuses_labels_outside_the_classes(base, processor, tmp_path):
    from coop_hf import EmbeddedImages

    model = CoOpModel(base, CoOpConfig(2), ["cat", "dog"], processor)
    train = EmbeddedImages(torch.randn(4, 24), [0, 1, 2, 0])
    with pytest.raises(ValueError, match="label"):
        CoOpTrainer(model=model, args=arguments(tmp_path), train_dataset=train).train()
    with pytest.raises(ValueError, match="label"):
        LabelledImages(images_of([0, 1, 2]), processor, class_names=["cat", "dog"])


def test_very_many_classes():
    """200,000 names and their packing take a second or two; one bin after another for each item took minutes."""
    names = [f"cat {i}" for i in range(200_000)]
    lengths = [3 + len(name) for name in names]
    before = time.process_time()
    assert check_class_names(names) == names
    bins = first_fit(lengths, 64)
    assert time.process_time() - before < 10
    assert sorted(item for own in bins for item in own) == list(range(200_000))
    assert max(sum(lengths[i] for i in own) for own in bins) <= 64


def test_imported_checkpoints_crop_as_the_original_did(tokenizer, processor, base, tmp_path):
    """29 x 20 pixels are resized to 23 x 16; of the 7 columns left over, torchvision leaves 4 on the left, and the
    processor 3 (7 / 2 rounded to even, and down)."""
    write_checkpoint(tmp_path / "model.pth.tar-50", tokenizer, base)
    model = CoOpModel.from_coop_checkpoint(tmp_path / "model.pth.tar-50", base, NAMES, processor=processor)
    assert model.config.original_crop
    model.save_pretrained(tmp_path / "adapter")
    loaded = CoOpModel.from_pretrained(tmp_path / "adapter", base_model=base, processor=processor)
    image = picture(3, (29, 20))
    own, original = (eval_transform(processor, original=flag)(image)[None] for flag in (False, True))
    assert not torch.equal(own, original)
    for each in (model, loaded):
        scores = {entry["label"]: entry["score"] for entry in each.predict(image, top_k=None)}
        expected = each(pixel_values=original).logits.softmax(-1)[0].tolist()
        assert [scores[name] for name in NAMES] == pytest.approx(expected, abs=1e-6)
    assert "original_crop" not in CoOpConfig(n_ctx=4).to_json()

from dataclasses import replace

import pytest
import torch
from conftest import COLOUR_NAMES, COLOUR_OPTIONS
from torch.utils.data import Subset

from coop_hf import CoOpModel, sample_few_shot
from coop_hf.adapters.tpt import tpt
from coop_hf.experiments import methods, protocols, tasks
from coop_hf.experiments.configs import make_config
from coop_hf.training.arguments import RECIPES, get_recipe


def test_task_holds_the_embeddings(model, splits, task):
    embeds, labels = task.parts["test"]
    pixels = model.image_processor(images=splits["test"]["image"][:], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(embeds, model.get_image_features(pixels), rtol=1e-4, atol=1e-5)
    assert labels.tolist() == splits["test"]["label"][:] and task.class_names == COLOUR_NAMES


def test_draws_are_those_of_sample_few_shot(splits, task):
    few = tasks.draw_few_shot(task, 5, seed=3, with_images=True)
    own = sample_few_shot(splits["train"].add_column("row", list(range(36))), 5, seed=3)
    assert few.rows == own["row"][:] and few.labels.tolist() == own["label"][:]
    assert few.images["label"][:] == own["label"][:]
    assert torch.equal(few.image_embeds, task.parts["train"][0][few.rows])
    assert len(few.val_labels) == 6 * 4 and few.val_labels.bincount().tolist() == [4] * 6  # min(shots, 4)
    rest = sorted(set(range(36)) - set(few.rows))
    assert torch.equal(few.unlabelled_embeds, task.parts["train"][0][rest])


def test_selected_classes_keep_their_row_numbers(splits, task):
    part = tasks.select_classes(task, [4, 1], "two")
    embeds, labels = part.parts["test"]
    old = task.parts["test"][1]
    assert part.class_names == ["of", "dog"] and labels.tolist() == [
        {4: 0, 1: 1}[c] for c in old.tolist() if c in (4, 1)
    ]
    assert torch.equal(embeds, task.parts["test"][0][(old == 4) | (old == 1)])
    few = tasks.draw_few_shot(part, 2, seed=1, with_images=True)
    assert [splits["train"]["label"][row] for row in few.rows] == [4, 4, 1, 1]
    assert few.images["label"][:] == [0, 0, 1, 1]
    again = tasks.select_classes(part, [1, 0])
    assert [splits["train"]["label"][row] for row in tasks.draw_few_shot(again, 2, seed=1).rows] == [1, 1, 4, 4]


def test_validation_is_held_out_where_there_is_none(model, splits, monkeypatch, tmp_path):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path))
    parts = {"train": splits["train"], "test": splits["test"]}
    task = tasks.make_task(model, parts, "no validation", progress=False)
    assert len(task.parts["train"][1]) == 30 and task.parts["validation"][1].bincount().tolist() == [1] * 6
    few = tasks.draw_few_shot(task, 5, seed=0)
    assert [splits["train"]["label"][row] for row in few.rows] == few.labels.tolist()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_wrong_labels(share):
    labels = torch.arange(5).repeat(40)
    noisy = tasks.corrupt_labels(labels, share, 5, seed=1)
    assert (noisy != labels).sum() == round(share * 200) and noisy.min() >= 0 and noisy.max() < 5
    if share == 0.25:  # nested
        wrong = noisy != labels
        assert torch.equal(noisy[wrong], tasks.corrupt_labels(labels, 0.5, 5, seed=1)[wrong])
        assert set((noisy - labels)[wrong].remainder(5).tolist()) == {1, 2, 3, 4}


def test_coop_learns_in_a_protocol(model, task, tmp_path):
    torch.manual_seed(5)
    few = tasks.draw_few_shot(task, 4, seed=1)
    predict = methods.METHODS["coop_m4"].fit(model, few, COLOUR_OPTIONS)
    loss = torch.nn.functional.cross_entropy(predict(few.image_embeds, COLOUR_NAMES), few.labels)
    start = methods._make_student(model, few, COLOUR_OPTIONS, n_ctx=4)(
        image_embeds=few.image_embeds, labels=few.labels
    ).loss
    assert loss < 0.8 * start
    assert predict(few.image_embeds, ["dog", "sea"]).shape == (24, 2)
    torch.manual_seed(6)
    again = methods.METHODS["coop_m4"].fit(model, few, COLOUR_OPTIONS)
    assert torch.equal(again(few.image_embeds, COLOUR_NAMES), predict(few.image_embeds, COLOUR_NAMES))


def test_paper_recipe_trains_on_augmented_images(model, task, monkeypatch, tmp_path):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path))
    few = tasks.draw_few_shot(task, 1, seed=1, with_images=True)
    seen = []

    class Trainer(methods.CoOpTrainer):
        def train(self):
            seen.append((self.args.num_train_epochs, self.args.learning_rate, self.train_dataset.augment))

    monkeypatch.setattr(methods, "CoOpTrainer", Trainer)
    methods.METHODS["coop_m4"].fit(model, few, methods.Options("a {}.", ("a {}.",), recipe="paper"))
    assert seen == [(50, 2e-3, True)]


def test_other_methods_score_the_classes_they_are_given(model, task, monkeypatch):
    whole = methods.autoprompt
    monkeypatch.setattr(methods, "autoprompt", lambda *args, **kwargs: whole(*args, **{**kwargs, "num_steps": 1}))
    options = methods.Options("a {}.", ("a {}.",), cupl={name: [f"a {name}"] for name in COLOUR_NAMES})
    few = tasks.draw_few_shot(task, 1, seed=1)
    for name in ("ensemble", "cupl", "autoprompt"):
        assert methods.METHODS[name].fit(model, few, options)(few.image_embeds, ["dog", "sea"]).shape == (6, 2)
    rare = methods.Options("zyxqv a {}.", ("a {}.",))  # no prompt of whole words to start from
    assert methods.METHODS["autoprompt"].fit(model, few, rare)(few.image_embeds, ["dog", "sea"]).shape == (6, 2)
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="no others"):
        methods.METHODS["linear_probe"].fit(model, few, options)(few.image_embeds, ["dog"])


def test_pet_in_a_protocol_sees_the_rest_of_the_pool(model, task, monkeypatch):
    calls = []
    monkeypatch.setattr(methods, "fit_pet", lambda *args, **kwargs: calls.append(args))
    few = tasks.draw_few_shot(task, 1, seed=1)
    methods.METHODS["pet"].fit(model, few, COLOUR_OPTIONS)
    ((_, teachers, images, labels, unlabelled),) = calls
    assert teachers[0] == list(COLOUR_OPTIONS.ensemble) and [t.shape for t in teachers[1:]] == [(6, 24)]
    assert len(images) == 6 and len(unlabelled) == 30 and torch.equal(labels, few.labels)


def test_ablations():
    variants = methods.ablation_methods("an emoji of a {}.")
    assert set(variants) == set(methods.ABLATIONS)
    assert variants["words"].fit.keywords["ctx_init"] == "an emoji of a"
    assert not variants["m16_csc"].any_classes and variants["m16"].any_classes
    assert "words" not in methods.ablation_methods("{}.")
    with pytest.raises(ValueError, match="no ablation 'm5'"):
        methods.ablation_methods("a {}.", ["m5"])


LEARNERS = [name for name, method in methods.METHODS.items() if method.fit.__class__.__name__ == "partial"]


@pytest.mark.parametrize("name", LEARNERS)
def test_every_method_learns_in_a_protocol(model, task, monkeypatch, name):
    monkeypatch.setitem(RECIPES["fast"], "max_steps", 2)
    before = {key: value.clone() for key, value in model.get_base_model().state_dict().items()}
    method = methods.METHODS[name]
    few = tasks.draw_few_shot(task, 2, seed=1, with_images=method.sees_images)
    predict = method.fit(model, few, COLOUR_OPTIONS)
    images = task.views["test"] if method.sees_images else task.parts["test"][0]
    assert getattr(predict, "sees_images", False) == method.sees_images
    scores = predict(images, COLOUR_NAMES)
    assert scores.shape == (48, 6) and torch.isfinite(scores).all()
    zero_shot = methods.METHODS["zero_shot"].fit(model, None, COLOUR_OPTIONS)(task.parts["test"][0], COLOUR_NAMES)
    assert not torch.allclose(scores, zero_shot, atol=1e-3) or name == "clip_adapter"
    if method.any_classes:
        assert predict(images, ["dog", "sea"]).shape == (48, 2)
    elif name != "coop_csc":
        with pytest.raises(ValueError, match="no others"):
            predict(images, ["dog"])
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_what_changes_the_image_tower_is_tested_on_images(model, task, monkeypatch):
    """Scores of a part's images go through the prompted tower, also after classes were selected."""
    monkeypatch.setitem(RECIPES["fast"], "max_steps", 3)
    part = tasks.select_classes(task, [4, 1, 2])
    few = tasks.draw_few_shot(part, 2, seed=1, with_images=True)
    predict = methods.METHODS["vpt"].fit(model, few, COLOUR_OPTIONS)
    views, labels = part.views["test"], part.parts["test"][1]
    assert len(views) == len(labels) == 24
    all_scores, all_labels = predict(task.views["test"], part.class_names), task.parts["test"][1]
    kept = (all_labels == 4) | (all_labels == 1) | (all_labels == 2)
    torch.testing.assert_close(predict(views, part.class_names), all_scores[kept], rtol=1e-4, atol=1e-4)
    right = (predict(views, part.class_names).argmax(dim=1) == labels).float().mean().item()
    assert protocols._test(predict, part) == pytest.approx(right)


def test_a_method_starts_as_its_official_code(tokenizer):
    def fields(method, objective=None, layers=12, **given):
        config = make_config(method, objective, given, tokenizer, layers, "a photo of a")
        names = ("n_ctx", "ctx_init", "fixed_words", "n_vision", "depth", "class_specific")
        return {name: getattr(config, name) for name in names if getattr(config, name, None)}

    assert fields("coop") == {"n_ctx": 16}
    assert fields("coop", "kgcoop") == {"n_ctx": 4, "ctx_init": "a photo of a"}
    assert fields("coop", "prograd") == {"n_ctx": 16, "ctx_init": "a photo of a"}
    assert fields("cocoop") == {"n_ctx": 4, "ctx_init": "a photo of a"}
    two = {"n_ctx": 2, "ctx_init": "a photo", "fixed_words": "of a"}
    assert fields("maple") == two and fields("ivlp") == {**two, "n_vision": 2}
    four = {"n_ctx": 4, "ctx_init": "a photo of a"}
    assert fields("ivlp", "promptsrc") == {**four, "n_vision": 4, "depth": 9}
    assert fields("ivlp", "promptsrc", layers=3)["depth"] == 3
    assert fields("maple", "kgcoop", n_ctx=3, depth=2) == {
        "n_ctx": 3, "ctx_init": "a photo of", "fixed_words": "a", "depth": 2,
    }  # fmt: skip
    assert fields("maple", ctx_init=None) == {"n_ctx": 2}
    assert fields("ivlp", class_specific=True)["class_specific"]
    assert fields("coop", ctx_init="a photo") == {"ctx_init": "a photo"}
    with pytest.raises(ValueError, match="the method 'vpt' has no 'n_ctx': what it has is 'n_vision', 'depth'"):
        fields("vpt", n_ctx=4)
    with pytest.raises(ValueError, match="no method 'mapel'; choose from coop, "):
        fields("mapel")


def test_tpt_in_a_protocol(model, task):
    few = tasks.select_classes(task, [0, 3])
    views = Subset(few.views["test"], [0, 5, 9])
    predict = methods.METHODS["tpt"].fit(model, None, replace(COLOUR_OPTIONS, words="a photo"))
    images = [task.views["test"].image(views.dataset.indices[i]) for i in views.indices]
    student = CoOpModel(model.get_base_model(), class_names=few.class_names, processor=model.processor)
    with student.disable_adapter():
        expected = tpt(student, images, ctx_init="a photo").logits
    assert torch.equal(predict(views, few.class_names), expected)


def test_the_fast_recipe_takes_few_images_where_each_has_class_embeddings_of_its_own():
    assert get_recipe("fast", "cocoop")["batch_size"] == 8 and get_recipe("fast")["batch_size"] > 10_000
    assert get_recipe("paper", "cocoop")["batch_size"] == 1

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser

from coop_hf import CoOpTrainingArguments
from coop_hf.training.arguments import fast_shots, fast_steps, fast_stretch, paper_epochs


def test_the_papers_recipe(tmp_path):
    args = CoOpTrainingArguments(str(tmp_path), recipe="paper")
    args.complete(num_images=320, num_shots=16, num_classes=20, embedding_size=0.02)
    assert (args.optim, args.optim_args) == ("sgd", "momentum=0.9")
    assert (args.learning_rate, args.weight_decay) == (2e-3, 5e-4)
    assert (args.per_device_train_batch_size, args.num_train_epochs) == (32, 200)
    assert args.max_grad_norm == 0 and args.steps_by_epoch


@pytest.mark.parametrize("shots, epochs", [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_follow_the_shots(shots, epochs):
    assert paper_epochs(shots, 100) == epochs
    assert paper_epochs(shots, 1000) == 50


def test_whatever_is_set_overrides_the_recipe(tmp_path):
    args = CoOpTrainingArguments(
        str(tmp_path),
        recipe="paper",
        learning_rate=0.5,
        weight_decay=0.0,
        optim="adamw_torch",
        num_train_epochs=3,
        per_device_train_batch_size=5,
        lr_scheduler_type="constant",
    )
    args.complete(320, 16, 20, 0.02)
    assert (args.learning_rate, args.weight_decay, args.optim, args.num_train_epochs) == (0.5, 0.0, "adamw_torch", 3)
    assert args.optim_args is None  # SGD's momentum is not handed to Adam
    assert args.per_device_train_batch_size == 5 and not args.steps_by_epoch


def test_the_fast_recipe_takes_all_images_at_once(tmp_path):
    args = CoOpTrainingArguments(str(tmp_path), recipe="fast")
    args.complete(321, 16, 20, 0.02)
    assert args.per_device_train_batch_size == 321 and args.max_steps == 360
    assert args.learning_rate == pytest.approx(0.2 * 0.02)  # in units of the token embeddings
    assert args.variant == "tensor_adam"
    assert "one second moment for a tensor" in args.describe(200)["hyperparameters"]["optimizer"]
    args = CoOpTrainingArguments(str(tmp_path), recipe="fast", num_train_epochs=7)
    args.complete(321, 16, 20, 0.02)
    assert args.max_steps == -1 and args.num_train_epochs == 7
    args = CoOpTrainingArguments(str(tmp_path), recipe="fast", cache_features=False)
    args.complete(321, 16, 20, 0.02)
    assert args.per_device_train_batch_size == 32  # images don't fit in memory as their embeddings do


def test_the_fast_recipes_length_follows_the_shots(tmp_path):
    assert [fast_steps(shots) for shots in (1, 2, 4, 8, 12, 16, 10_000)] == [20, 32, 56, 104, 232, 360, 360]
    assert [fast_steps(shots, 200) for shots in (1, 2, 4, 8, 12, 16, 10_000)] == [20, 32, 56, 104, 152, 200, 200]
    for classes in (2, 37, 1000):  # no more than the paper's at 1 shot, a tenth at 16
        for shots in (1, 2, 4, 8, 16):
            paper = paper_epochs(shots, classes) * max(1, shots * classes // 32)
            args = CoOpTrainingArguments(str(tmp_path))
            args.complete(shots * classes, shots, classes, 0.02)
            assert args.max_steps == fast_steps(fast_shots(shots, classes)) and (shots > 1 or args.max_steps <= paper)
            assert not (shots == 16 and classes >= 37) or 10 * args.max_steps <= paper


def test_the_fast_recipes_rate_follows_the_shots(tmp_path):
    for shots, rate in [(1, 0.05), (2, 0.05), (3, 0.075), (4, 0.1), (8, 0.1), (12, 0.15), (16, 0.2), (500, 0.2)]:
        args = CoOpTrainingArguments(str(tmp_path))
        args.complete(shots * 20, shots, 20, 0.02)
        assert args.learning_rate == pytest.approx(rate * 0.02)
    # What longer trainings were examined for is CoOp's own objective.
    for given_objective, method in [("kgcoop", "coop"), ("cross_entropy", "deep_text")]:
        args = CoOpTrainingArguments(str(tmp_path), objective=given_objective)
        args.complete(16 * 20, 16, 20, 0.02, method=method)
        assert (args.max_steps, args.learning_rate) == (200, pytest.approx(0.05 * 0.02))


def test_the_fast_recipe_knows_short_and_class_specific_contexts(tmp_path):
    assert [fast_stretch(n) for n in (None, 32, 16, 8, 4, 2, 1)] == pytest.approx([1, 1, 1, 2**0.5, 2, 8**0.5, 4])
    for shots, steps, rate in [(1, 40, 0.1), (4, 112, 0.1), (8, 208, 0.1), (12, 284, 0.15), (16, 360, 0.2)]:
        args = CoOpTrainingArguments(str(tmp_path))
        args.complete(shots * 20, shots, 20, 0.02, n_ctx=4)
        assert (args.max_steps, args.learning_rate) == (steps, pytest.approx(rate * 0.02))
    for shots, steps, rate in [(1, 20, 0.05), (4, 56, 0.05), (8, 208, 0.125), (12, 360, 0.2), (16, 360, 0.2)]:
        args = CoOpTrainingArguments(str(tmp_path))
        args.complete(shots * 20, shots, 20, 0.02, n_ctx=None)  # class-specific
        assert (args.max_steps, args.learning_rate) == (steps, pytest.approx(rate * 0.02))
    args = CoOpTrainingArguments(str(tmp_path))
    args.complete(20, 1, 20, 0.02, n_ctx=1)
    assert (args.max_steps, args.learning_rate) == (40, pytest.approx(0.2 * 0.02))  # no more than the paper's 50 steps
    args = CoOpTrainingArguments(str(tmp_path), max_steps=7, learning_rate=0.3)
    args.complete(20, 1, 20, 0.02, n_ctx=4)
    assert (args.max_steps, args.learning_rate) == (7, 0.3)
    for given_objective, method, n_ctx in [("kgcoop", "coop", None), ("cross_entropy", "deep_text", 4)]:
        args = CoOpTrainingArguments(str(tmp_path), objective=given_objective)
        args.complete(20, 1, 20, 0.02, method=method, n_ctx=n_ctx)
        assert (args.max_steps, args.learning_rate) == (20, pytest.approx(0.05 * 0.02))


def test_many_classes_count_as_shots_of_a_shared_context(tmp_path):
    cases = [(1, 60, 20, 0.05), (1, 105, 56, 0.1), (2, 105, 68, 0.1), (8, 90, 168, 0.125), (1, 1000, 360, 0.2)]
    for shots, classes, steps, rate in cases:
        args = CoOpTrainingArguments(str(tmp_path))
        args.complete(shots * classes, shots, classes, 0.02)
        assert (args.max_steps, args.learning_rate) == (steps, pytest.approx(rate * 0.02))
    # What each class has of its own is learned from its own images; another objective was not examined.
    for values, n_ctx in [({}, None), ({"objective": "kgcoop"}, 16)]:
        args = CoOpTrainingArguments(str(tmp_path), **values)
        args.complete(1000, 1, 1000, 0.02, n_ctx=n_ctx)
        assert (args.max_steps, args.learning_rate) == (20, pytest.approx(0.05 * 0.02))
    for classes in range(1, 1200):  # at 1 shot no more steps than the paper's, words and single vectors too
        paper = paper_epochs(1, classes) * max(1, classes // 32)
        assert all(fast_steps(fast_shots(1, classes, n), n_ctx=n) <= paper for n in (None, 1, 4, 16))


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20), st.integers(1, 1000), st.none() | st.integers(1, 64))
def test_more_images_never_shorten_the_fast_recipe(shots, most, n_ctx):
    steps = [fast_steps(value, most, n_ctx) for value in sorted(shots)]
    assert steps == sorted(steps) and min(20, most) <= steps[0] and steps[-1] <= most


def test_shots_of_the_fast_recipe_are_a_mean_or_given(tmp_path):
    for values, steps in [({}, 38), ({"num_shots": 4}, 56), ({"max_steps": 7}, 7)]:
        args = CoOpTrainingArguments(str(tmp_path), **values)
        args.complete(num_images=50, num_shots=31, num_classes=20, embedding_size=0.02)
        assert args.max_steps == steps
    args = CoOpTrainingArguments(str(tmp_path), optim="adamw_torch", learning_rate=0.1)
    args.complete(50, 31, 20, 0.02)
    assert args.variant is None  # whoever names an optimizer gets that one


def test_accumulated_steps_share_the_recipes_batch(tmp_path):
    args = CoOpTrainingArguments(str(tmp_path), recipe="paper", gradient_accumulation_steps=4)
    args.complete(320, 16, 20, 0.02)
    assert args.per_device_train_batch_size == 8


@pytest.mark.parametrize(
    "given, message",
    [
        ({"recipe": "quick"}, "'paper' or 'fast', got 'quick'"),
        ({"on_bad_image": "ignore"}, "'raise' or 'skip'"),
        ({"num_views": 3, "cache_features": False}, "num_views=3"),
        ({"num_views": -1}, "at least 0"),
        ({"augment": True}, "cache_features=False"),
    ],
)
def test_bad_arguments(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        CoOpTrainingArguments(str(tmp_path), **given)


def test_the_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --recipe paper --learning_rate 0.1 --num_shots 4 --num_views 2 --image_column img"
    (args,) = HfArgumentParser(CoOpTrainingArguments).parse_args_into_dataclasses(line.split())
    assert (args.recipe, args.learning_rate, args.num_shots, args.num_views) == ("paper", 0.1, 4, 2)
    assert args.image_column == "img" and args.num_train_epochs is None


PAPERS = {  # global batch, learning rate, epochs with 16 shots
    ("coop", None): (32, 2e-3, 200),
    ("cocoop", None): (1, 2e-3, 10),
    ("vpt", None): (4, 2.5e-3, 5),
    ("ivlp", None): (4, 3.5e-3, 5),
    ("maple", None): (4, 3.5e-3, 5),
    ("tcp", None): (32, 2e-3, 50),
    ("coop", "kgcoop"): (128, 2e-3, 100),
    ("coop", "prograd"): (32, 2e-3, 200),
    ("ivlp", "promptsrc"): (4, 2.5e-3, 20),
    ("maple", "kgcoop"): (4, 3.5e-3, 5),
}


@pytest.mark.parametrize("method, objective", PAPERS)
def test_the_official_recipe_of_each_method(tmp_path, method, objective):
    args = CoOpTrainingArguments(str(tmp_path), recipe="paper", objective=objective)
    args.complete(320, 16, 20, 0.02, method)
    found = (args.per_device_train_batch_size, args.learning_rate, args.num_train_epochs)
    assert found == PAPERS[method, objective]
    assert args.weight_decay == 5e-4 and args.steps_by_epoch
    assert args.objective == (objective or {"tcp": "kgcoop"}.get(method, "cross_entropy"))
    average = (15.0, 1.0) if objective == "promptsrc" else (None, None)
    assert (args.average_mean, args.average_std) == average
    if method == "tcp":
        assert args.variant == "adam_l2" and args.adam_epsilon == 1e-3 and args.optim_args is None
    else:
        assert (args.optim, args.optim_args, args.adam_epsilon) == ("sgd", "momentum=0.9", 1e-8)
        assert args.variant is None


def test_every_value_of_a_methods_recipe_can_be_overridden(tmp_path):
    given = {"learning_rate": 0.5, "num_train_epochs": 3, "per_device_train_batch_size": 7, "adam_epsilon": 1e-6}
    given |= {"weight_decay": 0.0, "objective": "cross_entropy", "optim": "sgd", "optim_args": "momentum=0.5"}
    given |= {"average_mean": 2.0, "average_std": 3.0}
    for method in ("tcp", "ivlp"):
        args = CoOpTrainingArguments(str(tmp_path), recipe="paper", **given)
        args.complete(320, 16, 20, 0.02, method)
        assert {name: getattr(args, name) for name in given} == given and args.variant is None


def test_what_is_set_on_the_arguments_later_stays(tmp_path):
    args = CoOpTrainingArguments(str(tmp_path), recipe="paper")
    args.learning_rate, args.optim = 0.25, "adamw_torch"
    args.complete(320, 16, 20, 0.02, "tcp")
    assert (args.learning_rate, args.optim, args.num_train_epochs) == (0.25, "adamw_torch", 50)
    assert args.variant is None

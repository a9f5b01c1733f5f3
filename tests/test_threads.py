"""Predictions in many threads while others change adapter, classes and `disable_adapter`: each is one of the answers
that a single thread gets, never a mixture."""

import asyncio
import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_base, picture

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.pipeline import CoOpImageClassificationPipeline


NAMES = ["cat", "dog", "sea_lion", "hat", "photo of a dog"]
OTHERS = ["sea", "7", "cat!"]
PREDICTIONS = 300


@pytest.fixture(autouse=True)
def switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def make_model(base, processor, seed=0, **config):
    torch.manual_seed(seed)
    model = CoOpModel(base, CoOpConfig(n_ctx=2, **config), NAMES, processor)
    with torch.no_grad():
        model.context.normal_(std=0.5)
    return model.eval()


def rounded(prediction):
    return tuple((entry["label"], round(entry["score"], 4)) for entry in prediction)


def hammer(predict, expected, *changes, threads=4):
    """Predicts in several threads while others go through `changes` again and again."""
    assert len(set(expected)) == len(expected) > 1, "answers that cannot be told apart would hide a mixture"
    ended, seen = threading.Event(), []

    def change(functions):
        while not ended.is_set():
            for function in functions:
                function()

    def work():
        return [rounded(predict()) for _ in range(PREDICTIONS // threads)]

    with ThreadPoolExecutor(threads + len(changes)) as pool:
        changing = [pool.submit(change, functions) for functions in changes]
        try:
            for future in [pool.submit(work) for _ in range(threads)]:
                seen += future.result()
        finally:
            ended.set()
        for future in changing:
            future.result()
    assert set(seen) <= set(expected), "a prediction that belongs to no state"
    assert set(seen) == set(expected), "the changes were never seen: the test proves nothing"


@pytest.mark.parametrize("class_specific", [False, True], ids=["unified", "class-specific"])
def test_other_classes_meanwhile(base, processor, class_specific):
    """A class-specific context follows the order of its names, so names and vectors must change together."""
    model = make_model(base, processor, class_specific=class_specific)
    lists = [NAMES, NAMES[::-1]] if class_specific else [NAMES, OTHERS]
    image, expected = picture(1), []
    for names in lists:
        model.set_class_names(names)
        scores = model(**processor(images=image, return_tensors="pt")).logits[0].softmax(dim=-1).tolist()
        expected.append(tuple((name, round(score, 4)) for name, score in zip(names, scores)))

    pixels = processor(images=image, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def predict():
        view = model.view()
        scores = model(pixel_values=pixels, _view=view).logits[0].softmax(dim=-1).tolist()
        return [{"label": name, "score": score} for name, score in zip(view.classes.class_names, scores)]

    hammer(predict, expected, [lambda names=names: model.set_class_names(names) for names in lists])


def test_predict_and_pipeline_while_classes_change(base, processor):
    model = make_model(base, processor)
    pipeline = CoOpImageClassificationPipeline(model=model)
    images, expected = [picture(1), picture(1)], []
    for names in (NAMES, OTHERS):
        model.set_class_names(names)
        expected.append(rounded(model.predict(images[0])))

    def whole():
        """Both images of one call, in two batches, see the same classes."""
        first, second = model.predict(images, batch_size=1)
        assert rounded(first) == rounded(second)
        return first

    changes = [lambda names=names: model.set_class_names(names) for names in (NAMES, OTHERS)]
    hammer(whole, expected, changes)
    hammer(lambda: pipeline(images[0]), expected, changes)


def test_another_adapter_meanwhile(base, processor):
    model = make_model(base, processor)
    model.add_adapter("other", CoOpConfig(n_ctx=3), OTHERS, context=torch.randn(3, 32))
    image, expected = picture(2), []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(rounded(model.predict(image)))
    hammer(
        lambda: model.predict(image),
        expected,
        [lambda: model.set_adapter("default"), lambda: model.set_adapter("other")],
        [lambda: model.add_adapter("third", class_names=["cat"]), lambda: model.delete_adapter("third")],
    )


def test_disabled_in_some_threads_only(base, processor):
    model, image = make_model(base, processor), picture(3)
    with model.disable_adapter():
        zero_shot = rounded(model.predict(image))
    learned = rounded(model.predict(image))
    assert zero_shot != learned

    def work(disabled):
        for _ in range(60):
            if disabled:
                with model.disable_adapter():
                    assert model.is_disabled and rounded(model.predict(image)) == zero_shot
            assert not model.is_disabled and rounded(model.predict(image)) == learned

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, number % 2 == 0) for number in range(6)]:
            future.result()
    assert not model.is_disabled and rounded(model.predict(image)) == learned


def test_disabled_in_some_tasks_only(base, processor):
    model, image = make_model(base, processor), picture(3)
    with model.disable_adapter():
        zero_shot = rounded(model.predict(image))

    async def disabled(turns):
        with model.disable_adapter():
            inner = asyncio.create_task(enabled_or_not())
            for _ in range(turns):
                assert model.is_disabled and rounded(model.predict(image)) == zero_shot
                await asyncio.sleep(0)
            assert await inner, "a task that is started inside the block is inside it"
        assert not model.is_disabled

    async def enabled_or_not():
        await asyncio.sleep(0)
        return model.is_disabled

    async def enabled():
        for _ in range(8):
            assert not model.is_disabled and rounded(model.predict(image)) != zero_shot
            await asyncio.sleep(0)

    async def everything():
        await asyncio.gather(disabled(2), enabled(), disabled(7), enabled())

    asyncio.run(everything())
    assert not model.is_disabled


def test_nested_and_overlapping_blocks(base, processor):
    model, other = make_model(base, processor), make_model(base, processor)
    with model.disable_adapter():
        with model.disable_adapter():
            assert model.is_disabled and not other.is_disabled, "of one model, not of all"
        assert model.is_disabled
    assert not model.is_disabled
    first, second = model.disable_adapter(), model.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.is_disabled
    second.__exit__(None, None, None)
    assert not model.is_disabled
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert not model.is_disabled


def test_copies(processor):
    """A copy made inside a block is outside it, whatever becomes of the block."""
    model = make_model(make_base(processor.tokenizer), processor)
    embeds = torch.randn(2, 24)
    with torch.no_grad():
        expected = model(image_embeds=embeds).logits
        with model.disable_adapter():
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            for twin in copies:
                assert model.is_disabled and not twin.is_disabled
        for twin in copies:
            assert torch.equal(twin(image_embeds=embeds).logits, expected)
            with twin.disable_adapter():
                assert twin.is_disabled and not model.is_disabled
                assert not torch.equal(twin(image_embeds=embeds).logits, expected)


def test_two_threads_set_the_classes_of_a_class_specific_context(base, processor):
    """What was learned for a class stays with its name, whoever comes first."""
    model = make_model(base, processor, class_specific=True)
    own = {name: vectors.clone() for name, vectors in zip(NAMES, model.context.detach())}
    orders = [NAMES, NAMES[::-1], NAMES[2:] + NAMES[:2], NAMES[1:] + NAMES[:1]]

    def work(names):
        for _ in range(40):
            model.set_class_names(names)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, names) for names in orders]:
            future.result()
    for name, vectors in zip(model.class_names, model.context.detach()):
        assert torch.equal(vectors, own[name])

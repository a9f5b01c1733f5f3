import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
import yaml

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.files.model_card import CARD_NAME, code, make_card, write_card
from coop_hf.interpret import nearest_rows


NAMES = ["cat", "dog", "sea_lion"]
TRAINING = {
    "dataset": "Emoji",
    "dataset_id": "ada/emoji",
    "split": "test",
    "num_train": 320,
    "num_eval": 160,
    "shots": 16,
    "seed": 1,
    "license": "mit",
    "metrics": {"accuracy": 0.553, "macro_f1": 0.521, "loss": 1.2},
    "zero_shot_metrics": {"accuracy": 0.398, "macro_f1": 0.4},
    "hyperparameters": {"learning_rate": 0.002, "epochs": 50},
    "hardware": "2 CPU cores",
    "seconds": 75.0,
}


def make_model(base, processor, names=NAMES, base_name="ada/tiny-clip", adapter_name="default", **config):
    torch.manual_seed(0)
    config = CoOpConfig(**{"n_ctx": 4, "base_model_name_or_path": base_name, **config})
    return CoOpModel(base, config, names, processor, adapter_name=adapter_name)


def metadata(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def part(card, name):
    return re.search(rf"<!-- coop_hf: begin {name} -->\n(.*?)<!-- coop_hf: end {name} -->", card, re.DOTALL)[1].strip(
        "\n"
    )


def html(text):
    markdown_it = pytest.importorskip("markdown_it")
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def test_what_stands_in_a_card(base, processor):
    card = make_card(make_model(base, processor), "ada/flowers", training=TRAINING)
    values = metadata(card)
    assert values == {
        "base_model": "ada/tiny-clip",
        "base_model_relation": "adapter",
        "library_name": "coop_hf",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "coop", "prompt-learning", "few-shot"],
        "license": "mit",
        "datasets": ["ada/emoji"],
        "metrics": ["accuracy", "f1"],
        "model-index": [
            {
                "name": "flowers",
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image Classification"},
                        "dataset": {"type": "ada/emoji", "name": "Emoji", "split": "test"},
                        "metrics": [
                            {"type": "accuracy", "value": 0.553, "name": "Accuracy"},
                            {"type": "f1", "value": 0.521, "name": "Macro-F1"},
                        ],
                    }
                ],
            }
        ],
    }
    learned = part(card, "learned")
    assert "`[V]1 … [V]4 [CLASS] .`, the class name at the end" in learned
    assert "3 classes: `cat`, `dog`, `sea_lion`." in learned and "norm" in learned
    results = part(card, "results")
    assert "| Zero-shot, `a photo of a {}.` | 39.8 | 40.0 |" in results
    assert "| This prompt | **55.3** | **52.1** |" in results and "| Difference | +15.5 | +12.1 |" in results
    assert "the `test` part of [ada/emoji](https://huggingface.co/datasets/ada/emoji) (160 images)" in results
    training = part(card, "training")
    assert "| `learning_rate` | `0.002` |" in training and "| Time | 1 min |" in training
    assert "| Hardware | `2 CPU cores` |" in training and "`torch 2." in training
    assert "16 images of each class" in training and training.count("| Seed | `1` |") == 1
    assert "zhou2022coop" in card


def test_nearest_words(base, processor):
    pytest.importorskip("coop_hf.interpret")
    model = make_model(base, processor, ["cat"], class_specific=True)
    with torch.no_grad():
        embedding = base.text_model.embeddings.token_embedding.weight
        cat = processor.tokenizer("cat", add_special_tokens=False)["input_ids"][0]
        model.context.copy_(embedding[cat].expand(1, 4, -1))
    assert "| `cat` 3 | `cat` (0.00)" in part(make_card(model), "learned")


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_every_variant_has_a_card(base, processor, position, class_specific):
    model = make_model(base, processor, class_token_position=position, class_specific=class_specific)
    card = make_card(model, "ada/flowers")
    assert ("class-specific: each class" in card) == class_specific and "model-index" not in metadata(card)
    assert part(card, "results") == part(card, "training") == ""


def test_code_runs_as_pasted(processor, base_folder, tmp_path):
    """The Python blocks of a card of a saved adapter, in the folder that it was saved from."""
    model = CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=2), NAMES)
    model.add_adapter("for snow", CoOpConfig(n_ctx=2))
    model.save_pretrained(tmp_path / "adapter")
    write_card(tmp_path / "adapter", model, "adapter")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "adapter" / CARD_NAME).read_text(), re.DOTALL)
    assert len(blocks) == 2
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    scores = [float(line.split()[0]) for line in run.stdout.splitlines()]
    assert len(scores) == 6 and all(0 <= score <= 1 for score in scores)


def test_a_local_base_is_named_without_its_path(base, processor):
    card = make_card(make_model(base, processor, base_name="/home/ada/models/my_clip"), "ada/flowers")
    assert "/home/ada" not in card and "`my_clip` (a local model)" in card
    assert "base_model" not in metadata(card) and 'base_model="path/to/the/base/model"' in card


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "![a](http://evil.example/x.png)",
    "https://evil.example",
    "www.evil.example",
    "`</code><b>x",
    "``<i>``",
    "a | b | c",
    "# heading\n\n## next",
    "<!-- coop_hf: end learned -->",
    "x\n<!-- coop_hf: end learned -->\ny",
    "--- ---",
    "*em* _em_ **strong** ~~s~~",
    "&lt;b&gt; &amp;",
    "@someone #1",
    "\\`",
    "\u202eevil\u2028<b>",
]


def test_class_names_are_shown_and_never_interpreted(real_base, real_tokenizer):
    model = CoOpModel(
        real_base,
        CoOpConfig(n_ctx=2, template="<b>{}</b> [x](http://evil.example)", base_model_name_or_path="a](http://x) <b>"),
        HOSTILE,
        real_tokenizer,
    )
    training = {
        "dataset": "<b>data</b>",
        "dataset_id": "../evil](x)",
        "split": "`<b>",
        "metrics": {"accuracy": 0.5},
        "hyperparameters": {"<b>key</b>|": "<img src=x>\n| a | b |"},
        "hardware": "<b>\n# big",
        "license": "mit\nbase_model: evil/evil",
        "versions": {"torch": "<b>1</b>", "<b>evil</b>": "2", "[x](http://evil.example)\n# big": "3"},
    }
    card = make_card(model, "ada/flowers", training=training)
    values = metadata(card)
    assert values["license"] == training["license"] and "base_model" not in values and "datasets" not in values
    body = html(card.split("\n---\n", 1)[1])
    without_code = re.sub(r"<(code|pre)[^>]*>.*?</\1>", "", body, flags=re.DOTALL)
    without_comments = re.sub(r"<!-- coop_hf: (begin|end) \w+ -->|<!-- Write[^\n]*-->", "", without_code)
    tags = set(re.findall(r"<[^>]*>", without_comments))
    allowed = {"table", "thead", "tbody", "tr", "th", "td", "p", "h1", "h2", "em", "strong"}
    assert {tag for tag in tags if not tag.startswith("<a ")} <= {f"{s}{t}>" for t in allowed for s in ("<", "</")} | {
        '<th style="text-align:right">',
        '<td style="text-align:right">',
        "</a>",
    }
    links = re.findall(r'href="([^"]*)"', without_comments)
    assert set(links) == {"https://arxiv.org/abs/2109.01134"}
    assert "evil" not in re.sub(r"<[^>]*>", "", without_comments), "all that is hostile stands in code"
    assert body.count("<!-- coop_hf: end learned -->") == 1, "a class name does not end a part"
    # Written again, nothing grows.
    assert make_card(model, "ada/flowers", existing=card, training=training) == card


@pytest.mark.parametrize("text", [*HOSTILE, "`", "``", "` `", "", " ", "\n", "a`b``c", "`a`", "|", "\x00\x1b[0m"])
def test_code_spans(text):
    shown = html(f"| a |\n|---|\n| x{code(text)}y |\n")
    assert len(re.findall("<code>", shown)) == 1 and shown.count("<td>") == 1
    content = re.search(r"<code>(.*)</code>", shown)[1]
    assert "<" not in content and "\n" not in content


# ---------------------------------------------------------------------- what people wrote


def test_saving_again_changes_nothing(base, processor, tmp_path):
    model = make_model(base, processor)
    path = write_card(tmp_path, model, "ada/flowers", training=TRAINING)
    before = open(path).read()
    write_card(tmp_path, model, "ada/flowers")
    assert open(path).read() == before, "results and training are kept where nothing new is known"


def test_edits_survive(base, processor):
    model = make_model(base, processor)
    card = make_card(model, "ada/flowers", training=TRAINING)
    card = card.replace("license: mit\n", "license: apache-2.0\nlanguage:\n- en\n").replace("- few-shot\n", "- mine\n")
    card = card.replace(
        "<!-- coop_hf: begin results -->", "My own lines, *with* style.\n\n<!-- coop_hf: begin results -->"
    )
    card = card.replace(
        f"<!-- coop_hf: begin citation -->\n\n{part(card, 'citation')}\n\n<!-- coop_hf: end citation -->", ""
    )
    card += "\n## My section\n\nhere | and | there\n"
    model.context.data.neg_()
    model.set_class_names(["yak", "gnu"])
    again = make_card(
        model, "ada/flowers", card, training={**TRAINING, "metrics": {"accuracy": 0.75}, "license": "gpl"}
    )
    values = metadata(again)
    assert values["license"] == "apache-2.0" and values["language"] == ["en"] and "mine" in values["tags"]
    assert values["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75 and values["metrics"] == ["accuracy"]
    assert "My own lines, *with* style.\n" in again and again.endswith("\n## My section\n\nhere | and | there\n")
    assert "zhou2022coop" not in again, "a part that was deleted stays deleted"
    assert "2 classes: `yak`, `gnu`." in again and "sea_lion" not in again and "**75.0**" in again
    third = make_card(model, "ada/flowers", again, training={**TRAINING, "metrics": {"accuracy": 0.75}})
    assert third == again


def test_results_of_another_context_do_not_stay(base, processor):
    model = make_model(base, processor)
    card = make_card(model, "ada/flowers", training=TRAINING)
    model.context.data.neg_()
    after = make_card(model, "ada/flowers", card)
    assert "55.3" not in after and "model-index" not in metadata(after)
    assert metadata(after)["license"] == "mit" and metadata(after)["datasets"] == ["ada/emoji"]


def test_several_adapters_in_one_repository(base, processor):
    first, second = make_model(base, processor), make_model(base, processor, ["yak"], adapter_name="for snow")
    card = make_card(first, "ada/flowers", training=TRAINING)
    card = make_card(second, "ada/flowers", card, training={**TRAINING, "metrics": {"accuracy": 0.25}})
    assert "**55.3**" in part(card, "results") and "**25.0**" in part(card, "results for snow")
    assert [entry["name"] for entry in metadata(card)["model-index"]] == ["flowers", "flowers (for snow)"]
    assert 'subfolder="for snow"' in part(card, "use for snow")
    assert card.index("begin training for snow") < card.index("begin citation")
    again = make_card(first, "ada/flowers", card, training=TRAINING)
    assert "**25.0**" in part(again, "results for snow") and len(metadata(again)["model-index"]) == 2


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_card_that_people_wrote_gets_metadata_alone(base, processor, ending):
    mine = ending.join(["---", "license: mit", "tags: [mine]", "---", "", "# Mine", "", "All of it.", ""])
    card = make_card(make_model(base, processor), "ada/flowers", mine)
    assert metadata(card)["license"] == "mit" and metadata(card)["tags"] == ["mine"]
    assert metadata(card)["library_name"] == "coop_hf"
    assert card.endswith(ending.join(["", "# Mine", "", "All of it.", ""]))
    assert "begin learned" not in card
    without = make_card(make_model(base, processor), "ada/flowers", "# Mine\n")
    assert without.endswith("# Mine\n") and metadata(without)["library_name"] == "coop_hf"
    assert make_card(make_model(base, processor), "ada/flowers", card) == card


@pytest.mark.parametrize(
    "content",
    [
        b"---\nlicense: [mit\n---\nMine",
        b"---\n- a\n- b\n---\nMine",
        b"\xff\xfe\x00bad",
        b"---\na: &a [1]\nb: *a\n---\nMine",
        b"---\n" + b"[" * 100_000 + b"\n---\nMine",
        b"x" * (5 * 2**20),
    ],
    ids=["broken yaml", "list", "no utf-8", "aliases", "deep", "large"],
)
def test_a_card_that_can_not_be_read_is_left_as_it_is(base, processor, tmp_path, content):
    (tmp_path / CARD_NAME).write_bytes(content)
    with pytest.warns(UserWarning, match="is left as it is"):
        write_card(tmp_path, make_model(base, processor), "ada/flowers")
    assert (tmp_path / CARD_NAME).read_bytes() == content


def test_marks_without_a_partner_are_text(base, processor):
    model = make_model(base, processor)
    card = make_card(model, "ada/flowers").replace("<!-- coop_hf: end learned -->", "")
    again = make_card(model, "ada/flowers", card)
    assert again == card


def test_no_fact_of_the_training_is_hidden_in_the_card(base, processor):
    """What the card knows, its reader sees: no line remembers anything."""
    card = make_card(make_model(base, processor), "ada/flowers", training=TRAINING)
    comments = re.findall("<!--.*?-->", card, re.DOTALL)
    assert all(re.match(r"<!-- coop_hf: (begin|end) \w+ -->|<!-- Write what you like", text) for text in comments)


def test_metadata_is_brought_up_to_date(base, processor):
    card = make_card(make_model(base, processor), "ada/flowers", training=TRAINING)
    card = card.replace("pipeline_tag: zero-shot-image-classification\n", "")
    other = make_model(base, processor, base_name="ada/other-clip")
    values = metadata(make_card(other, "ada/flowers", card, training={**TRAINING, "dataset_id": "ada/more"}))
    assert values["base_model"] == "ada/other-clip" and values["datasets"] == ["ada/emoji", "ada/more"]
    assert values["pipeline_tag"] == "zero-shot-image-classification", "what is missing is added"


def test_what_people_measured_stays(base, processor):
    model = make_model(base, processor)
    card = make_card(model, "ada/flowers", training=TRAINING)
    mine = "- name: mine\n  results: [{anything: 1}]\n"
    card = card.replace("model-index:\n", "model-index:\n" + mine)
    model.context.data.neg_()
    entries = metadata(make_card(model, "ada/flowers", card))["model-index"]
    assert entries == [{"name": "mine", "results": [{"anything": 1}]}]


def test_other_methods_tell_their_own_facts(base, processor):
    model = make_model(base, processor)
    adapter = model.adapters["default"]
    kind = type(adapter)
    facts = {
        "card_title": "Wave Prompts",
        "card_summary": "It learns a wave.",
        "paper": "https://example.org/wave",
        "citation": "@article{wave}",
    }
    adapter.__class__ = type("Wave", (kind,), facts)
    card = make_card(model, "ada/flowers")
    assert "[Wave Prompts](https://example.org/wave)" in part(card, "summary")
    assert "It learns a wave." in part(card, "summary") and "| Method | Wave Prompts |" in part(card, "learned")
    assert "@article{wave}" in part(card, "citation") and "zhou2022coop" not in card


def test_a_configuration_without_a_context(base, processor, monkeypatch):
    from dataclasses import dataclass

    from coop_hf.config import CONFIGS, PromptConfig

    monkeypatch.setattr("coop_hf.config.CONFIGS", dict(CONFIGS))

    @dataclass
    class WaveConfig(PromptConfig, method="wave"):
        height: str = "<b>3</b>"

    model = make_model(base, processor)
    model.adapters["default"].config = WaveConfig(class_names=NAMES, base_model_name_or_path="ada/tiny-clip")
    card = make_card(model, "ada/flowers")
    assert "| `height` | `<b>3</b>` |" in part(card, "learned") and "Nearest tokens" not in card
    assert "zhou2022coop" not in card and "2109.01134" not in card, "nothing of CoOp is said of another method"
    assert "wave" in metadata(card)["tags"] and "coop" not in metadata(card)["tags"]


def test_words_are_looked_up_for_the_classes_shown_alone(base, processor, monkeypatch):
    model = make_model(base, processor, [f"cat {i}" for i in range(40)], class_specific=True)
    seen = []
    monkeypatch.setattr(
        "coop_hf.interpret.nearest_rows",
        lambda vectors, *args, _real=nearest_rows, **kwargs: (
            seen.append(len(vectors)) or _real(vectors, *args, **kwargs)
        ),
    )
    card = make_card(model)
    assert seen == [5 * 4] and "The first 5 of 40 classes are shown." in card


def test_unknown_facts_are_named(base, processor):
    with pytest.warns(UserWarning, match="no place for colour"):
        make_card(make_model(base, processor), training={"colour": "red", "shots": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_card(make_model(base, processor), training=json.loads(json.dumps(TRAINING)))

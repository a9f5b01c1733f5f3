import contextlib
import dataclasses
import json
import time
import warnings
from dataclasses import dataclass

import pytest

from coop_hf import CoOpConfig, PromptConfig, __version__
from coop_hf import adapters as _adapters  # noqa: F401 (registers all methods)
from coop_hf.checks import check_class_names, clean_class_name
from coop_hf.config import ADAPTER_CONFIG_NAME, CONFIGS, FORMAT_VERSION, PEFT_TYPE


FULL = {
    "n_ctx": 4,
    "class_token_position": "middle",
    "class_specific": True,
    "ctx_init": "a photo of a",
    "class_names": ["cat", "sea_lion", "crane (bird)", "猫"],
    "template": "a blurry {}.",
    "base_model_name_or_path": "openai/clip-vit-base-patch32",
    "revision": "main",
}


def test_defaults():
    config = CoOpConfig()
    assert config.to_dict() == {
        "n_ctx": 16,
        "class_token_position": "end",
        "class_specific": False,
        "ctx_init": None,
        "class_names": None,
        "template": "a photo of a {}.",
        "base_model_name_or_path": None,
        "revision": None,
        "format_version": 1,
        "coop_hf_version": __version__,
        "peft_type": PEFT_TYPE,
    }
    assert FORMAT_VERSION == 1
    assert CoOpConfig(ctx_init="a photo of a").n_ctx is None, "only a tokenizer can count words"


def test_round_trip(tmp_path):
    config = CoOpConfig(**FULL)
    config.save_pretrained(tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")
    assert text == json.dumps(config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert "猫" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CoOpConfig.from_pretrained(tmp_path / "new" / "folder") == config
        assert CoOpConfig.from_pretrained(str(tmp_path / "new"), subfolder="folder") == config
        assert CoOpConfig.from_dict(config.to_dict()) == config
        assert dataclasses.replace(config) == config
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [ADAPTER_CONFIG_NAME]


def test_class_names_are_copied():
    names = ["cat", "dog"]
    config = CoOpConfig(class_names=names)
    names.append("cow")
    assert config.class_names == ["cat", "dog"]
    assert CoOpConfig(class_names=("cat", "dog")).class_names == ["cat", "dog"], "a list, as JSON gives it back"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_ctx": 0}, "`n_ctx` must be a whole number from 1 to .* got 0"),
        ({"n_ctx": -3}, "got -3"),
        ({"n_ctx": 4.0}, "got 4.0"),
        ({"n_ctx": True}, "got True"),
        ({"n_ctx": "4"}, "got '4'"),
        ({"n_ctx": float("nan")}, "got nan"),
        ({"n_ctx": 10**9}, "got 1000000000"),
        ({"class_token_position": "back"}, "one of 'end', 'middle', 'front', got 'back'"),
        ({"class_token_position": ["end"]}, r"got \['end'\]"),
        ({"class_token_position": None}, "got None"),
        ({"class_specific": 1}, "True or False, got 1"),
        ({"class_specific": None}, "True or False, got None"),
        ({"ctx_init": ""}, 'Pass words such as "a photo of a"'),
        ({"ctx_init": 4}, "`ctx_init` must be a non-empty string or None, got 4"),
        ({"ctx_init": "a\x00b"}, "control characters"),
        ({"ctx_init": "a" * 10_001}, "10,001 characters"),
        ({"class_names": []}, "at least one"),
        ({"class_names": "cat"}, "single string"),
        ({"class_names": 5}, "got int"),
        ({"class_names": ["a", 5]}, "class name 1 must be a string, got int: '5'"),
        ({"class_names": [["a"]]}, "class name 0 must be a string, got list"),
        ({"merge_full_stop": 1}, "`merge_full_stop` must be True or False, got 1"),
        ({"class_names": ["a", "b\x1b[31m"]}, r"class_names\[1\]` must not contain control characters"),
        ({"class_names": ["a" * 10_001]}, "10,001 characters"),
        ({"template": "a photo"}, "exactly once"),
        ({"template": "{} {}"}, "exactly once"),
        ({"template": None}, "`template` must be a non-empty string, got None"),
        ({"base_model_name_or_path": 3}, "got 3"),
        ({"base_model_name_or_path": ""}, "non-empty"),
        ({"revision": 1}, "got 1"),
        ({"coop_hf_version": None}, "got None"),
        ({"format_version": "1"}, "positive whole number, got '1'"),
        ({"format_version": 0}, "got 0"),
        ({"format_version": True}, "got True"),
        ({"format_version": 2}, "format version 2, and coop_hf .* reads up to 1: upgrade coop_hf"),
    ],
)
def test_bad_values(values, message, tmp_path):
    """The same errors in Python and from a file."""
    with pytest.raises(ValueError, match=message):
        CoOpConfig(**values)
    path = tmp_path / ADAPTER_CONFIG_NAME
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        CoOpConfig.from_pretrained(tmp_path)


def test_unknown_keys_warn_and_are_dropped(tmp_path):
    (tmp_path / ADAPTER_CONFIG_NAME).write_text(json.dumps({"n_ctx": 4, "peft_type": "LORA", "new": [1]}))
    with pytest.warns(UserWarning, match="ignored: new, peft_type"):
        assert CoOpConfig.from_pretrained(tmp_path) == CoOpConfig(n_ctx=4)
    with pytest.warns(UserWarning, match="and 80 more"):
        CoOpConfig.from_dict({f"key{i}": i for i in range(100)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable adapter configuration"),
        (b'{"n_ctx": 4', "not a readable adapter configuration"),
        (b"\xff\xfe{}", "not a readable adapter configuration"),
        (b"[" * 200_000, "nests too deeply"),
        (b'{"a":' * 200_000, "nests too deeply"),
        (b'{"n_ctx": ' + b"9" * 10_000 + b"}", "not a readable adapter configuration"),
        (b"[1, 2]", "must be a JSON object, got list"),
        (b"null", "must be a JSON object, got NoneType"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    (tmp_path / ADAPTER_CONFIG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        CoOpConfig.from_pretrained(tmp_path)
    assert len(str(error.value)) < 1000


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / ADAPTER_CONFIG_NAME, "wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse: takes no disk
    with pytest.raises(ValueError, match="67,108,865 bytes"):
        CoOpConfig.from_pretrained(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json in"):
        CoOpConfig.from_pretrained(tmp_path)


def test_clean_class_name():
    assert clean_class_name("  sea__lion \t x\n") == "sea lion x"
    assert check_class_names(iter(["a", "b"])) == ["a", "b"]
    assert check_class_names(["sea_lion"]) == ["sea_lion"], "names are returned as they were given"


@pytest.mark.parametrize("value", ["\ud800", "cat \udfff"])
def test_text_that_no_file_can_hold(value):
    """A lone surrogate cannot be written as UTF-8: said at once, not when the trained adapter is saved."""
    with pytest.raises(ValueError):
        CoOpConfig(class_names=["dog", value])


def test_many_class_names_take_linear_time():
    names = [f"class number {i}" for i in range(200_000)]
    started = time.process_time()
    config = CoOpConfig(class_names=names)
    first = time.process_time() - started
    for _ in range(5):
        config = dataclasses.replace(config)
    assert first < 5 and time.process_time() - started - first < first, "copies are not checked anew"
    with pytest.raises(ValueError, match="class name 200000 is empty"):
        dataclasses.replace(config, class_names=[*names, "_"])


def test_a_list_that_was_checked_may_change():
    names = ["cat", "dog"]
    assert check_class_names(names) == ["cat", "dog"]
    names[1] = " "
    with pytest.raises(ValueError, match="class name 1 is empty"):
        check_class_names(names)
    with pytest.raises(ValueError, match="class name 0 must be a string, got int"):
        check_class_names([1, 2])


# ---------------------------------------------------------------------- methods


@pytest.fixture
def methods(monkeypatch):
    """Two configurations of other methods, known within one test."""
    monkeypatch.setattr("coop_hf.config.CONFIGS", dict(CONFIGS))

    @dataclass
    class WaveConfig(PromptConfig, method="wave"):
        height: int = 3

    @dataclass
    class CoWaveConfig(CoOpConfig, method="cowave"):
        width: int = 2

    return WaveConfig, CoWaveConfig


def test_positional_order_of_coop():
    config = CoOpConfig(4, "front", True, "a photo")
    assert (config.n_ctx, config.class_token_position, config.class_specific, config.ctx_init) == (
        4,
        "front",
        True,
        "a photo",
    )
    assert isinstance(config, PromptConfig) and CoOpConfig.method == "coop"


def test_the_method_of_a_file_picks_the_class(methods, tmp_path):
    wave, cowave = methods
    for config in (wave(height=7, class_names=["cat"]), cowave(4, width=5), CoOpConfig(4)):
        config.save_pretrained(tmp_path)
        values = json.loads((tmp_path / ADAPTER_CONFIG_NAME).read_text())
        assert values.get("method") == (None if type(config) is CoOpConfig else config.method)
        assert values["format_version"] == (1 if type(config) is CoOpConfig else 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for kind in (PromptConfig, type(config)):
                found = kind.from_pretrained(tmp_path)
                assert found == config and type(found) is type(config)
    assert type(CoOpConfig.from_dict(cowave().to_dict())) is cowave, "a configuration of CoOp's kind"
    with pytest.raises(
        ValueError, match="of the method 'wave', and CoOpConfig is for 'coop': read it with WaveConfig"
    ):
        CoOpConfig.from_dict(wave().to_dict())
    with pytest.raises(
        ValueError, match="of the method 'coop', and WaveConfig is for 'wave': read it with CoOpConfig"
    ):
        wave.from_dict({"height": 1})


@pytest.mark.parametrize("method", ["newer", None, 3, ["coop"], {"a": 1}, "x" * 100_000, ""])
def test_unknown_methods(method):
    with pytest.raises(ValueError, match=r"of the method .* knows .*'coop'.*: upgrade coop_hf") as error:
        PromptConfig.from_dict({"method": method, "new_key": 1})
    assert len(str(error.value)) < 600


def test_newer_formats_of_a_method(methods):
    wave, _ = methods
    with pytest.raises(ValueError, match="format version 3, and coop_hf .* reads up to 2: upgrade coop_hf"):
        PromptConfig.from_dict({"method": "wave", "format_version": 3})
    assert wave(format_version=1).format_version == 1


def test_a_method_is_registered_once(methods):
    with pytest.raises(ValueError, match="the method 'wave' has a configuration, WaveConfig"):

        class OtherConfig(PromptConfig, method="wave"):
            pass

    class MyConfig(CoOpConfig):
        """Without a name of its own: CoOp's."""

    assert MyConfig.method == "coop" and type(PromptConfig.from_dict({})) is CoOpConfig
    assert type(MyConfig.from_dict({})) is MyConfig


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_any_value_is_taken_or_refused(method):
    """Values of JSON files of strangers: whatever a field cannot be is a `ValueError`."""
    for field in dataclasses.fields(CONFIGS[method]):
        for value in (10**400, -(10**400), float("nan"), float("-inf"), True, "x", None, [1], {}):
            with contextlib.suppress(ValueError):
                CONFIGS[method].from_dict({"method": method, field.name: value})

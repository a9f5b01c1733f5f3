import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sentence

from coop_hf.core.layout import encode_words, fill_template, make_layout, special_token_ids, tokenize_texts


POSITIONS = ["end", "middle", "front"]
# Names that end in a character that BPE merges with the full stop, and names full of full stops.
NAMES = ["cat", "dog (cat)", "sea_lion!", "u.s.", "a", "cat's dog - x", ")", "PHOTO of 7 dogs"]
REAL_NAMES = [
    "kite (bird of prey)",
    "missile",
    "crane (machine)",
    "yahoo!",
    "737-300",
    "Jack-o'-lantern",
    "猫",
    "café",
]


def spell(row, tokenizer):
    """A row of a layout as text: context slots as v0, v1 ..., tokens without their end-of-word mark."""
    return [f"v{-1 - t}" if t < 0 else tokenizer.convert_ids_to_tokens(t).replace("</w>", "") for t in row]


def test_where_everything_stands(tokenizer):
    def row(name, position, n_ctx=5):
        return spell(make_layout(tokenizer, [name], n_ctx, position).tokens[0], tokenizer)

    sos, eos = "<|startoftext|>", "<|endoftext|>"
    assert row("cat", "end") == [sos, "v0", "v1", "v2", "v3", "v4", "cat", ".", eos]
    assert row("cat", "middle") == [sos, "v0", "v1", "cat", "v2", "v3", "v4", ".", eos]  # floor(5 / 2) before the name
    assert row("cat", "front") == [sos, "cat", "v0", "v1", "v2", "v3", "v4", ".", eos]
    assert row("cat", "middle", 1) == [sos, "cat", "v0", ".", eos]


def test_full_stop_merges_with_the_name_only_at_the_end(tokenizer):
    """(What public code gets wrong: the length of the name taken without its full stop.)"""
    at_end = make_layout(tokenizer, ["dog (cat)", "dog"], 2, "end")
    assert spell(at_end.tokens[0], tokenizer)[3:-1] == ["dog", "(", "cat", ")."]
    assert at_end.name_lengths == [4, 1]
    for position in ("middle", "front"):
        layout = make_layout(tokenizer, ["dog (cat)", "dog"], 2, position)
        assert [t for t in spell(layout.tokens[0], tokenizer)[1:-1] if t not in ("v0", "v1")] == [
            "dog", "(", "cat", ")", ".",
        ]  # fmt: skip
        assert layout.name_lengths == [4, 1]


def check_against_whole_sentence(tokenizer, names, n_ctx, position):
    """The layout has, piece by piece, the ids of the sentence written out with "x" for each context vector."""
    layout = make_layout(tokenizer, names, n_ctx, position)
    x = tokenizer("x")["input_ids"][1]
    for name, row in zip(names, layout.tokens):
        assert [x if t < 0 else t for t in row] == tokenizer(sentence(name, n_ctx, position))["input_ids"], name
        assert [t for t in row if t < 0] == [-1 - k for k in range(n_ctx)], "every slot once, in order"
    assert layout.num_classes == len(names) and layout.max_length == max(map(len, layout.tokens))
    assert layout.num_shared_slots == {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n_ctx", [1, 4, 16])
def test_ids_are_those_of_the_whole_sentence(tokenizer, position, n_ctx):
    check_against_whole_sentence(tokenizer, NAMES, n_ctx, position)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n_ctx", [1, 4, 16])
def test_ids_are_those_of_the_whole_sentence_with_the_real_tokenizer(real_tokenizer, position, n_ctx):
    check_against_whole_sentence(real_tokenizer, REAL_NAMES, n_ctx, position)


letters = st.text(st.sampled_from("cadogse )(!.'-7éß猫"), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(letters, min_size=1, max_size=6), n_ctx=st.integers(1, 5), position=st.sampled_from(POSITIONS))
def test_ids_of_any_names(tokenizer, names, n_ctx, position):
    distinct = {tuple(tokenizer(sentence(name, n_ctx, position))["input_ids"]): name for name in names if name.strip()}
    if distinct:
        check_against_whole_sentence(tokenizer, list(distinct.values()), n_ctx, position)


def test_known_ids_of_the_real_tokenizer(real_tokenizer):
    assert tokenize_texts(real_tokenizer, ["a photo of a cat"]).tokens == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert make_layout(real_tokenizer, ["cat"], 2).tokens == [[49406, -1, -2, 2368, 269, 49407]]
    merged = make_layout(real_tokenizer, ["kite (bird)", "kite"], 1)
    assert merged.tokens[0] == [49406, -1, 19867, 263, 3329, 1818, 49407]
    assert merged.name_lengths == [4, 1]


def test_underscores_and_white_space(tokenizer):
    plain = make_layout(tokenizer, ["sea dog"], 2).tokens
    assert make_layout(tokenizer, ["sea_dog"], 2).tokens == plain
    assert make_layout(tokenizer, ["  sea__\tdog\n"], 2).tokens == plain


def test_padding(tokenizer):
    layout = make_layout(tokenizer, ["cat", "sea dog"], 2)
    tokens, eos_positions = layout.padded()
    assert tokens.shape == (2, 7) and eos_positions.tolist() == [5, 6]
    assert tokens[0].tolist() == layout.tokens[0] + [layout.eos_token_id]
    tokens, eos_positions = layout.padded(40)
    assert tokens.shape == (2, 40) and eos_positions.tolist() == [5, 6]
    assert (tokens[1, 6:] == tokenizer.eos_token_id).all()
    assert special_token_ids(tokenizer) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_longest_context_that_fits_and_one_more(tokenizer, position):
    """Names class and excess, and advises an `n_ctx` that really fits."""
    longest = 20 - 2 - 4  # SOS, EOS, and "sea", "dog", "cat", "."
    names = ["cat", "sea dog cat"]
    assert make_layout(tokenizer, names, longest, position, max_positions=20).max_length == 20
    with pytest.raises(ValueError, match=rf"(?s)20 positions: 'sea dog cat' \(by 1 token\)\. .*`n_ctx` to {longest}"):
        make_layout(tokenizer, names, longest + 1, position, max_positions=20)
    with pytest.raises(ValueError, match=r"'cat' \(by 4 tokens\), 'sea dog cat' \(by 6 tokens\).* to 14"):
        make_layout(tokenizer, names, longest + 6, position, max_positions=20)


def test_names_too_long_for_any_context(tokenizer):
    with pytest.raises(ValueError, match=r"'(cat ){19}cat' \(by 4 tokens\).*shorten the names") as error:
        make_layout(tokenizer, ["cat " * 19 + "cat"], 1, max_positions=20)
    assert "lower" not in str(error.value)
    many = [f"{'cat ' * 30}{i}" for i in range(8)]
    with pytest.raises(ValueError, match="and 3 more"):
        make_layout(tokenizer, many, 1, max_positions=20)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "<|endoftext|>"], r"'<\|endoftext\|>.*' contains the tokenizer's special token '<\|endoftext\|>'"),
        (["a <|startoftext|> b"], "special token"),
        (["cat", ""], "class name 1 is empty"),
        (["_ _"], "class name 0 is empty"),
        ([], "at least one"),
        ("cat", "single string 'cat'"),
        ([b"cat"], "class name 0 must be a string, got bytes"),
        (["cat", None], "class name 1 must be a string, got NoneType"),
        (7, "list of strings, got int"),
        (["ca\x00t"], r"control characters, got 'ca\\x00t'"),
        (["ca\x7ft"], "control characters"),
    ],
)
def test_bad_names(tokenizer, names, message):
    with pytest.raises(ValueError, match=message):
        make_layout(tokenizer, names, 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "Cat"], r"same prompt: 'cat' \(0\), 'Cat' \(1\)\. "),
        (["sea - dog", "sea-dog"], r"'sea - dog' \(0\), 'sea-dog' \(1\)\. "),
        (["cat", "dog", "cat"], r"'cat' \(0\), 'cat' \(2\)\. "),
        (["sea_dog", "sea dog", "a", "a"], r"'sea_dog' \(0\), 'sea dog' \(1\); 'a' \(2\), 'a' \(3\)\. "),
        ([*"abcdefg", *"abcdefg"], r"'e' \(4\), 'e' \(11\); and 2 more\. "),
    ],
)
def test_names_with_the_same_prompt(tokenizer, names, message):
    """CLIP's own list for ImageNet names two classes "missile" and two "sunglasses"."""
    with pytest.warns(UserWarning, match=message):
        layout = make_layout(tokenizer, names, 2)
    assert layout.num_classes == len(names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_layout(tokenizer, sorted({name.lower().replace(" ", "") for name in names}), 2)


def test_words_are_counted_in_bpe_tokens(tokenizer):
    assert [len(ids) for ids in encode_words(tokenizer, ["a photo of a", "hat", "cat", ")."])] == [4, 3, 1, 1]


def test_words_are_counted_in_bpe_tokens_of_the_real_tokenizer(real_tokenizer):
    assert [len(ids) for ids in encode_words(real_tokenizer, ["a photo of a", "a photomicrograph of"])] == [4, 6]


def test_templates(tokenizer):
    assert fill_template("art of the {}, {{x", ["sea_lion"]) == ["art of the sea lion, {{x"]
    assert fill_template("the {}!", ["{}", "a {} b"]) == ["the {}!", "the a {} b!"]
    for template in ("a photo", "{} {}"):
        with pytest.raises(ValueError, match="exactly once"):
            fill_template(template, ["cat"])
    texts = ["a photo of a cat.", "dog!."]
    layout = tokenize_texts(tokenizer, texts)
    assert layout.tokens == tokenizer(texts)["input_ids"]
    assert (layout.n_ctx, layout.num_shared_slots) == (0, 0)


def test_a_text_that_is_too_long_is_not_cut(tokenizer):
    assert tokenize_texts(tokenizer, ["cat " * 18], max_positions=20).max_length == 20
    with pytest.raises(ValueError, match=r"has 22 tokens with SOS and EOS.*20 positions: shorten it by 2"):
        tokenize_texts(tokenizer, ["cat", "cat " * 20], max_positions=20)


def test_a_tokenizer_without_special_tokens():
    with pytest.raises(ValueError, match="puts 0 tokens round a text"):
        special_token_ids(lambda text: {"input_ids": []})

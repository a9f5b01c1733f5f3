import pytest
import torch

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.interpret import format_nearest_tokens, nearest_rows, nearest_tokens, readable_token


NAMES = ["cat", "sea lion", "clock"]


def by_hand(vector, table, metric):
    """Every distance one by one in fp64."""
    vector, table = vector.double(), table.double()
    if metric == "euclidean":
        return ((table - vector) ** 2).sum(dim=1).sqrt()
    return 1 - (table * vector).sum(dim=1) / (table.norm(dim=1) * vector.norm())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**26])
def test_nearest_rows_against_all_distances(metric, chunk_bytes):
    torch.manual_seed(1)
    table, vectors = torch.randn(300, 12), 3 * torch.randn(7, 12)
    distances, ids = nearest_rows(vectors, table, top_k=4, metric=metric, chunk_bytes=chunk_bytes)
    for vector, row_distances, row_ids in zip(vectors, distances, ids):
        expected = by_hand(vector, table, metric).sort()
        assert row_ids.tolist() == expected.indices[:4].tolist()
        torch.testing.assert_close(row_distances, expected.values[:4])


def test_close_calls_are_decided_exactly():
    # Far from the origin fp32 squares cannot tell these rows apart; their exact distances can.
    offsets = torch.tensor([3e-3, 1e-3, 2e-3, 4e-3])
    table = torch.full((4, 8), 100.0)
    table[:, 0] += offsets
    distances, ids = nearest_rows(torch.full((1, 8), 100.0), table, top_k=4)
    assert ids[0].tolist() == [1, 2, 0, 3]
    torch.testing.assert_close(distances[0], (table[:, 0].double() - 100)[ids[0]])


def test_equal_distances_give_the_lower_row():
    table = torch.tensor([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    distances, ids = nearest_rows(torch.zeros(1, 2), table, top_k=10)
    assert ids[0].tolist() == [1, 2, 3, 0] and distances[0, :3].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_unified_context_finds_its_own_words(base, tokenizer, metric):
    model = CoOpModel(base, CoOpConfig(ctx_init="a photo of a"), NAMES, tokenizer)
    nearest = nearest_tokens(model, top_k=3, metric=metric)
    assert [row[0]["token"] for row in nearest] == ["a", "photo", "of", "a"]
    assert [row[0]["id"] for row in nearest] == tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    assert all(row[0]["distance"] == pytest.approx(0, abs=1e-7) for row in nearest)
    assert all(len(row) == 3 and row[0]["distance"] <= row[1]["distance"] <= row[2]["distance"] for row in nearest)
    table = base.text_model.embeddings.token_embedding.weight
    expected = by_hand(model.context[1].detach(), table, metric)
    assert nearest[1][2]["distance"] == pytest.approx(expected.sort().values[2].item())


def test_class_specific_context_is_keyed_by_class(base, tokenizer):
    model = CoOpModel(base, CoOpConfig(n_ctx=2, class_specific=True), NAMES, tokenizer)
    table = base.text_model.embeddings.token_embedding.weight
    words = torch.tensor([[500, 501], [502, 503], [504, 505]])
    model.context.data = table[words].clone()
    nearest = nearest_tokens(model, top_k=2)
    assert list(nearest) == NAMES
    assert [[row[0]["id"] for row in rows] for rows in nearest.values()] == words.tolist()
    text = format_nearest_tokens(nearest, max_classes=2)
    assert text.startswith("cat\n1  ") and text.endswith("... and 1 more classes")


def test_other_adapters_and_half_precision(base, tokenizer):
    import copy

    model = CoOpModel(copy.deepcopy(base).half(), CoOpConfig(ctx_init="a photo"), NAMES, tokenizer)
    model.add_adapter("other", CoOpConfig(ctx_init="some kind of"))
    for name, words in ((None, "a photo"), ("other", "some kind of")):
        ids = [row[0]["id"] for row in nearest_tokens(model, adapter_name=name)]
        assert ids == tokenizer(words, add_special_tokens=False)["input_ids"]


def test_readable_token(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["a</w>", "a", tokenizer.eos_token])
    assert [readable_token(tokenizer, i) for i in ids] == ["a", "a-", tokenizer.eos_token]


def test_table():
    nearest = [
        [{"token": "potd", "id": 1, "distance": 1.71364}, {"token": "a", "id": 2, "distance": 2.0}],
        [{"token": "x", "id": 3, "distance": 0.5}, {"token": "that", "id": 4, "distance": 12.25}],
    ]
    assert format_nearest_tokens(nearest) == "1  potd 1.7136  a 2.0000\n2  x 0.5000     that 12.2500"


def test_errors(base, tokenizer):
    model = CoOpModel(base, CoOpConfig(n_ctx=2), NAMES, tokenizer)
    with pytest.raises(ValueError, match="'euclidean', 'cosine'"):
        nearest_tokens(model, metric="manhattan")
    with pytest.raises(ValueError, match="`top_k`"):
        nearest_tokens(model, top_k=0)
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        nearest_tokens(model, adapter_name="x")

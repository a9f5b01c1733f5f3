"""Files on disk; what needs a Hub is tested elsewhere."""

import pytest

from coop_hf.hub import find_file, has_file, is_hub_id


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "sub" / "deep" / "b.json").write_text("{}")
    return tmp_path


def test_a_file_of_a_folder(folder):
    assert find_file(folder, "a.json") == str(folder / "a.json")
    assert find_file(str(folder), "b.json", subfolder="sub/deep") == str(folder / "sub" / "deep" / "b.json")
    assert find_file(folder, "a.json", revision="x", token=None, local_files_only=True) == str(folder / "a.json")
    assert has_file(folder, "a.json") and has_file(folder, "b.json", subfolder="sub/deep")
    assert not has_file(folder, "b.json") and not has_file(folder, "a.json", subfolder="sub")
    assert not has_file(folder, "a.json", subfolder="missing")
    with pytest.raises(FileNotFoundError, match="no b.json in"):
        find_file(folder, "b.json")
    assert not has_file(folder, "sub"), "a folder is no file"


def test_a_relative_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert has_file("sub", "b.json", subfolder="deep") and has_file("./sub/deep", "b.json") and has_file(".", "a.json")


@pytest.mark.parametrize("subfolder", ["..", "../x", "/etc", "a/../b", ".", "", "a//b", "a\\..\\b", "./a", "a/"])
def test_subfolders_that_leave_the_folder(folder, subfolder):
    for name in (folder, "owner/name"):
        with pytest.raises(ValueError, match="plain relative folder"):
            find_file(name, "a.json", subfolder=subfolder)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./missing", "../missing", "a/b/c", "", "~/x", "a b", "a--b", "C:\\x"]
)
def test_neither_a_folder_nor_a_hub_id(name):
    """Said at once, without asking the Hub."""
    assert not is_hub_id(name)
    with pytest.raises(FileNotFoundError, match="neither a folder on this machine nor the form of a Hub id"):
        find_file(name, "config.json")
    assert not has_file(name, "config.json")


def test_a_file_is_no_folder(folder):
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        find_file(folder / "a.json", "a.json")


@pytest.mark.parametrize("name", ["gpt2", "openai/clip-vit-base-patch32", "a/b_c", "A.b-c/0x", "a"])
def test_hub_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["a..b", "-a", ".a", "a/.b", "a/-b", "a" * 97, "a/b/", "/a", "a\n", "a/b\n", "é/b"])
def test_no_hub_ids(name):
    assert not is_hub_id(name)


def test_nothing_is_fetched_when_only_local_files_are_allowed(tmp_path):
    with pytest.raises(OSError, match="'owner/missing' is not in the cache"):
        find_file("owner/missing", "config.json", local_files_only=True, cache_dir=tmp_path)

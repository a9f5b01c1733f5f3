"""Saving adapters with their model card, and putting both on the Hub in one commit."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from ..checks import shown
from ..config import ADAPTER_CONFIG_NAME
from ..hub import _HTTPError, _server_error, _status, bounded_waits, find_file, is_hub_id
from .adapter_files import read_adapter, write_adapter
from .card_text import is_hub_base
from .model_card import CARD_NAME, make_card, write_card


__all__ = ["push_to_hub", "save_adapters", "save_pretrained", "without_local_bases"]


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    selected_adapters: list[str] | None = None,
    training: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **kwargs: Any,
) -> None:
    """Saves adapters: `default` into the folder itself, others into a subfolder of their name. Never the base.

    A model card, `README.md`, is written beside them; what a person changed in an earlier one stays.

    Args:
        save_directory (`str` or `os.PathLike`): the folder; made if missing.
        selected_adapters (`list[str]`, *optional*, defaults to all): which adapters.
        training (`dict`, *optional*): what the card says of the training, see
            `coop_hf.files.model_card.make_card`.
        push_to_hub (`bool`, *optional*, defaults to `False`): whether to put them on the Hub, too.
        repo_id (`str`, *optional*, defaults to the folder's name): where, `"owner/name"` or `"name"`.
        kwargs: for [`push_to_hub`]: `private`, `token`, `revision`, `commit_message`, `create_pr`, `tags` ...

    Raises:
        TypeError: keywords that are none of these; before anything is written.
    """
    if not isinstance(push_to_hub, bool):
        raise TypeError(f"`push_to_hub` must be True or False, and the repository `repo_id=`; got {push_to_hub!r}.")
    if not push_to_hub and (kwargs or repo_id is not None):
        names = ", ".join(f"`{name}`" for name in [*kwargs, *(["repo_id"] if repo_id is not None else [])])
        raise TypeError(
            f"save_pretrained() writes an adapter into a folder and has no use for {names}: leave it out, or say "
            "push_to_hub=True."
        )
    selected = save_adapters(model, save_directory, selected_adapters)
    if selected:
        write_card(save_directory, model, training=training, selected_adapters=selected)
    if push_to_hub:
        repo_id = repo_id or os.path.basename(os.path.abspath(save_directory))
        _push_to_hub(model, repo_id, selected_adapters=selected_adapters, training=training, **kwargs)


def save_adapters(
    model: Any, save_directory: str | os.PathLike[str], selected_adapters: list[str] | None = None
) -> list[str]:
    """The files of `save_pretrained` without the model card.

    Args:
        save_directory (`str` or `os.PathLike`): the folder; made if missing.
        selected_adapters (`list[str]`, *optional*, defaults to all): which adapters.

    Returns:
        `list[str]`: the names of those written.

    Raises:
        ValueError: the folder is a file, an unknown adapter, or a context with NaN.
    """
    if os.path.isfile(save_directory):
        raise ValueError(f"`save_directory` must be a folder, and {os.fspath(save_directory)!r} is a file.")
    if isinstance(selected_adapters, str):
        raise ValueError(f"`selected_adapters` must be a list of names, got the string {selected_adapters!r}.")
    names = list(model.adapters) if selected_adapters is None else list(selected_adapters)
    for name, adapter in [(name, model._known(name)) for name in names]:
        folder = save_directory if name == "default" else os.path.join(save_directory, name)
        write_adapter(folder, adapter.config, adapter.learned_state())
    return names


def without_local_bases(folder: str) -> list[str]:
    """Takes out of the adapters in a folder the names of bases that lie on this machine, and warns of it.

    Such a path helps nobody else, and may tell who one is.

    Args:
        folder (`str`): a folder that is to be put on the Hub; its files are written anew where a name goes.

    Returns:
        `list[str]`: the names that were taken out.
    """
    gone = []
    for path in sorted(_files_below(folder)):
        if os.path.basename(path) != ADAPTER_CONFIG_NAME:
            continue
        place = os.path.dirname(os.path.join(folder, path))
        config, tensors = read_adapter(place)
        if config.base_model_name_or_path is not None and not is_hub_base(config):
            gone.append(str(config.base_model_name_or_path))
            write_adapter(place, replace(config, base_model_name_or_path=None, revision=None), tensors)
    if gone:
        warnings.warn(
            f"the base model is a folder on this machine, {shown(gone[0])}, which nobody else has: the name is not "
            "uploaded, and whoever loads the adapter has to pass `base_model=`. If the base is on the Hub, name it "
            'before you push: model.config.base_model_name_or_path = "owner/name".',
            stacklevel=4,
        )
    return gone


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    selected_adapters: list[str] | None = None,
    card: str | None = None,
    training: dict | None = None,
    **about: Any,
) -> CommitInfo:
    """Puts adapters on the Hub: their files and a model card, in one commit. Never the base model.

    The repository is made if it is missing. In one that exists, its other files stay, and in its card everything that
    people wrote (see `coop_hf.files.model_card`). A push that fails changes nothing on this machine and no existing
    file on the Hub; run it again.

    Args:
        model (`CoOpModel`): the model.
        repo_id (`str`): `"owner/name"`, or `"name"` for one's own.
        private (`bool`, *optional*): for a new repository; defaults to what the owner has set.
        token (`str` or `bool`, *optional*, defaults to the one that `hf auth login` stored): a token that may write.
        revision (`str`, *optional*, defaults to `"main"`): branch to commit to; made if missing.
        commit_message (`str`, *optional*): defaults to a line that names the adapters.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead of committing.
        selected_adapters (`list[str]`, *optional*, defaults to all): which adapters.
        card (`str`, *optional*): text of a finished card, to be pushed as it is.
        training (`dict`, *optional*): what the card says about the training, see `coop_hf.files.model_card.make_card`.
        about: single values of `training` by name: `tags`, `license`, `language`, `dataset_name` ...

    Returns:
        `huggingface_hub.CommitInfo`: `oid`, `commit_url` and, with `create_pr`, `pr_url`.

    Raises:
        ValueError: a bad `repo_id`, arguments that contradict each other, or a context with NaN; before anything is
            sent.
        OSError: the Hub cannot be reached or refuses; says why and what to do.
    """
    if not isinstance(repo_id, str) or not is_hub_id(repo_id):
        raise ValueError(f"`repo_id` must have the form 'name' or 'owner/name', got {repo_id!r}.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request goes to the main branch: leave out `create_pr` or revision={revision!r}.")
    if selected_adapters is not None and not selected_adapters:
        raise ValueError("`selected_adapters` is empty: name at least one adapter, or leave it out for all.")
    with tempfile.TemporaryDirectory(prefix="coop_hf_push_") as folder:
        adapter_folder = os.path.join(folder, "adapter")
        names = model.save_adapters(adapter_folder, selected_adapters)
        without_local_bases(adapter_folder)
        api = HfApi(token=token, library_name="coop_hf")
        with _push_errors(repo_id, revision):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        if card is None:
            source = {"revision": revision, "token": token, "cache_dir": os.path.join(folder, "cache")}
            card = make_card(
                model,
                name=repo_id,
                existing=_read_card(repo_id, CARD_NAME, source),
                training={**training, **about} if training and about else about or training,
                selected_adapters=selected_adapters,
            )
        with open(os.path.join(adapter_folder, CARD_NAME), "w", encoding="utf-8") as file:
            file.write(card)
        paths = sorted(_files_below(adapter_folder))
        with _push_errors(repo_id, revision):
            # One commit, so that nobody ever reads a new configuration beside old weights.
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(path, os.path.join(adapter_folder, path)) for path in paths],
                commit_message=commit_message or f"Upload {', '.join(names)} with coop_hf",
                revision=revision,
                create_pr=create_pr,
            )


_push_to_hub = push_to_hub  # where an argument has its name


@contextmanager
def _push_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    try:
        with bounded_waits():
            yield
    except (HfHubHTTPError, _HTTPError, RuntimeError) as error:  # a failed LFS upload is a RuntimeError
        raise _push_explained(error, repo_id, revision) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # The answer said that all is well and is none that the Hub gives, such as the login page of a network.
        raise OSError(
            f"could not push to {repo_id!r}: what answered is not the Hub, or not understood "
            f"({type(error).__name__}: {str(error)[:200]}). A network that asks for a login first, or a proxy, does "
            "so. Nothing on this machine was changed; call `push_to_hub` again when that is mended."
        ) from error


def _files_below(folder: str) -> list[str]:
    paths = [os.path.join(root, file) for root, _, files in os.walk(folder) for file in files]
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]


def _read_card(repo_id: str, filename: str, source: dict) -> str | None:
    """The card that is on the Hub, or `None`. Kept in no cache, because it has to be the newest."""
    try:
        with open(find_file(repo_id, filename, **source), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _push_explained(error: BaseException, repo_id: str, revision: str | None) -> OSError:
    said = _server_error(error)
    status = _status(said)
    hint = {
        401: "no token was given, or one that the Hub does not accept: pass `token=...` or run `hf auth login`",
        403: "the token may not write there: use one with write access, another owner, or `create_pr=True`",
        409: "something else is being done to the repository at this moment",
        412: "somebody else committed at the same moment",
        429: "there were too many requests; wait a few minutes",
    }.get(status or 0)
    if hint is None and isinstance(said, RevisionNotFoundError):
        hint = f"the repository has no revision {revision!r}, or it is none that can be committed to"
    if hint is None:
        text = " ".join(str(said).split())[:300] or type(said).__name__
        hint = f"the Hub answered with the error {status}: {text}" if status else f"the connection failed: {text}"
    return OSError(
        f"could not push to {repo_id!r}: {hint}. Nothing on this machine was changed; call `push_to_hub` again when "
        "that is mended."
    )

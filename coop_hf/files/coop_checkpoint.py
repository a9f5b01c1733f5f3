"""Checkpoints of the original CoOp code (https://github.com/KaiyangZhou/CoOp), read as adapters are.

Its trainer writes `<output>/prompt_learner/model.pth.tar-<epoch>` and `model-best.pth.tar`, made with `torch.save`:

    {"state_dict": {"ctx": (M, dim) or (C, M, dim),
                    "token_prefix": (C, 1, dim),            embeddings of SOS
                    "token_suffix": (C, 77 - 1 - M, dim)},  of the class name, ".", EOS and padding
     "epoch": int, "optimizer": dict, "scheduler": dict, "val_result": float}

    python -m coop_hf.files.coop_checkpoint output/prompt_learner my-adapter --base_model openai/clip-vit-base-patch16

A checkpoint is a pickle, and a pickle may run code when it is read. It is read with `weights_only=True`. Where the
original writes whole objects, its scheduler with the optimizer inside, an inert stand-in is put, which keeps nothing
and runs nothing; a file that asks for anything else is refused.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from typing import Any, BinaryIO

import torch

from ..checks import check_class_names, check_not_sparse, clean_class_name, is_finite
from ..config import CLASS_TOKEN_POSITIONS, MAX_CONTEXT_TOKENS, CoOpConfig
from ..core.layout import encode_words, special_token_ids
from .adapter_files import MAX_DIM, MAX_VALUES, WEIGHTS_KEY


__all__ = ["checkpoint_to_adapter", "find_coop_checkpoint", "from_coop_checkpoint", "read_coop_checkpoint"]

_BEST = "model-best.pth.tar"

_EPOCH = re.compile(r"model\.pth\.tar-(\d{1,9})")

# Without the tensors, a checkpoint of the original has some kilobytes. PyTorch needs 150 times a long text's length.
_MAX_PICKLE_BYTES = 1 << 21

_MAX_OPERATIONS = 200_000  # of the pickle; a checkpoint of the original has hundreds, of a whole CLIP 20,000

_MAX_RECORDS = 10_000

_LEGACY_PICKLES = 5  # a mark, a version, facts on the system, the content, the keys of the storages

_BUFFERS = ("token_prefix", "token_suffix")


class _Nothing:
    """Stands where a checkpoint holds an object: takes whatever it is given, keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*_: Any) -> dict:
    """Stands for the `defaultdict(dict)` that an optimizer keeps its state in."""
    return {}


_STANDS_IN_FOR_DICT = ("collections.defaultdict", "builtins.dict", "__builtin__.dict")

_STANDS_IN_FOR = (
    *(
        f"torch.optim.lr_scheduler.{name}"
        for name in ("CosineAnnealingLR", "StepLR", "MultiStepLR", "LambdaLR", "ExponentialLR", "_LRScheduler")
    ),
    *(f"torch.optim.{name}" for name in ("sgd.SGD", "adam.Adam", "adamw.AdamW", "rmsprop.RMSprop", "radam.RAdam")),
    "dassl.optim.radam.RAdam",
    "dassl.optim.radam.PlainRAdam",
    "dassl.optim.radam.AdamW",
    "dassl.optim.lr_scheduler.ConstantWarmupScheduler",
    "dassl.optim.lr_scheduler.LinearWarmupScheduler",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def find_coop_checkpoint(path: str | os.PathLike, epoch: int | None = None) -> str:
    """The checkpoint file that a path means.

    Args:
        path (`str` or `os.PathLike`): the file itself; or the folder `prompt_learner`, or the one round it. In a
            folder `model-best.pth.tar` is taken, else the `model.pth.tar-<epoch>` with the highest epoch.
        epoch (`int`, *optional*): take `model.pth.tar-<epoch>` instead.

    Raises:
        FileNotFoundError: nothing there; says what was looked for.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise FileNotFoundError(f"there is no file or folder {path!r}.")
    inner = os.path.join(path, "prompt_learner")
    folder = inner if os.path.isdir(inner) else path
    epochs = {int(match[1]): name for name in os.listdir(folder) if (match := _EPOCH.fullmatch(name))}
    if epoch is not None:
        if epoch not in epochs:
            there = ", ".join(map(str, sorted(epochs))) or "none"
            raise FileNotFoundError(f"{folder!r} holds no model.pth.tar-{epoch}; the epochs there: {there}.")
        return os.path.join(folder, epochs[epoch])
    if os.path.isfile(os.path.join(folder, _BEST)):
        return os.path.join(folder, _BEST)
    if not epochs:
        raise FileNotFoundError(
            f"{folder!r} holds no checkpoint of the original CoOp code ({_BEST} or model.pth.tar-<epoch>)."
        )
    return os.path.join(folder, epochs[max(epochs)])


def read_coop_checkpoint(path: str | os.PathLike, epoch: int | None = None) -> dict:
    """Reads a checkpoint of the original CoOp code, without running anything in it.

    Args:
        path (`str` or `os.PathLike`), epoch (`int`, *optional*): see [`find_coop_checkpoint`].

    Returns:
        `dict`: `context` (fp32, `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`), `token_prefix` and `token_suffix`
        (as stored, or `None`), `num_classes` (`int` or `None`), `epoch` (`int` or `None`), `path` (`str`).

    Raises:
        ValueError: the file is damaged, asks for code, or is a checkpoint of something else; says which.
    """
    path = find_coop_checkpoint(path, epoch)
    problem = f"{path} is not a usable checkpoint of the original CoOp code: "
    checkpoint = _load_weights_only(path, problem)
    if not isinstance(checkpoint, dict):
        raise ValueError(problem + f"it holds a {type(checkpoint).__name__}, expected a dict with 'state_dict'.")
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        raise ValueError(problem + f"it has no dict 'state_dict'; its keys are {_some(checkpoint)}.")
    state = {_plain_key(key): value for key, value in state.items()}
    if any(key.startswith("meta_net") for key in state):
        raise ValueError(problem + "it holds a meta-network, so it is CoCoOp, whose prompt depends on the image.")
    if "ctx" not in state or set(state) - {"ctx", *_BUFFERS}:
        raise ValueError(
            problem + f"its state_dict has the keys {_some(state)}; expected 'ctx' and {_some(_BUFFERS)}."
        )
    for key, value in state.items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise ValueError(problem + f"{key!r} is a {type(value).__name__}, expected a plain tensor.")
        if value.device.type != "cpu":
            raise ValueError(problem + f"{key!r} is on the device {value.device.type!r} and holds no values.")
        if not value.dtype.is_floating_point:
            raise ValueError(problem + f"{key!r} has the dtype {value.dtype}, expected floating point.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(problem + f"{key!r} claims the shape {tuple(value.shape)}, more than the file holds.")
    context = state["ctx"].detach()
    if context.dim() not in (2, 3) or 0 in context.shape:
        raise ValueError(
            problem + f"'ctx' has the shape {tuple(context.shape)}, expected (n_ctx, dim) or (classes, n_ctx, dim)."
        )
    if context.shape[-1] > MAX_DIM or context.shape[-2] > MAX_CONTEXT_TOKENS or context.numel() > MAX_VALUES:
        raise ValueError(
            problem + f"'ctx' has the shape {tuple(context.shape)}; at most {MAX_CONTEXT_TOKENS:,} vectors of "
            f"{MAX_DIM:,} numbers and {MAX_VALUES:,} values are read."
        )
    counts = set()
    for key, length in zip(_BUFFERS, (1, None)):
        buffer = state.get(key)
        if buffer is None:
            continue
        if buffer.dim() != 3 or buffer.shape[-1] != context.shape[-1] or length not in (None, buffer.shape[1]):
            raise ValueError(
                problem + f"{key!r} has the shape {tuple(buffer.shape)}, which does not go with 'ctx' of shape "
                f"{tuple(context.shape)}."
            )
        counts.add(buffer.shape[0])
    if context.dim() == 3:
        counts.add(context.shape[0])
    if len(counts) > 1:
        raise ValueError(problem + f"its tensors disagree on the number of classes: {sorted(counts)}.")
    context = context.to(torch.float32, copy=True)
    if not is_finite(context):
        raise ValueError(problem + "its context holds NaN or infinite values; the training that made it diverged.")
    epoch = checkpoint.get("epoch")
    return {
        "context": context,
        **{key: state.get(key) for key in _BUFFERS},
        "num_classes": counts.pop() if counts else None,
        "epoch": epoch if isinstance(epoch, int) else None,
        "path": path,
    }


def _load_weights_only(path: str, problem: str) -> Any:
    allowed = [(_Nothing, name) for name in _STANDS_IN_FOR] + [(_empty_dict, name) for name in _STANDS_IN_FOR_DICT]
    check_not_sparse(path, problem)
    try:
        is_zip = zipfile.is_zipfile(path)
        _check_records(path, is_zip)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Mapped, not read: a file that is large, or says so, costs no memory before its shapes are known.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
    except pickle.UnpicklingError as error:
        text = str(error)
        wanted = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:function|class|but got) (.{1,80})", text)
        if wanted and ("GLOBAL" in text or "function" in text or "class" in text):
            raise ValueError(
                problem + f"reading it would run {wanted[1]}, which no checkpoint of CoOp needs. The file was not "
                "loaded; don't trust where it comes from."
            ) from None
        raise ValueError(
            problem + f"it cannot be read ({text[:200]}); it is cut off, or another kind of file."
        ) from None
    except Exception as error:  # a damaged pickle or archive fails in any way that its bytes ask for
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(problem + f"it cannot be read ({text}); it is cut off, or another kind of file.") from None


def _check_records(path: str, is_zip: bool) -> None:
    """Refuses what would grow on being read: deflated records, and the one allowed function that allocates."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if len(records) > _MAX_RECORDS:
                raise ValueError(f"it has {len(records):,} records, and at most {_MAX_RECORDS:,} are read")
            for record in records:
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise ValueError("its records are compressed, and PyTorch never compresses them")
                if record.filename.endswith(".pkl") and record.file_size > _MAX_PICKLE_BYTES:
                    raise ValueError(
                        f"its pickle has {record.file_size:,} bytes, at most {_MAX_PICKLE_BYTES:,} are read"
                    )
            pickles = [archive.read(record) for record in records if record.filename.endswith(".pkl")]
        for text in pickles:
            _check_operations(io.BytesIO(text))
    else:
        with open(path, "rb") as file:
            pickles = [file.read(_MAX_PICKLE_BYTES)]
        stream = io.BytesIO(pickles[0])  # what stands behind it are the tensors
        for _ in range(_LEGACY_PICKLES):
            _check_operations(stream)
    if any(b"bytearray" in text for text in pickles):
        raise pickle.UnpicklingError("Unsupported global: GLOBAL builtins.bytearray")


def _check_operations(file: BinaryIO) -> None:
    """Refuses a pickle of very many steps, each of which may be one byte, and moves behind it."""
    for count, _ in enumerate(pickletools.genops(file)):
        if count >= _MAX_OPERATIONS:
            raise ValueError(f"its pickle has more than {_MAX_OPERATIONS:,} steps")


def _plain_key(key: Any) -> str:
    key = str(key)
    for prefix in ("module.", "prompt_learner."):
        key = key.removeprefix(prefix)
    return key


def _some(keys: Any) -> str:
    keys = [repr(str(key)[:60]) for key in keys]
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "") if keys else "none"


def checkpoint_to_adapter(
    checkpoint: dict,
    embedding: torch.Tensor,
    tokenizer: Any,
    class_names: list[str] | None = None,
    class_token_position: str = "end",
    check_base: bool = True,
) -> tuple[CoOpConfig, dict[str, torch.Tensor]]:
    """What [`read_coop_checkpoint`] gives, as [`read_adapter`] gives an adapter.

    The checkpoint holds neither the names of its classes nor the class token's position, so both are given here. What
    it does hold, the embeddings of SOS and of the class names, is compared with the base's.

    Args:
        checkpoint (`dict`): from [`read_coop_checkpoint`].
        embedding (`torch.Tensor`): `(vocabulary, dim)`, the base's token embeddings.
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        class_names (`list[str]`, *optional*): the classes, in the order of the labels. For a unified context any
            list. Without it, the names are read off the checkpoint's embeddings, in lower case.
        class_token_position (`str`, *optional*, defaults to `"end"`): `TRAINER.COOP.CLASS_TOKEN_POSITION` of the
            training: `"end"`, `"middle"` or `"front"`.
        check_base (`bool`, *optional*, defaults to `True`): whether a base with other token embeddings is refused.

    Returns:
        its `CoOpConfig`, which names no base, and its tensors.

    Raises:
        ValueError: the checkpoint was learned on another base, or does not go with the class names.
    """
    context, path = checkpoint["context"], checkpoint["path"]
    names = None if class_names is None else check_class_names(class_names)
    class_specific = context.dim() == 3
    if class_specific and names is not None and len(names) != len(context):
        raise ValueError(
            f"{path} has contexts for {len(context)} classes, and `class_names` has {len(names)}: pass the names of "
            "the classes that it was learned on, in the order of their labels."
        )
    embedding = embedding.detach()
    if embedding.shape[1] != context.shape[-1]:
        raise ValueError(
            f"the context's vectors have {context.shape[-1]} dimensions, and the base's token embeddings have "
            f"{embedding.shape[1]}: {path} was learned on another CLIP model."
        )
    if check_base:
        _check_prefix(checkpoint, embedding, tokenizer)
    if names is None:
        names = _read_names(checkpoint, embedding, tokenizer)
        if names is None and class_specific:
            raise ValueError(
                f"{path} is class-specific, and its class names cannot be read off it: pass `class_names=[...]`, the "
                f"{len(context)} names in the order of their labels."
            )
    elif class_specific and check_base:
        _check_names(checkpoint, names, embedding, tokenizer)
    config = CoOpConfig(context.shape[-2], class_token_position, class_specific, class_names=names)
    return config, {WEIGHTS_KEY: context}


def from_coop_checkpoint(path: str | os.PathLike, base_model: Any, *args: Any, **kwargs: Any) -> Any:
    """`CoOpModel.from_coop_checkpoint`, under the name that it had first."""
    from ..modeling import CoOpModel  # above this room: for the command and the old name alone

    return CoOpModel.from_coop_checkpoint(path, base_model, *args, **kwargs)


def _check_prefix(checkpoint: dict, embedding: torch.Tensor, tokenizer: Any) -> None:
    prefix = checkpoint["token_prefix"]
    if prefix is None or not len(prefix):
        return
    expected = embedding[special_token_ids(tokenizer)[0]].float().cpu()
    if not torch.allclose(prefix[0, 0].float(), expected, atol=1e-3, rtol=1e-2):
        raise ValueError(
            f"{checkpoint['path']} was learned on another CLIP model: its embedding of SOS is not the base's. Pass "
            "the base that `MODEL.BACKBONE.NAME` of the training names (transformers has the ViT ones), or "
            "`check_base=False` if you know better."
        )


def _check_names(checkpoint: dict, names: list[str], embedding: torch.Tensor, tokenizer: Any) -> None:
    """Compares the tokens of each name with the embeddings that the checkpoint holds of it."""
    suffix = checkpoint["token_suffix"]
    if suffix is None:
        return
    eos = special_token_ids(tokenizer)[1]
    wrong = []
    for index, ids in enumerate(encode_words(tokenizer, [clean_class_name(name) + "." for name in names])):
        ids = [*ids, eos]
        expected = embedding[torch.tensor(ids, device=embedding.device)].float().cpu()
        found = suffix[index, : len(ids)].float()
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-3, rtol=1e-2):
            wrong.append(index)
    if wrong:
        read = _read_names(checkpoint, embedding, tokenizer)
        first = wrong[0]
        hint = f"; it was learned as {read[first]!r}" if read else ""
        raise ValueError(
            f"{len(wrong)} of {len(names)} class names are not those that {checkpoint['path']} was learned on, first "
            f"{names[first]!r} (number {first}){hint}. Check names and order, or leave `class_names` out to have them "
            "read off the checkpoint."
        )


def _read_names(checkpoint: dict, embedding: torch.Tensor, tokenizer: Any) -> list[str] | None:
    """The class names by their embeddings, or `None` if these are missing or no exact rows of the base's."""
    suffix = checkpoint["token_suffix"]
    if suffix is None or not len(suffix):
        return None
    eos = special_token_ids(tokenizer)[1]
    dtype = suffix.dtype
    rows = embedding.to("cpu", dtype).float().numpy()
    ids = {row.tobytes(): index for index, row in reversed(list(enumerate(rows)))}
    sentences = []
    for row in suffix:
        sentence = []
        for vector in row:
            token = ids.get(vector.float().numpy().tobytes())
            if token is None:
                return None
            if token == eos:
                break
            sentence.append(token)
        else:
            return None
        sentences.append(sentence)
    names = [text.strip().removesuffix(".").strip() for text in tokenizer.batch_decode(sentences)]
    try:
        check_class_names(names)
    except ValueError:
        return None
    again = encode_words(tokenizer, [name + "." for name in names])
    return names if again == sentences else None


def _read_class_file(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if path.endswith(".json"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); expected a list of names.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m coop_hf.files.coop_checkpoint",
        description="Turns a checkpoint of the original CoOp code into an adapter of coop_hf.",
    )
    parser.add_argument("checkpoint", help="model.pth.tar-<epoch>, or the folder of the training's output")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--base_model", required=True, help="the CLIP model it was learned on: Hub id or folder")
    parser.add_argument("--revision", help="revision of the base model")
    parser.add_argument("--class_names", help="file with the class names in order: one a line, or a .json list")
    parser.add_argument("--class_token_position", default="end", choices=CLASS_TOKEN_POSITIONS)
    parser.add_argument("--epoch", type=int, help="take model.pth.tar-<epoch> of the folder")
    options = parser.parse_args(arguments)
    try:
        names = _read_class_file(options.class_names) if options.class_names else None
        with contextlib.redirect_stdout(sys.stderr):
            model = from_coop_checkpoint(
                options.checkpoint,
                options.base_model,
                names,
                options.class_token_position,
                epoch=options.epoch,
                **({"revision": options.revision} if options.revision else {}),
            )
        model.save_pretrained(options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    kind = "class-specific" if model.config.class_specific else "unified"
    classes = f"{len(model.class_names)} classes" if model.class_names else "no class names"
    print(f"{options.output}: {kind} context, {model.config.n_ctx} vectors of {model.context.shape[-1]}, {classes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints of the public code of CoOp and of the prompt learners built on it, read as adapters are.

CoOp's (https://github.com/KaiyangZhou/CoOp) trainer writes `<output>/prompt_learner/model.pth.tar-<epoch>` and
`model-best.pth.tar`, made with `torch.save`:

    {"state_dict": {"ctx": (M, dim) or (C, M, dim),
                    "token_prefix": (C, 1, dim),            embeddings of SOS
                    "token_suffix": (C, 77 - 1 - M, dim)},  of the class name, ".", EOS and padding
     "epoch": int, "optimizer": dict, "scheduler": dict, "val_result": float}

The others are told apart by what their `state_dict` holds besides:

    CoCoOp, TCP     meta_net.linear1, meta_net.linear2: TCP's second one gives M vectors
    KgCoOp          bias_vectors and meta_net.linear1, which are not used: a CoOp adapter
    ProGrad         nothing: a CoOp adapter
    MaPLe           the whole model; prompt_learner.compound_prompts_text.*, .proj, .compound_prompt_projections.*
    VPT             the whole model; image_encoder.VPT and image_encoder. ... .VPT_shallow
    IVLP            the whole model; prompt_learner.ctx and those in both towers, or in the text tower alone
    PromptSRC       as IVLP, with a frozen image tower beside it: an IVLP adapter

A checkpoint is a pickle, and a pickle may run code when it is read. It is read with `weights_only=True`. Where the
original writes whole objects, its scheduler with the optimizer inside, an inert stand-in is put, which keeps nothing
and runs nothing; a file that asks for anything else is refused.
"""

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..checks import check_not_sparse, is_finite, some
from ..config import MAX_CONTEXT_TOKENS
from .adapter_files import MAX_DIM, MAX_VALUES, WEIGHTS_KEY


__all__ = ["find_coop_checkpoint", "read_coop_checkpoint"]

_FOLDERS = ("prompt_learner", "MultiModalPromptLearner", "VLPromptLearner")

_BEST = "model-best.pth.tar"

_EPOCH = re.compile(r"model\.pth\.tar-(\d{1,9})")

# Without the tensors, a checkpoint of the original has some kilobytes. PyTorch needs 150 times a long text's length.
_MAX_PICKLE_BYTES = 1 << 21

_MAX_OPERATIONS = 200_000  # of the pickle; a checkpoint of the original has hundreds, of a whole CLIP 20,000

_MAX_RECORDS = 10_000

_LEGACY_PICKLES = 5  # a mark, a version, facts on the system, the content, the keys of the storages

_BUFFERS = ("token_prefix", "token_suffix")

_META_NET = tuple(f"meta_net.{layer}.{what}" for layer in ("linear1", "linear2") for what in ("weight", "bias"))

_POSITIONS = "text_encoder.positional_embedding"

# Key in a file of MaPLe, VPT, IVLP or PromptSRC -> tensor of the adapter, and the layer that it belongs to.
_DEEP = (
    (re.compile(r"prompt_learner\.ctx"), WEIGHTS_KEY, 0),
    (re.compile(r"prompt_learner\.compound_prompts_text\.(\d{1,4})"), "deep_text", 0),
    (re.compile(r"text_encoder\.transformer\.resblocks\.(\d{1,4})\.VPT_shallow"), "deep_text", -1),
    (re.compile(r"image_encoder\.VPT"), "visual", 0),
    (re.compile(r"image_encoder\.transformer\.resblocks\.(\d{1,4})\.VPT_shallow"), "visual", 0),
    (re.compile(r"prompt_learner\.proj\.(weight|bias)"), "couplings", 0),
    (re.compile(r"prompt_learner\.compound_prompt_projections\.(\d{1,4})\.(weight|bias)"), "couplings", 1),
)


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
        path (`str` or `os.PathLike`): the file itself; or the folder `prompt_learner` (`MultiModalPromptLearner` for
            MaPLe, `VLPromptLearner` for IVLP and PromptSRC), or the one round it. In a folder `model-best.pth.tar` is
            taken, else the `model.pth.tar-<epoch>` with the highest epoch.
        epoch (`int`, *optional*): take `model.pth.tar-<epoch>` instead.

    Raises:
        FileNotFoundError: nothing there; says what was looked for.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise FileNotFoundError(f"there is no file or folder {path!r}.")
    inner = [os.path.join(path, name) for name in _FOLDERS]
    folder = next(filter(os.path.isdir, inner), path)
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
            f"{folder!r} holds no checkpoint of the original CoOp code, or of code built on it: no {_BEST} and no "
            "model.pth.tar-<epoch>."
        )
    return os.path.join(folder, epochs[max(epochs)])


def read_coop_checkpoint(path: str | os.PathLike, epoch: int | None = None) -> dict[str, Any]:
    """Reads a checkpoint of the original CoOp code or of one built on it, without running anything in it.

    Args:
        path (`str` or `os.PathLike`), epoch (`int`, *optional*): see [`find_coop_checkpoint`].

    Returns:
        `dict`: `method` (`str`) and `tensors` (fp32, by their names in an adapter's file), `context` (the context
        among them, `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`, or `None`), `token_prefix`, `token_suffix` and
        `positions` (text position embeddings), as stored, or `None`, `num_classes` (`int` or `None`), `epoch` (`int`
        or `None`), `path` (`str`).

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
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("image_encoder.") for key in state):
        method, found, state = _of_whole_model(state, problem)
    else:
        state = {key.removeprefix("prompt_learner."): value for key, value in state.items()}
        method, found, state = _of_prompt_learner(state, problem)
    # What is used of a whole model; the frozen rest of it is never looked at.
    for key, value in state.items():
        _check_tensor(key, value, problem)
    if sum(state[key].numel() for keys in found.values() for key in keys) > MAX_VALUES:
        raise ValueError(problem + f"it claims more than {MAX_VALUES:,} learned values.")
    context = state[found[WEIGHTS_KEY][0]] if WEIGHTS_KEY in found else None
    if context is not None:
        _check_context(context, method, problem)
    counts = set()
    for key, length in zip(_BUFFERS, (1, None)):
        buffer = state.get(key)
        if buffer is None or context is None:
            continue
        if buffer.dim() != 3 or buffer.shape[-1] != context.shape[-1] or length not in (None, buffer.shape[1]):
            raise ValueError(
                problem + f"{key!r} has the shape {tuple(buffer.shape)}, which does not go with 'ctx' of shape "
                f"{tuple(context.shape)}."
            )
        counts.add(buffer.shape[0])
    if context is not None and context.dim() == 3:
        counts.add(context.shape[0])
    if len(counts) > 1:
        raise ValueError(problem + f"its tensors disagree on the number of classes: {sorted(counts)}.")
    tensors = {}
    for name, keys in found.items():
        parts = [state[key].detach().to(torch.float32, copy=True) for key in keys]
        if any(not is_finite(part) for part in parts):
            what = "context" if name == WEIGHTS_KEY else name
            raise ValueError(problem + f"its {what} holds NaN or infinite values; the training that made it diverged.")
        tensors[name] = torch.stack(parts) if name in ("deep_text", "visual") else parts[0]
    if method in ("maple", "ivlp", "deep_text") and "deep_text" not in tensors:  # prompts at the first layer alone
        tensors["deep_text"] = tensors[WEIGHTS_KEY].new_zeros(0, *tensors[WEIGHTS_KEY].shape)
    epoch = checkpoint.get("epoch")
    return {
        "method": method,
        "tensors": tensors,
        "context": tensors.get(WEIGHTS_KEY),
        **{key: state.get(key) for key in _BUFFERS},
        "positions": state.get(_POSITIONS),
        "num_classes": counts.pop() if counts else None,
        "epoch": epoch if isinstance(epoch, int) else None,
        "path": path,
    }


def _of_prompt_learner(state: dict[str, Any], problem: str) -> tuple[str, dict[str, list[str]], dict[str, Any]]:
    """The method, the keys of each of its tensors, and what is used of a prompt learner's state."""
    used = {key: value for key, value in state.items() if key in ("ctx", *_BUFFERS)}
    rest = sorted(set(state) - set(used))
    if "ctx" in state and set(rest) == set(_META_NET):
        used |= {key: state[key] for key in _META_NET}
        for key in ("ctx", *_META_NET):
            _check_tensor(key, state[key], problem)
            if state[key].dim() != (1 if key.endswith("bias") else 2):
                raise ValueError(problem + f"{key!r} has the shape {tuple(state[key].shape)}, which no method has.")
        n_ctx, dim = state["ctx"].shape
        hidden, features = state["meta_net.linear1.weight"].shape
        rows = len(state["meta_net.linear2.weight"])
        # One context vector alone: the hidden layer tells d/16, CoCoOp's, from d/4, TCP's.
        is_cocoop = rows == dim and (n_ctx > 1 or hidden < features // 8)
        if not is_cocoop and rows != n_ctx * dim:
            raise ValueError(
                problem
                + f"its meta-network gives {rows} numbers; with {n_ctx} context vectors of {dim} numbers CoCoOp's "
                f"gives {dim} and TCP's {n_ctx * dim}."
            )
        method = "cocoop" if is_cocoop else "tcp"
        return method, {WEIGHTS_KEY: ["ctx"], **{key: [key] for key in _META_NET}}, used
    # KgCoOp's other tensors are used nowhere, not even in its training.
    if "ctx" not in state or set(rest) - {"bias_vectors"} not in (set(), {*_META_NET[:2]}):
        raise ValueError(
            problem + f"its state_dict has the keys {_some(state)}; expected 'ctx' and {_some(_BUFFERS)}."
        )
    return "coop", {WEIGHTS_KEY: ["ctx"]}, used


def _of_whole_model(state: dict[str, Any], problem: str) -> tuple[str, dict[str, list[str]], dict[str, Any]]:
    """The same of a whole model's state: `prompt_learner.`, and the prompts in its towers."""
    found: dict[str, dict[int, str]] = {}  # tensor of the adapter -> layer -> key
    for key in state:
        for pattern, name, offset in _DEEP:
            if match := pattern.fullmatch(key):
                layer = next((int(group) + offset for group in match.groups() if group.isdigit()), 0)
                if name == "couplings":
                    found[f"couplings.{layer}.{match.groups()[-1]}"] = {0: key}
                else:
                    found.setdefault(name, {})[layer] = key
    used = {key: state[key] for layers in found.values() for key in layers.values()}
    prompts = [key for key in state if key.startswith("prompt_learner.") or "VPT" in key]
    ignored = ("prompt_learner.ZS_image_encoder.", *(f"prompt_learner.{key}" for key in _BUFFERS))
    odd = [key for key in prompts if key not in used and not key.startswith(ignored)]
    couplings = {name for name in found if name.startswith("couplings")}
    depth = len(found.get("deep_text", {})) + 1
    if couplings:
        method = "maple"
        fits = couplings == {f"couplings.{k}.{what}" for k in range(depth) for what in ("weight", "bias")}
        fits = fits and WEIGHTS_KEY in found and "visual" not in found
    elif WEIGHTS_KEY in found:
        method, fits = ("ivlp" if "visual" in found else "deep_text"), True
    else:
        method, fits = "vpt", set(found) == {"visual"}
    if odd or not fits:
        raise ValueError(
            problem + f"it is a whole model, whose prompts have the keys {_some(odd or list(used))}; those of MaPLe, "
            "VPT, IVLP and PromptSRC are others."
        )
    for layers in found.values():
        if sorted(layers) != list(range(len(layers))):
            raise ValueError(problem + f"there are gaps between the layers of {_some(layers.values())}.")
        for key in layers.values():
            _check_tensor(key, state[key], problem)
            shape = state[key].shape
            if shape != state[layers[0]].shape or len(shape) != (1 if key.endswith("bias") else 2) or 0 in shape:
                raise ValueError(problem + f"{key!r} has the shape {tuple(shape)}, which no method has.")
    for key, name in [(_POSITIONS, _POSITIONS), *((f"prompt_learner.{key}", key) for key in _BUFFERS)]:
        if key in state:
            used[name] = state[key]
    return method, {name: [layers[k] for k in range(len(layers))] for name, layers in found.items()}, used


def _check_tensor(key: str, value: Any, problem: str) -> None:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise ValueError(problem + f"{key!r} is a {type(value).__name__}, expected a plain tensor.")
    if value.device.type != "cpu":
        raise ValueError(problem + f"{key!r} is on the device {value.device.type!r} and holds no values.")
    if not value.dtype.is_floating_point:
        raise ValueError(problem + f"{key!r} has the dtype {value.dtype}, expected floating point.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(problem + f"{key!r} claims the shape {tuple(value.shape)}, more than the file holds.")


def _check_context(context: Tensor, method: str, problem: str) -> None:
    if context.dim() not in ((2, 3) if method == "coop" else (2,)) or 0 in context.shape:
        raise ValueError(
            problem + f"'ctx' has the shape {tuple(context.shape)}, expected (n_ctx, dim) or (classes, n_ctx, dim)."
        )
    if context.shape[-1] > MAX_DIM or context.shape[-2] > MAX_CONTEXT_TOKENS or context.numel() > MAX_VALUES:
        raise ValueError(
            problem + f"'ctx' has the shape {tuple(context.shape)}; at most {MAX_CONTEXT_TOKENS:,} vectors of "
            f"{MAX_DIM:,} numbers and {MAX_VALUES:,} values are read."
        )


def _load_weights_only(path: str, problem: str) -> Any:
    allowed: list[Any] = [(_Nothing, name) for name in _STANDS_IN_FOR]
    allowed += [(_empty_dict, name) for name in _STANDS_IN_FOR_DICT]
    check_not_sparse(path, problem)
    try:
        is_zip = zipfile.is_zipfile(path)
        _check_records(path, is_zip)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Mapped, not read: a file that is large, or says so, costs no memory before its shapes are known.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
    except Exception as error:  # a damaged pickle or archive fails in any way that its bytes ask for
        text = str(error)
        wanted = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:function|class|but got) (.{1,80})", text)
        is_code = isinstance(error, pickle.UnpicklingError) and any(w in text for w in ("GLOBAL", "function", "class"))
        if wanted and is_code:
            raise ValueError(
                problem + f"reading it would run {wanted[1]}, which no checkpoint of CoOp needs. The file was not "
                "loaded; don't trust where it comes from."
            ) from None
        text = " ".join(text.split())[:200] or type(error).__name__
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


def _some(keys: Iterable[Any]) -> str:
    return some((str(key)[:60] for key in keys), 8) or "none"

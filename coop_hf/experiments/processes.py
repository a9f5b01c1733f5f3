"""A cell in a process of its own, which never holds a test label.

The process of a cell is forked from a server that has imported the library and seen no data. It is told its class
names, template and few-shot draw; it learns, says so, and is then asked for the logits of test images, in batches
without labels, paths or names, in an order that depends on the labels alone. What it answers is read as JSON and raw
numbers, never unpickled, and scored by the process that started it.

This keeps a method from test labels by mistake, and from whatever memory, attributes and closures hold. It is no
sandbox: a method may open files like any program, and must be read by who trusts its figures.
"""

import importlib.util
import io
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch.utils.data import Subset

from ..data.labelled_images import LabelledImages
from ..data.transforms import decode_image, to_rgb
from ..modeling import CoOpModel
from .cells import CellError
from .methods import METHODS, Method, Options
from .scoring import Ask, Exam, fit
from .tasks import FewShot


__all__ = ["Place", "answer_elsewhere", "describe_methods", "read_methods"]

IMAGES_AT_ONCE = 64  # test images in a message

STOP_SECONDS = 20.0

_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_STARTING = threading.Lock()


@dataclass
class Place:
    """What a process needs beside the cell.

    Args:
        base_model (`str`): Hub id or folder of the base.
        methods_file (`str`, *optional*): a Python file with methods of one's own, see [`read_methods`].
        threads (`int`, *optional*, defaults to 1): of a process.
    """

    base_model: str
    methods_file: str | None = None
    threads: int = 1


def read_methods(path: str | None) -> dict[str, Method]:
    """The methods that there are: the library's, and those of a file of one's own.

    Args:
        path (`str`, *optional*): a Python file that sets `METHODS`, `{name: Method}`.

    Raises:
        ValueError: the file has no such dict.
    """
    if path is None:
        return dict(METHODS)
    spec = importlib.util.spec_from_file_location("coop_hf_methods_file", path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no Python file {path!r}: --methods_file names one that sets METHODS.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    own = getattr(module, "METHODS", None)
    if not isinstance(own, dict) or not all(isinstance(method, Method) for method in own.values()):
        raise ValueError(f"{path} must set METHODS = {{name: Method(...)}}, got {type(own).__name__}.")
    return {**METHODS, **own}


# ---------------------------------------------------------------------- in the process of a cell


def _serve(pipe: Connection, place: Place, name: str, draw: dict[str, Any] | None, options: Options) -> None:
    """Learns, and answers: the whole life of a cell's process."""
    try:
        torch.set_num_threads(place.threads)
        method = read_methods(place.methods_file)[name]
        shots = None if draw is None else _unpack(draw)
        datasets.disable_progress_bars()
        warnings.simplefilter("ignore", FutureWarning)  # of other libraries: cells are many, and say it each
        transformers.utils.logging.disable_progress_bar()
        model = CoOpModel.from_pretrained(place.base_model)
        if torch.cuda.is_available():
            model.to("cuda")
        predict, facts = fit(method, model, shots, options)
        _tell(pipe, facts)
        while (question := json.loads(pipe.recv_bytes())) != "end":
            images = _read_images(pipe, question, model, options)
            _tell_floats(pipe, predict(images, question["class_names"]))
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        cpu = time.process_time()
        _tell(pipe, {"cpu_seconds": cpu, "peak_memory_bytes": _peak_memory(), "peak_gpu_memory_bytes": gpu})
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # who asked is gone
        pass
    except Exception as error:
        with suppress(OSError):
            _tell(pipe, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
    finally:
        pipe.close()


def _peak_memory() -> int | None:
    """The most memory that this process has held, the library with it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tell(pipe: Connection, value: Any) -> None:
    pipe.send_bytes(json.dumps(value).encode())


def _tell_floats(pipe: Connection, tensor: torch.Tensor, **more: Any) -> None:
    """Sends a tensor: its shape, with whatever else is said, and its numbers."""
    tensor = tensor.detach().float().cpu().contiguous()
    _tell(pipe, {**more, "shape": list(tensor.shape)})
    pipe.send_bytes(tensor.numpy().tobytes())


def _read_floats(pipe: Connection, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(pipe.recv_bytes(), dtype=np.float32).copy()).view(shape)


def _read_images(pipe: Connection, question: dict, model: CoOpModel, options: Options) -> Any:
    """The images of a question: embeddings; or encoded files, as a method that changes the image tower takes them,
    where every label is 0 and means nothing."""
    if "shape" in question:
        return _read_floats(pipe, question["shape"])
    files = [pipe.recv_bytes() for _ in range(question["images"])]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [0] * len(files)}
    table = datasets.Dataset.from_dict(rows, features=features)
    names, original = question["class_names"], options.recipe == "paper"
    return LabelledImages(table, model.image_processor, class_names=names, original=original)


def _unpack(draw: dict[str, Any]) -> FewShot:
    values: dict[str, Any] = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in draw.items()}
    return FewShot(**values)


# ---------------------------------------------------------------------- in the process that asks


def _context(threads: int = 1) -> Any:
    """Processes that start from a server with the library imported, where there are such; else from nothing.

    Libraries read how many threads they may use when they are imported, so the server is told before it starts.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "coop_hf.experiments.processes"])
    before = {name: os.environ.get(name) for name in _THREAD_LIMITS}
    os.environ.update(dict.fromkeys(_THREAD_LIMITS, str(threads)))
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _run(target: Any, *arguments: Any) -> None:
    """Calls a function in a process that ends with the one that started it, even in the middle of a training."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    target(*arguments)


def _start(context: Any, target: Any, *arguments: Any) -> tuple[Any, Connection]:
    """A process, and the pipe to it."""
    pipe, other = context.Pipe()
    process = context.Process(target=_run, args=(target, other, *arguments), daemon=True)
    process.start()
    other.close()
    return process, pipe


def _pack(shots: FewShot) -> dict[str, Any]:
    """A draw as plain arrays and, of its images, a table of these rows alone."""
    draw = {entry.name: getattr(shots, entry.name) for entry in fields(shots)}
    draw = {key: value.numpy().copy() if isinstance(value, torch.Tensor) else value for key, value in draw.items()}
    if shots.images is not None:
        draw["images"] = _own_rows(shots.images, *shots.columns)
    return draw


def _own_rows(images: datasets.Dataset, image_column: str, label_column: str) -> datasets.Dataset:
    """The rows in memory: a selection of a table would bring all of the table, and paths lead to the files."""
    labels = images.select_columns([label_column]).with_format(None)[:][label_column]
    source = images.select_columns([image_column]).with_format(None)
    if isinstance(images.features[image_column], datasets.Image):
        source = source.cast_column(image_column, datasets.Image(decode=False))
    values = [{"bytes": _file_of(row[image_column]), "path": None} for row in source]
    features = datasets.Features({image_column: datasets.Image(), label_column: images.features[label_column]})
    return datasets.Dataset.from_dict({image_column: values, label_column: labels}, features=features)


def _file_of(value: Any) -> bytes:
    """The encoded file of an image: as it is, from the disk, or of its pixels."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, (str, os.PathLike)):
        with open(value, "rb") as file:
            return file.read()
    buffer = io.BytesIO()
    to_rgb(decode_image(value)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _exam_files(exam: Exam, rows: np.ndarray) -> list[bytes]:
    files = []
    for row in rows.tolist():
        images: Any = exam.views
        while isinstance(images, Subset):
            images, row = images.dataset, images.indices[row]
        files.append(_file_of(images.source(row)))
    return files


@contextmanager
def answer_elsewhere(
    place: Place, name: str, shots: FewShot | None, options: Options
) -> Iterator[tuple[dict[str, Any], Ask]]:
    """Lets a method learn in a process of its own; yields what `scoring.fit` says of it, and what asks it.

    When the block ends the facts also hold `cpu_seconds`, `peak_memory_bytes` and `peak_gpu_memory_bytes` of the
    process, which is over then.

    Args:
        place ([`Place`]): base model, threads.
        name (`str`): the method's name.
        shots (`FewShot`, *optional*), options (`Options`): see `scoring.allowed`.

    Raises:
        CellError: the method raised an error, or the process died.
    """
    with _STARTING:
        context = _context(place.threads)
    draw = None if shots is None else _pack(shots)
    process, pipe = _start(context, _serve, place, name, draw, options)

    def read() -> Any:
        try:
            answer = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join(STOP_SECONDS)
            raise CellError(
                f"the process of {name!r} ended with exit code {process.exitcode}; -9 is mostly a lack of memory: "
                "pass fewer --processes."
            ) from None
        if isinstance(answer, dict) and "error" in answer:
            last = [line for line in answer["traceback"].splitlines() if line.startswith('  File "')][-1:]
            raise CellError(f"{answer['error']} ({' '.join(part.strip() for part in last)})")
        return answer

    def ask(exam: Exam, rows: np.ndarray) -> torch.Tensor:
        if facts["sees_images"]:
            pieces = [rows[start : start + IMAGES_AT_ONCE] for start in range(0, len(rows), IMAGES_AT_ONCE)]
            return torch.cat([ask_once(exam, piece, _exam_files(exam, piece)) for piece in pieces])
        return ask_once(exam, rows, None)

    def ask_once(exam: Exam, rows: np.ndarray, files: list[bytes] | None) -> torch.Tensor:
        names = list(exam.class_names)
        if files is None:
            _tell_floats(pipe, exam.embeds[torch.as_tensor(rows)], class_names=names)
        else:
            _tell(pipe, {"class_names": names, "images": len(files)})
            for file in files:
                pipe.send_bytes(file)
        shape = read()["shape"]
        if shape != [len(rows), len(exam.class_names)]:
            raise CellError(f"{name!r} gave logits of shape {shape} for {len(rows)} images.")
        return _read_floats(pipe, shape)

    try:
        facts = read()
        yield facts, ask
        _tell(pipe, "end")
        facts |= read()
    except BrokenPipeError:
        read()
        raise CellError(f"the process of {name!r} went away.") from None
    finally:
        pipe.close()
        process.join(STOP_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _describe(pipe: Connection, path: str) -> None:
    try:
        found = {
            name: asdict(replace(method, fit=_elsewhere)) | {"fit": None}
            for name, method in read_methods(path).items()
        }
        _tell(pipe, found)
    except Exception as error:
        _tell(pipe, {"error": f"{type(error).__name__}: {error}"})
    finally:
        pipe.close()


def describe_methods(path: str | None) -> dict[str, Method]:
    """What [`read_methods`] finds, but what the file's methods do: the file is run in another process.

    Raises:
        ValueError: the file cannot be run, or sets no `METHODS`.
    """
    if path is None:
        return dict(METHODS)
    process, pipe = _start(_context(), _describe, path)
    try:
        found = json.loads(pipe.recv_bytes())
    except EOFError:
        found = {"error": "its process ended"}
    finally:
        pipe.close()
        process.join()
    if "error" in found:
        raise ValueError(f"--methods_file {path} cannot be used: {found['error']}")
    return {
        name: METHODS.get(name) or Method(**{**values, "fit": _elsewhere, "knowledge": tuple(values["knowledge"])})
        for name, values in found.items()
    }


def _elsewhere(*arguments: Any) -> Any:
    raise NotImplementedError("this method is known by its description alone; it learns in a process of its own.")

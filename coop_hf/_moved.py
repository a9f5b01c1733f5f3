"""Old names, kept for two minor versions: importing one warns and gives what stands in the new rooms."""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


# Old module -> the new ones that hold its names; the first also runs with `python -m`.
MOVED = {
    "context": ["adapters.coop"],
    "embedded": ["demo.emoji"],
    "feature_cache": ["data.feature_cache"],
    "merging": ["deploy.merging"],
    "methods": ["experiments.methods", "experiments.tasks"],
    "metrics": ["training.metrics"],
    "model_card": ["files.model_card"],
    "plotting": ["experiments.plotting"],
    "prompts": ["core.layout"],
    "protocols": ["experiments.protocols", "experiments.tables", "experiments.commands"],
    "saving": ["files.adapter_files", "atomic"],
    "shared_prefix": ["core.shared_prefix"],
    "sources": ["data.sources"],
    "text_tower": ["core.plain"],
    "trainer": ["training.trainer"],
    "training_args": ["training.arguments"],
    "transforms": ["data.transforms"],
}

# Names that left a module which is still there, and their new modules.
MOVED_NAMES = {
    "deploy": {"CoOpImageClassificationPipeline": "pipeline", "PIPELINE_TASK": "pipeline"},
    "hub": {"push_to_hub": "files.publish"},
}

# Functions of old modules that have no place in the new rooms; below.
OLD_FUNCTIONS = {"saving": ["write_adapters"], "text_tower": ["check_base_model", "prompt_embeddings"]}

GONE_IN = "the old name goes in coop_hf 0.4."

_SOURCE = """
import warnings
warnings.warn({message!r}, FutureWarning, stacklevel=2)
{imports}
if __name__ == "__main__":
    from {first} import main

    raise SystemExit(main())
"""


class _MovedLoader(importlib.abc.InspectLoader):
    def get_source(self, fullname: str) -> str:
        name = fullname.rpartition(".")[2]
        new = [f"coop_hf.{module}" for module in MOVED[name]]
        imports = [f"from {module} import *" for module in new]
        imports += [f"from {__name__} import {function}" for function in OLD_FUNCTIONS.get(name, [])]
        message = f"{fullname} is now {' and '.join(new)}; {GONE_IN}"
        return _SOURCE.format(message=message, first=new[0], imports="\n".join(imports))


class _MovedFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != "coop_hf" or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, _MovedLoader(), origin=f"coop_hf.{MOVED[name][0]}")


sys.meta_path.append(_MovedFinder())


def moved_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that names have left."""
    names = MOVED_NAMES[module.rpartition(".")[2]]

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = f"coop_hf.{names[name]}"
        warnings.warn(f"{module}.{name} is now {new}.{name}; {GONE_IN}", FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(new), name)

    return __getattr__


def write_adapters(
    model: Any, save_directory: str | os.PathLike, selected_adapters: list[str] | None = None
) -> list[str]:
    """`CoOpModel.save_adapters`, under the name that it had first."""
    return model.save_adapters(save_directory, selected_adapters)


def check_base_model(base_model: Any) -> None:
    """Raises `TypeError` unless the base model is of a supported family; `get_family` says more."""
    importlib.import_module("coop_hf.core.families").get_family(base_model)


def prompt_embeddings(
    text_model: Any,
    tokens: "torch.Tensor",
    context: "torch.Tensor | None",
    positions: "torch.Tensor | None" = None,
    class_index: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """Token plus position embeddings of CLIP's text tower, `(rows, length, dim)`, with context in slots -1 - k."""
    import torch
    from torch.nn import functional as F

    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    embeddings = text_model.embeddings.token_embedding(tokens.clamp_min(0))
    if context is not None:
        slots = (-1 - tokens).clamp_min(0)
        if context.dim() == 3:
            rows = torch.arange(len(tokens), device=tokens.device)[:, None]
            slots = slots + (rows if class_index is None else class_index) * context.shape[1]
        vectors = F.embedding(slots.to(context.device), context.flatten(0, -2)).to(embeddings)
        embeddings = torch.where((tokens < 0)[..., None].to(embeddings.device), vectors, embeddings)
    return embeddings + text_model.embeddings.position_embedding(positions)

"""What `import coop_hf` does for other libraries, done when they are loaded, so that it loads none of them itself."""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


__all__ = ["register_pipeline"]

_PIPELINES = "transformers.pipelines"


class _PipelinesFinder(importlib.abc.MetaPathFinder):
    """Finds `transformers.pipelines` as any other finder does, and registers our pipeline when it has been loaded."""

    def __init__(self) -> None:
        self.is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PIPELINES or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_asking = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            importlib.import_module("coop_hf.pipeline")

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_pipeline() -> None:
    """Registers the pipeline with transformers: at once if its pipelines are loaded, else as soon as they are."""
    if _PIPELINES in sys.modules:
        importlib.import_module("coop_hf.pipeline")
    else:
        sys.meta_path.insert(0, _PipelinesFinder())

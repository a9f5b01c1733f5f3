"""Old module names, kept for two minor versions: importing one warns and gives what stands in the new rooms."""

import importlib.abc
import importlib.machinery
import sys


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
        message = f"{fullname} is now {' and '.join(new)}; the old name goes in coop_hf 0.4."
        return _SOURCE.format(
            message=message, first=new[0], imports="\n".join(f"from {module} import *" for module in new)
        )


class _MovedFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        if package != "coop_hf" or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, _MovedLoader(), origin=f"coop_hf.{MOVED[name][0]}")


sys.meta_path.append(_MovedFinder())

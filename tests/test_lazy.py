"""`import coop_hf` loads next to nothing, and all that it holds is there when it is asked for."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import coop_hf


def run(program: str):
    """What a fresh interpreter prints, read as JSON."""
    folder = Path(coop_hf.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=200, check=True
    )
    return json.loads(result.stdout)


def test_the_three_lists_of_names_agree():
    tree = ast.parse(Path(coop_hf.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]  # what type checkers read
    imported = {alias.name: node.module for node in checked.body for alias in node.names}
    assert imported == coop_hf._MODULE_OF
    assert sorted(["__version__", *imported]) == coop_hf.__all__


def test_every_name_is_its_module_s_own():
    for name in set(coop_hf.__all__) - {"__version__"}:
        assert getattr(coop_hf, name) is getattr(importlib.import_module(f"coop_hf.{coop_hf._MODULE_OF[name]}"), name)
    assert set(coop_hf.__all__) <= set(dir(coop_hf))
    assert coop_hf.interpret.nearest_tokens is coop_hf.nearest_tokens  # a room, as an attribute
    with pytest.raises(AttributeError, match="no attribute 'CoOpModell'"):
        coop_hf.CoOpModell  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'CoOpModell'"):
        exec("from coop_hf import CoOpModell")


def test_the_package_alone_is_light():
    program = """
import json, sys, time
import transformers
start = time.process_time()
import coop_hf
seconds = time.process_time() - start
print(json.dumps([seconds, [name for name in ("torch", "datasets", "evaluate") if name in sys.modules]]))
"""
    seconds, loaded = run(program)
    assert seconds < 0.3 and loaded == []


def test_a_configuration_s_method_is_found_without_the_model():
    program = """
import json, sys
from coop_hf.config import PromptConfig
config = PromptConfig.from_dict({"method": "maple", "depth": 2})
print(json.dumps([type(config).__name__, config.depth, "coop_hf.modeling" in sys.modules]))
"""
    assert run(program) == ["MaPLeConfig", 2, False]


@pytest.mark.parametrize(
    "order",
    # The last: its metrics load `evaluate`, which loads the pipelines of transformers. First us, then them: in
    # tests/test_deploy.py.
    ["import transformers.pipelines, coop_hf", "from coop_hf import CoOpTrainer"],
)
def test_the_pipeline_is_registered_in_any_order(order):
    program = "; ".join([order, "import json", "from transformers.pipelines import PIPELINE_REGISTRY as registry"])
    program += "; print(json.dumps(registry.check_task('coop-image-classification')[1]['impl'].__name__))"
    assert run(program) == "CoOpImageClassificationPipeline"

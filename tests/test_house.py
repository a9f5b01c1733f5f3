"""The house stands as CONTRIBUTING draws it: imports run one way, files and classes stay small, old names work."""

import ast
import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import coop_hf


ROOT = Path(coop_hf.__file__).parent

MODULES = {
    ".".join(["coop_hf", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# From the ground up: a room imports those before it, and itself.
ROOMS = (
    "_moved _lazy version checks atomic hub config core interpret data files adapters deploy modeling pipeline "
    "coop_checkpoint baselines training demo experiments cli __main__"
).split()

MAX_FILE, MAX_CLASS = 520, 430

# Every name that was public in 0.1, by its module of then.
NAMES_OF_0_1 = {
    "coop_hf": "ClassificationAccuracy CoOpConfig CoOpModel CoOpOutput CoOpTrainer CoOpTrainingArguments "
    "EmbeddedImages LabelledImages __version__ embed_images emoji_model_path format_nearest_tokens load_emoji "
    "load_images nearest_tokens read_coop_split read_few_shot_indices sample_few_shot",
    "baselines": "CUPL_QUESTIONS HAND_TEMPLATES IMAGENET_7_TEMPLATES IMAGENET_80_TEMPLATES DiscretePrompt LinearProbe "
    "PetResult autoprompt class_embeddings cupl_class_embeddings encode_texts fit_linear_probe fit_pet "
    "generate_prompts mean_text_embeddings project_context prompt_vocabulary prompt_weights read_prompts "
    "soft_label_loss soft_labels teacher_logits write_prompts zero_shot_logits",
    "baselines.autoprompt": "DiscretePrompt autoprompt project_context prompt_vocabulary",
    "baselines.cupl": "CUPL_QUESTIONS cupl_class_embeddings fill_question generate_prompts prompts_of_classes "
    "read_prompts write_prompts",
    "baselines.linear_probe": "COARSE_C LinearProbe fit_linear_probe",
    "baselines.pet": "PetResult fit_pet prompt_weights soft_label_loss soft_labels teacher_logits",
    "baselines.zero_shot": "HAND_TEMPLATES IMAGENET_7_TEMPLATES IMAGENET_80_TEMPLATES class_embeddings encode_texts "
    "mean_text_embeddings zero_shot_logits",
    "config": "ADAPTER_CONFIG_NAME ADAPTER_WEIGHTS_NAME FORMAT_VERSION CLASS_TOKEN_POSITIONS CoOpConfig",
    "context": "CONTEXT_STD init_context num_context_tokens",
    "coop_checkpoint": "find_coop_checkpoint from_coop_checkpoint read_coop_checkpoint",
    "data": "LabelledImages collate resolve_labels sample_few_shot",
    "deploy": "CoOpImageClassificationPipeline ImageClassifier PIPELINE_TASK as_image_classifier export_onnx",
    "embedded": "EMOJI_SPLITS EMOJI_STYLES emoji_cupl_path emoji_model_path load_emoji",
    "feature_cache": "EmbeddedImages FeatureCache default_cache_dir embed_images",
    "hub": "find_file has_file hub_errors is_hub_id push_to_hub",
    "interpret": "format_nearest_tokens nearest_rows nearest_tokens readable_token",
    "merging": "merge_and_unload",
    "methods": "ABLATIONS EMOJI_TEMPLATES METHODS FewShot Method Options Predictor Task ablation_methods coop_method "
    "corrupt_labels draw_few_shot make_task select_classes",
    "metrics": "ClassificationAccuracy classification_scores make_compute_metrics",
    "model_card": "CARD_NAME make_card write_card",
    "modeling": "CoOpModel CoOpOutput",
    "plotting": "plot_confusion_matrix plot_few_shot_curves plot_gains plot_predictions",
    "prompts": "PromptLayout encode_words fill_template make_layout tokenize_texts",
    "protocols": "ProtocolArguments base_to_new choose_template cross_dataset_transfer domain_generalization "
    "environment few_shot_curve label_noise load_splits map_classes prepare read_class_names results_table run_cells "
    "scores_by_method",
    "saving": "WEIGHTS_KEY read_adapter save_tensors write_adapter write_adapters write_atomically",
    "shared_prefix": "BLOCK_SIZE SharedPrefixPass class_parallel_features",
    "sources": "load_images read_coop_split read_few_shot_indices",
    "text_tower": "check_base_model plain_text_features prompt_embeddings",
    "trainer": "CoOpTrainer",
    "training_args": "CoOpTrainingArguments PAPER_WARMUP_LR RECIPES paper_epochs",
    "transforms": "decode_image eval_transform to_rgb train_transform",
}


def imported_modules(name: str) -> set[str]:
    """The modules of coop_hf that a module imports, inside functions too."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module for a in node.names}
    return found & set(MODULES)


GRAPH = {name: imported_modules(name) for name in MODULES}


def room(module: str) -> str:
    """The first name below coop_hf; of the package itself, its own."""
    return module.split(".")[1] if "." in module else module


def test_no_circle():
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                walk(other, (*above, name))
            done.add(name)

    for name in GRAPH:
        walk(name, ())
    assert "coop_hf.adapters.base" in GRAPH["coop_hf.modeling"]  # the graph is not empty


def test_rooms_import_downwards():
    order = [*ROOMS, "coop_hf"]
    assert {room(name) for name in MODULES} == set(order)
    wrong = {
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if order.index(room(other)) > order.index(room(name))
    }
    assert not wrong


def test_files_and_classes_stay_small():
    large = {}
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        large[name] = (len(text.splitlines()), MAX_FILE)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                large[f"{name}.{node.name}"] = (node.end_lineno - node.lineno + 1, MAX_CLASS)
    assert not {name: lines for name, (lines, most) in large.items() if lines > most}


def test_public_functions_are_annotated():
    missing = []
    for name, path in MODULES.items():
        for scope in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(scope, (ast.Module, ast.ClassDef)) or getattr(scope, "name", "").startswith("_"):
                continue
            for node in scope.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") and node.name != "__init__":
                    continue
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
                bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or node.returns is None and node.name != "__init__":
                    missing.append(f"{name}:{node.lineno} {node.name}({', '.join(bare)})")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("old", NAMES_OF_0_1)
def test_names_of_0_1(old):
    name = old if old == "coop_hf" else f"coop_hf.{old}"
    sys.modules.pop(name, None) if name not in MODULES else None  # a shim warns each time that it is made
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(name)
        missing = [part for part in NAMES_OF_0_1[old].split() if not hasattr(module, part)]
    assert not missing
    if name not in MODULES:
        (message,) = {str(w.message) for w in caught if w.category is FutureWarning and name in str(w.message)}
        assert message.endswith("the old name goes in coop_hf 0.4.")


def test_old_names_stay_for_two_minor_versions():
    # Else the shims and their message (coop_hf/_moved.py) are due.
    assert coop_hf.__version__.startswith(("0.2.", "0.3."))


def test_importing_the_package_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error', FutureWarning); import coop_hf"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_constraints_agree_with_the_bounds():
    """The two ends that CI runs are the bounds that setup.cfg states."""
    files = {name: ROOT.parent / name for name in ("setup.cfg", "constraints.txt", "constraints-oldest.txt")}
    if not all(path.exists() for path in files.values()):
        pytest.skip("not a clone")
    text = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    pins = {
        name: dict(line.split("==") for line in text[name].splitlines() if "==" in line)
        for name in ("constraints.txt", "constraints-oldest.txt")
    }
    oldest, newest = pins["constraints-oldest.txt"]["transformers"], pins["constraints.txt"]["transformers"]
    major, minor, _ = map(int, newest.split("."))
    assert f"transformers>={oldest},<{major}.{minor + 1}\n" in text["setup.cfg"]
    lint = {
        name: {k: v for k, v in own.items() if k == "mypy" or k.startswith("types-")} for name, own in pins.items()
    }
    assert lint["constraints.txt"] == lint["constraints-oldest.txt"] and "mypy" in lint["constraints.txt"]

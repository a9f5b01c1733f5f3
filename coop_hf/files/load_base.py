"""Loading a base model: its family is read off `config.json` before anything large is touched."""

import json
import os
from dataclasses import fields
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoProcessor, AutoTokenizer

from ..config import ADAPTER_CONFIG_NAME, CoOpConfig, PromptConfig
from ..core.families import FAMILIES, Family, get_family, supported_models
from ..hub import find_file, has_file, hub_errors, is_hub_id, remove_damaged
from .adapter_files import base_of


__all__ = ["check_is_base", "load_base", "load_base_of_adapter", "take_config"]

_INDEX = "model.safetensors.index.json"


def take_config(config: PromptConfig | None, kwargs: dict[str, Any]) -> PromptConfig | None:
    """The configuration of a fresh adapter, of which single fields may stand among the keywords; takes them out there.

    Raises:
        TypeError: fields beside a configuration.
    """
    of_base = ("base_model_name_or_path", "revision", "format_version", "coop_hf_version")
    names = [field.name for field in fields(CoOpConfig) if field.name in kwargs and field.name not in of_base]
    own = {name: kwargs.pop(name) for name in names}
    if own and config is not None:
        given = ", ".join(f"{name}={value!r}" for name, value in own.items())
        raise TypeError(f"{given} belongs into `config`: write config={type(config).__name__}({given}, ...).")
    return CoOpConfig(**own) if own else config


def check_is_base(name: str, subfolder: str | None, source: dict[str, Any]) -> None:
    """Raises `FileNotFoundError` unless the folder or repository holds a model's `config.json`."""
    if not os.path.isdir(name) and not is_hub_id(name):
        find_file(name, "config.json")  # raises, and says that this is neither a folder nor a Hub id
    if subfolder is not None or not has_file(name, "config.json", **source):
        where = f"{name!r}" + (f", folder {subfolder!r}," if subfolder else "")
        hint = ""
        if os.path.isdir(name):
            inside = sorted(d for d in os.listdir(name) if os.path.isfile(os.path.join(name, d, ADAPTER_CONFIG_NAME)))
            hint = f" It holds the adapters {', '.join(map(repr, inside))}: pass `subfolder=`." if inside else ""
        raise FileNotFoundError(
            f"{where} holds neither an adapter ({ADAPTER_CONFIG_NAME}) nor a base model (config.json).{hint}"
        )


def load_base(name: str, processor: Any, source: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The base model and, unless given, its processor, or its tokenizer alone if no image processor lies beside it.

    Args:
        name (`str`): folder or Hub id.
        processor (*optional*): taken as it is.
        source (`dict`): `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.
        kwargs (`dict`): for the model's `from_pretrained`.

    Raises:
        ValueError: a model of no supported family, or weights that the folder lacks; names them.
    """
    family = _family_of(name, find_file(name, "config.json", **source))  # its errors say more
    if not os.path.isdir(name) and not {"variant", "subfolder", "use_safetensors", "gguf_file"} & set(kwargs):
        _fetch_weights(name, source)
    with hub_errors(name):
        base, report = getattr(transformers, family.model_class).from_pretrained(
            name, output_loading_info=True, **source, **kwargs
        )
    if any(parameter.is_meta for parameter in base.parameters()) and not hasattr(base, "hf_device_map"):
        raise ValueError(
            f"the weights of {name!r} are on no device: transformers {transformers.__version__} leaves a model that "
            f"goes to one place alone, as with device_map={kwargs.get('device_map')!r}, without what fetches it from "
            'there. Keep a part elsewhere, such as device_map={"text_model": "disk", "vision_model": "cpu", ...}, or '
            "upgrade transformers."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name!r} lacks {len(missing)} of the weights of a {family.model_class}, such as "
            f"{', '.join(missing[:5])}: it is another kind of model, or a part of one. Name a whole base model."
        )
    return base, _load_processor(name, source) if processor is None else processor


def _load_processor(name: str, source: dict[str, Any]) -> Any:
    """The processor, or the tokenizer alone; its files are compared with the Hub's hashes, and fetched once more."""
    names = ("preprocessor_config.json", "processor_config.json")
    kind = AutoProcessor if any(has_file(name, file, **source) for file in names) else AutoTokenizer
    is_local = os.path.isdir(name)
    for _ in range(2):
        failure, processor = None, None
        try:
            with hub_errors(name):
                processor = kind.from_pretrained(name, **source)
        except Exception as error:  # a damaged file fails in any way
            failure = error
        damaged = [] if is_local else remove_damaged(os.path.dirname(find_file(name, "config.json", **source)))
        if not damaged and failure is not None:
            raise failure
        if not damaged:
            return processor
    raise OSError(
        f"{', '.join(damaged)} of {name!r} arrived damaged twice: the hash is not the one that the Hub gives. Nothing "
        "of it was kept. Try again, or on another network."
    )


def _fetch_weights(name: str, source: dict[str, Any]) -> None:
    """Puts the weights into the cache by way of `find_file`, which compares them with the Hub's hash as they arrive.

    transformers finds them there. It does not compare, and a flipped bit would stay.
    """
    if has_file(name, "model.safetensors", **source) or not has_file(name, _INDEX, **source):
        return
    with open(find_file(name, _INDEX, **source), encoding="utf-8") as file:
        try:
            shards = set(json.load(file)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # transformers says what is wrong with it
    for shard in sorted(shard for shard in shards if isinstance(shard, str) and "/" not in shard):
        has_file(name, shard, **source)


def _family_of(name: str, config_file: str) -> type[Family]:
    try:
        with open(config_file, encoding="utf-8") as file:
            values = json.load(file)
            model_type, written_by = values.get("model_type"), values.get("transformers_version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config_file} is not a model's configuration ({str(error)[:200]}).") from None
    by = f" Its config.json was written by transformers {str(written_by)[:40]}." if written_by else ""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
        unknown = "" if is_known else f" transformers {transformers.__version__} does not know it either.{by}"
        raise ValueError(
            f"{name!r} is not a supported base model: its config.json says model_type {str(model_type)[:80]!r}. "
            f"Supported: {supported_models()}.{unknown}"
        )
    family = FAMILIES[model_type]
    if not hasattr(transformers, family.model_class):
        raise ValueError(
            f"{name!r} is a {family.model_class}, and transformers {transformers.__version__}, which is installed, "
            f"has no such class: upgrade transformers.{by}"
        )
    return family


def load_base_of_adapter(
    name: str, config: PromptConfig, base_model: Any, processor: Any, download: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """The base model under an adapter, and its processor.

    Args:
        name (`str`): folder or Hub id of the adapter.
        config (`PromptConfig`): its configuration, which names the base.
        base_model (`PreTrainedModel`, `str` or `os.PathLike`, *optional*): the base to take instead.
        processor (*optional*): needed with a loaded base.
        download, kwargs (`dict`): see [`load_base`].

    Raises:
        ValueError, OSError: no base is named, it is not found, or a stranger's adapter names a local path.
    """
    if base_model is not None and not isinstance(base_model, (str, os.PathLike)):
        get_family(base_model)
        if processor is None:
            raise ValueError("with a loaded `base_model`, pass its `processor` too.")
        if kwargs:
            raise TypeError(f"the base is loaded already, so {', '.join(kwargs)} has no use: leave it out.")
        return base_model, processor
    base_name = base_of(config, name) if base_model is None else os.fspath(base_model)
    source = {**download, **({"revision": config.revision} if config.revision and not base_model else {})}
    try:
        return load_base(base_name, processor, source, kwargs)
    except OSError as error:
        raise OSError(
            f"the base model {base_name!r} of the adapter {name!r} could not be loaded ({error}). If it lies "
            "elsewhere now, pass `base_model=` with its folder or Hub id."
        ) from error

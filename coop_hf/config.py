"""What one adapter is: dataclasses that read and write `adapter_config.json`, one for each method."""

import dataclasses
import importlib
import json
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from .checks import check_class_names, check_text, is_int, shown
from .hub import find_file
from .version import __version__


__all__ = [
    "ADAPTER_CONFIG_NAME",
    "ADAPTER_WEIGHTS_NAME",
    "CLASS_TOKEN_POSITIONS",
    "CONFIGS",
    "FORMAT_VERSION",
    "CoOpConfig",
    "PromptConfig",
]

ADAPTER_CONFIG_NAME = "adapter_config.json"

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

# In every file, for programs that take it for an adapter of PEFT: they look the value up, and it is what they print.
PEFT_TYPE = "COOP_HF (no adapter of PEFT: load it with coop_hf.CoOpModel.from_pretrained)"

_Config = TypeVar("_Config", bound="PromptConfig")

# Of CoOp's files, as since the first release; the other methods came with version 2, which names the method.
FORMAT_VERSION = 1

METHODS_FORMAT_VERSION = 2

CLASS_TOKEN_POSITIONS = ("end", "middle", "front")

# Bounds on what a stranger's file may ask for; far above any real adapter (ImageNet-21k has 21,841 classes).
MAX_CONFIG_BYTES = 64 * 2**20

MAX_CONTEXT_TOKENS = 4096

CONFIGS: dict[str, type["PromptConfig"]] = {}  # method -> its configuration


def read_json(path: str | os.PathLike[str]) -> Any:
    """The values of one `adapter_config.json`, not yet looked at.

    Raises:
        ValueError: the file is larger than 64 MiB, is not JSON, or nests too deeply.
    """
    size = os.path.getsize(path)
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a configuration has at most {MAX_CONFIG_BYTES:,}.")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ValueError(f"{path} is not a readable adapter configuration: {reason}.") from None
    return values


@dataclass(kw_only=True)
class PromptConfig:
    """What the configurations of all methods share. Each method has a subclass, registered by its name:

        @dataclass
        class CoCoOpConfig(CoOpConfig, method="cocoop"): ...

    `PromptConfig.from_pretrained`, `from_json_file` and `from_dict` give the class that the key `"method"` names;
    without the key, `CoOpConfig`.

    Args:
        class_names (`list[str]`, *optional*):
            The classes. Where nothing that was learned belongs to a class, the list may be replaced at any time.
        template (`str`, *optional*, defaults to `"a photo of a {}."`):
            The hand-written prompt that stands in while the adapter is disabled; `{}` is the class name.
        base_model_name_or_path (`str`, *optional*):
            The model under the adapter: Hub id or local folder. Filled in by the model.
        revision (`str`, *optional*):
            Revision of the base model on the Hub.
        original_crop (`bool`, *optional*, defaults to `False`):
            Whether images are cropped for prediction as in the public CoOp code, which for some sizes is one pixel
            aside (see `coop_hf.data.transforms.eval_transform`). Checkpoints of the public codes set it.
        format_version (`int`, *optional*, defaults to 1 for CoOp and 2 for other methods):
            Version of the file format.
        coop_hf_version (`str`, *optional*, defaults to this version):
            Version of the library that wrote the adapter.

    Raises:
        ValueError: a value of the wrong type or out of range; says what was given and what is expected.
    """

    class_names: list[str] | None = None
    template: str = "a photo of a {}."
    base_model_name_or_path: str | None = None
    revision: str | None = None
    original_crop: bool = False
    format_version: int = None  # type: ignore[assignment]  # the method's own, filled in below
    coop_hf_version: str = field(default=__version__)

    method: ClassVar[str] = ""
    cuts_words: ClassVar[bool] = (
        False  # whether `ctx_init` may have more tokens than `n_ctx`: the first ones are taken
    )
    # Read by the pipelines of transformers 5.4.
    _commit_hash: ClassVar[str | None] = None
    # Read by transformers.Trainer: what `evaluate` and `predict` don't collect.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["text_embeds", "image_embeds"]

    def __init_subclass__(cls, method: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method is None:  # a class of one's own for a method that is there
            return
        if method in CONFIGS and CONFIGS[method].__qualname__ != cls.__qualname__:
            raise ValueError(
                f"the method {method!r} has a configuration, {CONFIGS[method].__name__}: take another name."
            )
        cls.method = method
        CONFIGS[method] = cls  # also when a decorator such as `dataclass(slots=True)` makes the class a second time

    def __post_init__(self) -> None:
        if self.class_names is not None:
            self.class_names = check_class_names(self.class_names)
        check_text("template", self.template, 'Pass something like "a photo of a {}."', optional=False)
        if self.template.count("{}") != 1:
            raise ValueError(
                f"`template` must contain `{{}}` exactly once, where the class name goes, got {shown(self.template)}."
            )
        if not isinstance(self.original_crop, bool):
            raise ValueError(f"`original_crop` must be True or False, got {shown(self.original_crop)}.")
        check_text("base_model_name_or_path", self.base_model_name_or_path)
        check_text("revision", self.revision)
        check_text("coop_hf_version", self.coop_hf_version, optional=False)
        known = FORMAT_VERSION if self.method == "coop" else METHODS_FORMAT_VERSION
        if self.format_version is None:
            self.format_version = known
        if not is_int(self.format_version) or self.format_version < 1:
            raise ValueError(f"`format_version` must be a positive whole number, got {shown(self.format_version)}.")
        if self.format_version > known:
            raise ValueError(
                f"this adapter has format version {shown(self.format_version)}, and coop_hf {__version__} reads up "
                f"to {known}: upgrade coop_hf."
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain Python values: with its `"method"` unless it is CoOp's, `original_crop` only
        where it is true, as of before it came, and a `"peft_type"` that tells PEFT whose adapter this is."""
        values = {**dataclasses.asdict(self), **({} if self.method == "coop" else {"method": self.method})}
        values["peft_type"] = PEFT_TYPE
        if not self.original_crop:
            del values["original_crop"]
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `adapter_config.json` (sorted keys, indent 2) into `save_directory`, which is made if missing."""
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, ADAPTER_CONFIG_NAME), "w", encoding="utf-8") as file:
            file.write(self.to_json())

    def to_json(self) -> str:
        """The text of `adapter_config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_json_string(self) -> str:
        """The configuration as JSON, under the name that the trackers of transformers ask for."""
        return self.to_json()

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """Makes a configuration from plain values. Unknown keys are dropped with a warning that names them.

        Raises:
            ValueError: a method that is not known, or another than this class reads; a configuration of PEFT; or a bad
                value.
        """
        if not isinstance(values, dict):
            raise ValueError(f"an adapter configuration must be a JSON object, got {type(values).__name__}.")
        peft_type = values.get("peft_type")
        is_ours = peft_type is None or str(peft_type).startswith("COOP_HF")
        if not is_ours and not {"n_ctx", "method"} & set(values):
            raise ValueError(
                f"this is an adapter of PEFT, of the type {shown(peft_type)}, and none of coop_hf: load it with "
                "`peft.PeftModel.from_pretrained(base, ...)`. On a base that PEFT has wrapped a prompt can be "
                "learned: `CoOpModel(base, processor=...)`."
            )
        method = values.get("method", "coop")
        if method not in ("coop", *CONFIGS):
            importlib.import_module(
                f"{__package__}.adapters"
            )  # the methods register themselves when they are imported
        if not isinstance(method, str) or method not in CONFIGS:
            raise ValueError(
                f"this adapter is of the method {shown(method)}, and coop_hf {__version__} knows "
                f"{', '.join(map(repr, sorted(CONFIGS)))}: upgrade coop_hf."
            )
        kind = cls if cls.method == method else CONFIGS[method]
        if not issubclass(kind, cls):
            raise ValueError(
                f"this adapter is of the method {method!r}, and {cls.__name__} is for {cls.method!r}: read it with "
                f"{kind.__name__}, or with PromptConfig, which takes any."
            )
        known = {f.name for f in dataclasses.fields(kind)}
        known |= {"method", "peft_type"} if is_ours else {"method"}
        unknown = sorted(str(key)[:80] for key in values if key not in known)
        if unknown:
            more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
            warnings.warn(
                f"Unexpected keys in the adapter configuration are ignored: {', '.join(unknown[:20])}{more}. They may "
                "come from a newer version of coop_hf, or from another kind of adapter.",
                stacklevel=2,
            )
        return kind(**{key: value for key, value in values.items() if key in known - {"method", "peft_type"}})

    @classmethod
    def from_json_file(cls: type[_Config], path: str | os.PathLike[str]) -> _Config:
        """Reads one `adapter_config.json`.

        Raises:
            ValueError: the file see `read_json`, or a bad value.
        """
        return cls.from_dict(read_json(path))

    @classmethod
    def from_pretrained(
        cls: type[_Config], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> _Config:
        """Reads the configuration of an adapter from a local folder, the cache or the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Local folder or Hub id of an adapter.
            kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.
        """
        return cls.from_json_file(find_file(pretrained_model_name_or_path, ADAPTER_CONFIG_NAME, **kwargs))


@dataclass
class CoOpConfig(PromptConfig, method="coop"):
    r"""Configuration of one CoOp adapter (Context Optimization, https://arxiv.org/abs/2109.01134, section 3.2).

    The prompt of a class is `[SOS] [V]1 ... [V]M [CLASS] . [EOS]`, with M learnable context vectors `[V]`.

    Args:
        n_ctx (`int`, *optional*):
            Number of context tokens M. `None` becomes 16, or with `ctx_init` the number of its BPE tokens.
        class_token_position (`str`, *optional*, defaults to `"end"`):
            Where the class name stands: `"end"` (after all context tokens), `"middle"` (after the first
            ⌊M/2⌋ of them) or `"front"` (before all of them).
        class_specific (`bool`, *optional*, defaults to `False`):
            `False`: one unified context `(n_ctx, dim)` for all classes. `True`: one for each class,
            `(num_classes, n_ctx, dim)` (CSC in the paper), which belongs to its list of classes.
        ctx_init (`str`, *optional*):
            Words that the context starts from, for example `"a photo of a"`, counted in BPE tokens. With fewer
            tokens than `n_ctx` they take the last slots and the slots before them start from noise. `None`
            draws every vector from N(0, 0.02²).
        merge_full_stop (`bool`, *optional*, defaults to `False`):
            In the middle and in front, whether a token that covers the end of the name and the full stop, such as
            ")." in "kite (bird).", counts to the name, as in the public code. `False`: name and full stop are encoded
            apart. Imported checkpoints set it; in files it stands only where it is true.
        class_names, template, base_model_name_or_path, revision, format_version, coop_hf_version: by name only, see
            `PromptConfig`.

    Raises:
        ValueError: a value of the wrong type or out of range; says what was given and what is expected.
    """

    n_ctx: int | None = None
    class_token_position: str = "end"
    class_specific: bool = False
    ctx_init: str | None = None
    merge_full_stop: bool = False

    def __post_init__(self) -> None:
        if self.n_ctx is None and self.ctx_init is None:
            self.n_ctx = 16
        if self.n_ctx is not None and (not is_int(self.n_ctx) or not 1 <= self.n_ctx <= MAX_CONTEXT_TOKENS):
            raise ValueError(
                f"`n_ctx` must be a whole number from 1 to {MAX_CONTEXT_TOKENS} (the paper uses 4, 8 and 16), "
                f"got {shown(self.n_ctx)}."
            )
        if self.class_token_position not in CLASS_TOKEN_POSITIONS:
            raise ValueError(
                f"`class_token_position` must be one of {', '.join(map(repr, CLASS_TOKEN_POSITIONS))}, "
                f"got {shown(self.class_token_position)}."
            )
        for name in ("class_specific", "merge_full_stop"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {shown(getattr(self, name))}.")
        check_text("ctx_init", self.ctx_init, 'Pass words such as "a photo of a", or None for random vectors.')
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain Python values; `merge_full_stop` only where it is true, as of before it came."""
        values = super().to_dict()
        if not self.merge_full_stop:
            del values["merge_full_stop"]
        return values

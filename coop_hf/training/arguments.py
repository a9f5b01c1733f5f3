"""`CoOpTrainingArguments`: transformers' `TrainingArguments` with recipes for each method and objective."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._triton import has_triton
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from .objectives import get_objective, scaled_class_weights
from .optimizers import TensorAdam
from .processes import prepare_processes


__all__ = [
    "CoOpTrainingArguments",
    "PAPER_RECIPES",
    "PAPER_WARMUP_LR",
    "RECIPES",
    "fast_learning_rate",
    "fast_shots",
    "fast_steps",
    "fast_stretch",
    "get_recipe",
    "paper_epochs",
]

# What a recipe sets where the user has set nothing.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 2e-3,
        "weight_decay": 5e-4,
        "batch_size": 32,
        "num_train_epochs": None,  # by number of shots
    },
    "fast": {
        "optim": "adamw_torch",
        "variant": "tensor_adam",
        "learning_rate": None,  # by `rates`, see fast_learning_rate
        "rates": (0.05, 0.05),
        "weight_decay": 0.0,
        "batch_size": 16384,
        "max_steps": 200,  # from 16 shots on, see fast_steps
    },
}

# What the official code of a method, or of a method with an objective, has other than CoOp's.
PAPER_RECIPES: dict[str | tuple[str, str], dict] = {
    "cocoop": {"batch_size": 1, "num_train_epochs": 10},
    "deep_text": {"batch_size": 4, "learning_rate": 2.5e-3, "num_train_epochs": 5},
    "vpt": {"batch_size": 4, "learning_rate": 2.5e-3, "num_train_epochs": 5},
    "ivlp": {"batch_size": 4, "learning_rate": 3.5e-3, "num_train_epochs": 5},
    "maple": {"batch_size": 4, "learning_rate": 3.5e-3, "num_train_epochs": 5},
    "tcp": {"optim": "adamw_torch", "variant": "adam_l2", "adam_epsilon": 1e-3, "num_train_epochs": 50},
    ("coop", "kgcoop"): {"batch_size": 128, "num_train_epochs": 100},
    ("ivlp", "promptsrc"): {
        "learning_rate": 2.5e-3,
        "num_train_epochs": 20,
        "average_mean": 15.0,
        "average_std": 1.0,
    },
}

# Of the fast recipe, what a method, or a method with an objective, has of its own.
FAST_RECIPES: dict[str | tuple[str, str], dict] = {
    ("coop", "cross_entropy"): {"max_steps": 360, "rates": (0.05, 0.2), "knows_contexts": True},
    "cocoop": {"batch_size": 8},  # all images in a step would be too much: class embeddings for each
}

# Optimizers that transformers has no name for, which take the values of its "adamw_torch".
VARIANTS: dict[str, tuple[type[torch.optim.Optimizer], str]] = {
    "adam_l2": (torch.optim.Adam, "adam with weight decay in the gradient"),
    "tensor_adam": (TensorAdam, "adam with one second moment for a tensor"),
}

# Methods whose own loss is not cross-entropy.
METHOD_OBJECTIVES = {"clap": "clap", "tcp": "kgcoop"}

# Compiling takes as long as some thousands of steps.
MIN_COMPILED_STEPS = 5000

PAPER_WARMUP_LR = 1e-5  # constant during the first epoch


def paper_epochs(num_shots: int, num_classes: int) -> int:
    """Epochs of the paper's recipe: 50 for 1 shot, 100 for 2 to 4, 200 for more; from 1,000 classes on always 50."""
    if num_classes >= 1000 or num_shots <= 1:
        return 50
    return 100 if num_shots <= 4 else 200


def fast_stretch(n_ctx: int | None) -> float:
    """How much further a context that all classes share goes with few shots if it is shorter than the usual 16
    vectors: √(16 / n_ctx). Few vectors learn little by heart, and go further for the same.

    Args:
        n_ctx (`int`, *optional*): its vectors; `None`: class-specific contexts.
    """
    return 1.0 if n_ctx is None else max(1.0, (16 / n_ctx) ** 0.5)


def fast_shots(num_shots: float, num_classes: int, n_ctx: int | None = 16) -> float:
    """Shots that `fast_steps` and `fast_learning_rate` go by: if more than 60 classes share a context, each 15 of
    those above 60 count as a shot more, since what they share is learned from the images of all of them.

    Args:
        num_shots (`float`): training images of a class.
        num_classes (`int`): classes.
        n_ctx (`int`, *optional*, defaults to 16): as of `fast_stretch`; `None`, class-specific contexts: the shots.
    """
    return num_shots if n_ctx is None else num_shots + max(0, num_classes - 60) / 15


def _few_to_many(n_ctx: int | None) -> tuple[int, int]:
    """Up to how many shots they are few, and from how many on many: contexts of each class bear a longer training
    sooner."""
    return (4, 12) if n_ctx is None else (8, 16)


def fast_steps(
    num_shots: float, most: int = FAST_RECIPES["coop", "cross_entropy"]["max_steps"], n_ctx: int | None = 16
) -> int:
    """Steps of the fast recipe: 8 and 12 for each shot up to 8, times `fast_stretch`, at most 2; from there on a line
    to `most` at 16. Class-specific: the line from 4 shots to 12.

    Few images are soon learned by heart. More of them bear more steps and need them.
    """
    span = _few_to_many(n_ctx)
    steps = min(2.0, fast_stretch(n_ctx)) * (8 + 12 * min(span[0], max(1.0, num_shots)))
    return min(most, round(float(np.interp(num_shots, span, (steps, most)))))


def fast_learning_rate(num_shots: float, rates: tuple[float, float], n_ctx: int | None = 16) -> float:
    """Learning rate of the fast recipe in units of the token embeddings' root mean square, since what is right depends
    on how large the values are that the context stands beside: the first of `rates` up to 2 shots, twice that (or the
    second, if it is less) from 4 to 8 shots, but at least `fast_stretch` times the first, and the second from 16 on;
    lines between them. Class-specific: the first up to 4 shots, the second from 12 on."""
    few, many = rates
    if n_ctx is not None:
        few = max(fast_stretch(n_ctx) * few, np.interp(num_shots, (2, 4), (few, min(2 * few, many))))
    return float(np.interp(num_shots, _few_to_many(n_ctx), (few, many)))


def get_recipe(recipe: str, method: str = "coop", objective: str | Callable = "cross_entropy") -> dict:
    """The values of a recipe for a method and an objective.

    Args:
        recipe (`str`): `"paper"` or `"fast"`.
        method (`str`, *optional*, defaults to `"coop"`): the adapter's method.
        objective (`str` or `Callable`, *optional*, defaults to `"cross_entropy"`): the objective.

    Returns:
        `dict`: names of arguments and their values; `batch_size` is the global batch.
    """
    values = dict(RECIPES[recipe])
    own = FAST_RECIPES if recipe == "fast" else PAPER_RECIPES
    values |= own.get(method, {})
    values |= own.get((method, objective), {}) if isinstance(objective, str) else {}
    if recipe == "paper":
        values["optim_args"] = "momentum=0.9" if values["optim"] == "sgd" else None
    return values


@dataclass
class CoOpTrainingArguments(TrainingArguments):
    """Arguments of a CoOp training: those of [`transformers.TrainingArguments`], with other defaults, and some more.

    Whatever is set here overrides the recipe. Loss and gradients are means over the global batch, whatever the number
    of processes and accumulation steps.

    Args:
        recipe (`str`, *optional*, defaults to `"fast"`):
            `"paper"`: https://arxiv.org/abs/2109.01134 as its code does it: SGD with learning rate 2e-3, momentum 0.9
            and weight decay 5e-4; batches of 32; 50, 100 or 200 epochs by number of shots (`paper_epochs`); a cosine
            that moves once an epoch after a first epoch at 1e-5; every epoch sees new augmented views, and test images
            are cropped as there (to the pixel; `predict` and `"fast"` crop as the base's own image processor does).
            `"fast"`: the same loss, all images at every step, 20 steps for 1 shot to 360 for 16 and more
            (`fast_steps`), [`TensorAdam`] with a cosine from a learning rate of 0.05 to 0.2 times the root mean square
            of the token embeddings (`fast_learning_rate`), on cached embeddings of the plain views. A context of
            fewer than 16 vectors that all classes share has more steps and a larger rate with few shots
            (`fast_stretch`), class-specific ones have 360 steps from 12 shots on. If more than 60 classes share a
            context, each 15 above 60 count as a shot more (`fast_shots`).
            Other methods and objectives than CoOp's: 200 steps at 0.05 for 16 and more.
            With another method or objective than CoOp's, `"paper"` is the official recipe of that one
            (`PAPER_RECIPES`).
        objective (`str` or `Callable`, *optional*, defaults to the method's own):
            What is lowered: `"cross_entropy"`, `"kgcoop"`, `"prograd"`, `"promptsrc"`, `"sigmoid"`, or a function
            `(output, labels, frozen, **kwargs) -> loss`; see `coop_hf.training.objectives`. `eval_loss` is always
            cross-entropy, or with `"sigmoid"` that, so that trainings compare.
        objective_kwargs (`dict` or JSON `str`, *optional*):
            Its keyword arguments, such as `{"weight": 4.0}`.
        average_mean, average_std (`float`, *optional*):
            At the end the weights become their mean over the ends of epochs 1, 2 ..., weighted by a Gaussian of this
            mean and standard deviation, in epochs, as in PromptSRC.
        num_shots (`int`, *optional*):
            Shots that the recipe's length goes by. Defaults to the images of the largest class for the paper's recipe,
            and to the mean over the classes for the fast one.
        cache_features (`bool`, *optional*, defaults to `True`):
            Whether image embeddings are computed once and kept, in memory and on disk.
        num_views (`int`, *optional*):
            With cached embeddings, how many augmented views of each training image, taken in turn by epochs; 0 is
            the plain view alone. Defaults to the number of epochs for the paper's recipe, which makes it exact, and
            to 0 for the fast one.
        augment (`bool`, *optional*):
            Without cached embeddings, whether training images are augmented. Defaults to the recipe's choice.
        feature_cache_dir (`str`, *optional*):
            Where embeddings are kept; defaults to `coop_hf` in the Hugging Face home.
        image_column (`str`, *optional*, defaults to `"image"`): column of the images.
        label_column (`str`, *optional*, defaults to `"label"`): column of the labels.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): `"raise"` or `"skip"` unreadable images.
        text_chunk_size (`int`, *optional*): see [`CoOpModel`].
        class_weights (`"balanced"`, `list[float]` or JSON `str`, *optional*):
            What an image's loss is multiplied by, for each class: numbers of at least 0 in the order of the class
            names, or `"balanced"`, which is 1 / the number of the class's training images. They are scaled so that
            their mean over the training images is 1, and the learning rate means what it meant. `eval_loss` goes
            without.
        balanced_sampling (`bool`, *optional*, defaults to `False`):
            Whether an epoch holds as many rows of each class: rows of small classes come again, those of large ones
            take turns from epoch to epoch. A function of seed and epoch alone.
        torch_compile (`bool`, *optional*):
            Whether training steps are compiled, on a GPU with CUDA graphs (`torch_compile_mode="reduce-overhead"`
            unless you name another). Defaults to doing so where it pays: one process on a CUDA device with Triton,
            cached embeddings, learned text prompts for a fixed list of classes, no `text_chunk_size`, and at least
            5,000 steps, since compiling takes as long as some thousands. What that gains on a GPU was not measured.
            Evaluation is not compiled.

    Raises:
        ValueError: an unknown recipe, or arguments that exclude each other.
    """

    recipe: str = field(default="fast", metadata={"help": "'paper' or 'fast'; sets what is not set otherwise."})
    objective: str | None = field(
        default=None,
        metadata={"help": "cross_entropy, kgcoop, prograd, promptsrc or sigmoid. Defaults to the method's own."},
    )
    objective_kwargs: dict | str | None = field(default=None, metadata={"help": "Its keyword arguments, as JSON."})
    average_mean: float | None = field(
        default=None, metadata={"help": "Average the weights over epochs around this one, by a Gaussian."}
    )
    average_std: float | None = field(default=None, metadata={"help": "The Gaussian's standard deviation, in epochs."})
    num_shots: int | None = field(default=None, metadata={"help": "Shots that the recipe's length goes by."})
    cache_features: bool = field(default=True, metadata={"help": "Compute image embeddings once and keep them."})
    num_views: int | None = field(
        default=None, metadata={"help": "Augmented views of each training image that are cached; 0: the plain view."}
    )
    augment: bool | None = field(
        default=None, metadata={"help": "Augment training images (without cached embeddings)."}
    )
    feature_cache_dir: str | None = field(default=None, metadata={"help": "Where image embeddings are kept."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    on_bad_image: str = field(default="raise", metadata={"help": "'raise' or 'skip' unreadable images."})
    text_chunk_size: int | None = field(
        default=None, metadata={"help": "Classes computed at a time; bounds memory for many classes."}
    )
    class_weights: list[float] | str | None = field(
        default=None, metadata={"help": "'balanced', or a weight of the loss for each class, as JSON."}
    )
    balanced_sampling: bool = field(default=False, metadata={"help": "As many rows of each class in an epoch."})

    torch_compile: bool | None = field(
        default=None, metadata={"help": "Compile training steps; by itself where it pays on a GPU."}
    )

    # Set by the recipe where they are None.
    num_train_epochs: float | None = field(default=None, metadata={"help": "Defaults to the recipe's."})
    learning_rate: float | None = field(default=None, metadata={"help": "Defaults to the recipe's."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Defaults to the recipe's batch, divided by the number of processes."}
    )
    optim: str | None = field(default=None, metadata={"help": "Defaults to the recipe's."})
    adam_epsilon: float | None = field(default=None, metadata={"help": "Defaults to the recipe's, else 1e-8."})
    weight_decay: float | None = field(default=None, metadata={"help": "Defaults to the recipe's."})
    lr_scheduler_type: str | None = field(default=None, metadata={"help": "Defaults to the recipe's cosine."})

    # Other defaults than TrainingArguments.
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images a device takes at a time."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0: don't."})
    logging_steps: float = field(default=0.1, metadata={"help": "Steps between logs; below 1 a share of all steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "NaN in the loss stops the training."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The data set's own columns are needed."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every context is used."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers to report to."})

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"`recipe` must be {' or '.join(map(repr, RECIPES))}, got {self.recipe!r}.")
        if self.on_bad_image not in ("raise", "skip"):
            raise ValueError(f"`on_bad_image` must be 'raise' or 'skip', got {self.on_bad_image!r}.")
        if self.num_views is not None and (not self.cache_features or self.num_views < 0):
            raise ValueError(
                f"`num_views` counts cached views and must be at least 0, with cache_features=True; got "
                f"num_views={self.num_views!r}, cache_features={self.cache_features}. Without cache use `augment`."
            )
        if self.augment is not None and self.cache_features:
            raise ValueError("`augment` is for cache_features=False; with cached embeddings set `num_views`.")
        if self.objective_kwargs is not None and isinstance(self.objective_kwargs, str):
            self.objective_kwargs = json.loads(self.objective_kwargs)
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            try:
                self.class_weights = json.loads(self.class_weights)
            except ValueError:
                raise ValueError(
                    f"`class_weights` must be 'balanced' or a list of numbers, got {self.class_weights!r}."
                ) from None
        if self.class_weights is not None and self.balanced_sampling:
            raise ValueError("`class_weights` and `balanced_sampling` correct the same thing twice: leave one out.")
        if self.objective is not None:
            self.get_objective()  # a wrong name or keyword is told now
        if (self.average_mean is None) != (self.average_std is None) or (self.average_std or 1) <= 0:
            raise ValueError(
                "`average_mean` and `average_std` describe one Gaussian: set both, the second above 0, or neither; "
                f"got {self.average_mean!r} and {self.average_std!r}."
            )
        # What is not set follows from the method, which only the trainer knows.
        names = ["optim", "optim_args", "learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs"]
        names += ["objective", "average_mean", "average_std"]
        self._taken = {name: None for name in names if getattr(self, name) is None}
        if self.optim is not None:
            self._taken.pop("optim_args", None)  # SGD's momentum is not handed to another optimizer
        self._take_recipe("coop")
        # The paper's schedule moves once an epoch, which no scheduler of transformers does.
        self.steps_by_epoch = self.lr_scheduler_type is None and self.recipe == "paper"
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "cosine"
        prepare_processes(self)
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin memory for
        self._take_cuda_graphs()

    def _take_recipe(self, method: str) -> dict:
        """Sets what the user has not, by the recipe of a method; returns the recipe."""
        own = METHOD_OBJECTIVES.get(method, "cross_entropy")
        objective: Any = own if "objective" in self._taken else self.objective
        recipe = get_recipe(self.recipe, method, objective)
        values = {"adam_epsilon": 1e-8, **recipe, "objective": objective}
        for name, taken in self._taken.items():
            if getattr(self, name) == taken:  # else somebody has set it since
                self._taken[name] = values.get(name)
                setattr(self, name, self._taken[name])
        self.variant = recipe.get("variant") if self.optim == self._taken.get("optim") else None
        return recipe

    def get_objective(self, counts: np.ndarray | None = None) -> Callable:
        """The objective with its keyword arguments, the label smoothing and the class weights.

        Args:
            counts (`np.ndarray`, *optional*): training images of each class; without, the weights are left out.
        """
        kwargs: dict[str, Any] = dict(self.objective_kwargs or {})  # type: ignore[arg-type]
        if self.label_smoothing_factor:
            kwargs["label_smoothing"] = self.label_smoothing_factor
        if self.class_weights is not None:
            kwargs["class_weights"] = None if counts is None else scaled_class_weights(self.class_weights, counts)
        return get_objective(self.objective or "cross_entropy", **kwargs)

    def to_dict(self) -> dict:
        """As of `TrainingArguments`; an objective that is a function by its name."""
        values = super().to_dict()
        if callable(values["objective"]):
            values["objective"] = getattr(values["objective"], "__qualname__", repr(values["objective"]))
        return values

    def complete(
        self,
        num_images: int,
        num_shots: int,
        num_classes: int,
        embedding_size: float,
        method: str = "coop",
        is_cached: bool | None = None,
        n_ctx: int | None = 16,
    ) -> None:
        """Fills in what depends on the method, the training set and the base.

        Args:
            num_images (`int`), num_shots (`int`), num_classes (`int`): of the training set.
            embedding_size (`float`): root mean square of the base's token embeddings.
            method (`str`, *optional*, defaults to `"coop"`): the adapter's method.
            is_cached (`bool`, *optional*, defaults to `cache_features`): whether training takes cached embeddings.
            n_ctx (`int`, *optional*, defaults to 16): vectors of a context that all classes share; `None`:
                class-specific ones.
        """
        recipe = self._take_recipe(method)
        self.optim = OptimizerNames(self.optim)
        if self.load_best_model_at_end and self.average_mean is not None:
            raise ValueError(
                "load_best_model_at_end takes one checkpoint, and `average_mean` a mean over epochs: leave one out."
            )
        shots = self.num_shots or num_images / num_classes
        if recipe.get("knows_contexts"):  # examined for CoOp's own objective
            shots = fast_shots(shots, num_classes, n_ctx)
        else:
            n_ctx = 16
        if self.learning_rate is None:
            self.learning_rate = fast_learning_rate(shots, recipe["rates"], n_ctx) * embedding_size
        if self.per_device_train_batch_size is None:
            is_cached = self.cache_features if is_cached is None else is_cached
            batch_size = recipe["batch_size"]
            if self.recipe == "fast" and not is_cached:
                batch_size = min(batch_size, 32)  # images don't fit in memory as their embeddings do
            accumulated = self.world_size * self.gradient_accumulation_steps * max(1, self.n_gpu)
            self.per_device_train_batch_size = max(1, -(-min(batch_size, num_images) // accumulated))
        if self.num_train_epochs is None:
            if self.recipe == "paper":
                self.num_train_epochs = paper_epochs(self.num_shots or num_shots, num_classes)
            else:
                self.num_train_epochs = 1.0  # steps count, see below
                if self.max_steps < 0:
                    self.max_steps = fast_steps(shots, recipe["max_steps"], n_ctx)

    def _take_cuda_graphs(self) -> None:
        if self.torch_compile and self.device.type == "cuda" and self.torch_compile_backend == "inductor":
            self.torch_compile_mode = self.torch_compile_mode or "reduce-overhead"

    def choose_compile(self, num_images: int, is_steady: bool) -> bool:
        """Decides on `torch_compile` where it was left open.

        Args:
            num_images (`int`): of the training set.
            is_steady (`bool`): whether each step is the same work on tensors that lie ready.

        Returns:
            `bool`: whether it was decided here that steps are compiled.
        """
        if self.torch_compile is not None:
            return False
        steps = self.max_steps
        if steps <= 0:
            batch_size = self.train_batch_size * self.gradient_accumulation_steps
            steps = int((self.num_train_epochs or 1) * max(1, num_images // batch_size))
        pays = is_steady and steps >= MIN_COMPILED_STEPS and self.text_chunk_size is None
        self.torch_compile = pays and self.device.type == "cuda" and self.world_size == 1 and has_triton()
        if self.torch_compile:
            self.torch_compile_backend = "inductor"
            self._take_cuda_graphs()
        return self.torch_compile

    def describe(self, num_steps: int) -> dict:
        """What a model card says of a training: `seed`, `hyperparameters` and `hardware`."""
        optimizer = VARIANTS[self.variant][1] if self.variant else OptimizerNames(self.optim).value
        values = {
            "recipe": self.recipe,
            "objective": self.to_dict()["objective"],
            "optimizer": f"{optimizer}{f' ({self.optim_args})' if self.optim_args else ''}",
            "learning rate": self.learning_rate,
            "weight decay": self.weight_decay,
            "images a step": self.train_batch_size * self.world_size * self.gradient_accumulation_steps,
            "steps": num_steps,
            "precision": "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32",
            "processes": self.world_size,
        }
        if self.class_weights is not None:
            values["class weights"] = self.class_weights
        if self.balanced_sampling:
            values["sampling"] = "balanced over classes"
        if self.average_mean is not None:
            values["weights"] = f"mean over epochs, Gaussian ({self.average_mean:g}, {self.average_std:g})"
        return {"seed": self.seed, "hyperparameters": values, "hardware": _hardware(self.device)}


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (one of {torch.cuda.device_count()})"
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"

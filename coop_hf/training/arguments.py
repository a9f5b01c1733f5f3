"""`CoOpTrainingArguments`: transformers' `TrainingArguments` with the defaults that a context needs."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


__all__ = ["CoOpTrainingArguments", "PAPER_WARMUP_LR", "RECIPES", "paper_epochs"]

# What a recipe sets where the user has set nothing.
RECIPES = {
    "paper": {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 2e-3,
        "weight_decay": 5e-4,
        "batch_size": 32,
    },
    "fast": {
        "optim": "adamw_torch",
        "optim_args": None,
        "learning_rate": None,  # FAST_LEARNING_RATE times the size of a token embedding
        "weight_decay": 0.0,
        "batch_size": 16384,
        "max_steps": 200,
    },
}
# Adam moves every value by about the learning rate, whatever the gradient's size: what is right depends on how large
# the values are that the context stands beside. In units of the token embeddings' root mean square; on the validation
# part of the emoji, accuracy is the same from 0.3 to 1.
FAST_LEARNING_RATE = 0.6

PAPER_WARMUP_LR = 1e-5  # constant during the first epoch


def paper_epochs(num_shots: int, num_classes: int) -> int:
    """Epochs of the paper's recipe: 50 for 1 shot, 100 for 2 to 4, 200 for more; from 1,000 classes on always 50."""
    if num_classes >= 1000 or num_shots <= 1:
        return 50
    return 100 if num_shots <= 4 else 200


@dataclass
class CoOpTrainingArguments(TrainingArguments):
    """Arguments of a CoOp training: those of [`transformers.TrainingArguments`], with other defaults, and some more.

    Whatever is set here overrides the recipe. Loss and gradients are means over the global batch, whatever the number
    of processes and accumulation steps.

    Args:
        recipe (`str`, *optional*, defaults to `"fast"`):
            `"paper"`: https://arxiv.org/abs/2109.01134 as its code does it: SGD with learning rate 2e-3, momentum 0.9
            and weight decay 5e-4; batches of 32; 50, 100 or 200 epochs by number of shots (`paper_epochs`); a cosine
            that moves once an epoch after a first epoch at 1e-5; every epoch sees new augmented views.
            `"fast"`: the same loss, all images at every step, Adam with a cosine over 200 steps from a learning rate
            of 0.6 times the root mean square of the token embeddings, on cached embeddings of the plain views.
        num_shots (`int`, *optional*, defaults to the largest class of the training set):
            Shots that the paper's number of epochs goes by.
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

    Raises:
        ValueError: an unknown recipe, or arguments that exclude each other.
    """

    recipe: str = field(default="fast", metadata={"help": "'paper' or 'fast'; sets what is not set otherwise."})
    num_shots: int | None = field(default=None, metadata={"help": "Shots that the paper's number of epochs goes by."})
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

    # Set by the recipe where they are None.
    num_train_epochs: float | None = field(default=None, metadata={"help": "Defaults to the recipe's."})
    learning_rate: float | None = field(default=None, metadata={"help": "Defaults to the recipe's."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Defaults to the recipe's batch, divided by the number of processes."}
    )
    optim: str | None = field(default=None, metadata={"help": "Defaults to the recipe's."})
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

    def __post_init__(self):
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
        recipe = RECIPES[self.recipe]
        if self.optim is None and self.optim_args is None:
            self.optim_args = recipe["optim_args"]
        for name in ("optim", "learning_rate", "weight_decay"):
            if getattr(self, name) is None:
                setattr(self, name, recipe[name])
        # The paper's schedule moves once an epoch, which no scheduler of transformers does.
        self.steps_by_epoch = self.lr_scheduler_type is None and self.recipe == "paper"
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "cosine"
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin memory for

    def complete(self, num_images: int, num_shots: int, num_classes: int, embedding_size: float) -> None:
        """Fills in what depends on the training set and the base: batch size, number of epochs, learning rate.

        Args:
            num_images (`int`), num_shots (`int`), num_classes (`int`): of the training set.
            embedding_size (`float`): root mean square of the base's token embeddings.
        """
        recipe = RECIPES[self.recipe]
        if self.learning_rate is None:
            self.learning_rate = FAST_LEARNING_RATE * embedding_size
        if self.per_device_train_batch_size is None:
            batch_size = recipe["batch_size"] if self.cache_features else min(recipe["batch_size"], 32)
            accumulated = self.world_size * self.gradient_accumulation_steps * max(1, self.n_gpu)
            self.per_device_train_batch_size = max(1, -(-min(batch_size, num_images) // accumulated))
        if self.num_train_epochs is None:
            if self.recipe == "paper":
                self.num_train_epochs = paper_epochs(self.num_shots or num_shots, num_classes)
            else:
                self.num_train_epochs = 1.0  # steps count, see below
                if self.max_steps < 0:
                    self.max_steps = recipe["max_steps"]

"""Learn prompts from a few labelled images, and compare them with a hand-written one.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --base_model openai/clip-vit-base-patch32 --dataset my_images --num_shots 4
    accelerate launch examples/train.py --method maple --recipe paper
    accelerate launch examples/train.py --method maple --objective kgcoop --n_ctx 4 --depth 2

Without arguments: CoOp on the small emoji CLIP and the emoji images that come with the repository, 16 shots. Each
method starts as in its official code, and every field of its configuration can be set; see docs/methods/README.md.
"""

import json
import os
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser, set_seed

from coop_hf import CoOpModel, CoOpTrainer, CoOpTrainingArguments, emoji_model_path
from coop_hf.adapters import ADAPTERS
from coop_hf.adapters.heads import Head
from coop_hf.data.feature_cache import embed_images
from coop_hf.data.labelled_images import LabelledImages
from coop_hf.experiments.commands import DataArguments, draw_train_and_test, run_command
from coop_hf.experiments.configs import add_field_arguments, check_fields, make_config


# For the embedded default, chosen on its validation part: the best of the templates that the protocols try, and CoOp's
# context.
EMOJI_TEMPLATE = "an emoji of a {}."
EMOJI_CONTEXT = {"class_specific": True, "n_ctx": 4}


@dataclass
class ModelArguments:
    """Which base model, and which method."""

    method: str = field(default="coop", metadata={"help": f"What is learned: {', '.join(ADAPTERS)}."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a CLIP-like model. Default: the embedded emoji CLIP."}
    )
    base_model_revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the Hub."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16, for the frozen base."})
    template: str | None = field(
        default=None, metadata={"help": 'Hand-written prompt to compare with. Default: "a photo of a {}."'}
    )


def make_model(args: ModelArguments, data: DataArguments, objective: str, fields: dict, names) -> CoOpModel:
    """The base model with a fresh adapter of the method."""
    template, words = args.template, "a photo of a"
    if data.is_emoji:
        template = template or EMOJI_TEMPLATE
        words = template.split("{}")[0].strip()
        plain = args.method == "coop" and objective == "cross_entropy"
        if plain and not fields.keys() & {"n_ctx", "class_specific", "ctx_init"}:
            fields = fields | EMOJI_CONTEXT
    name, revision = args.base_model or emoji_model_path(), args.base_model_revision
    base = CoOpModel.from_pretrained(name, revision=revision, dtype=args.dtype)
    num_layers = min(len(base.family.text_layers), len(base.family.vision_layers))
    shared = {"base_model_name_or_path": name, "revision": revision, "class_names": names}
    shared |= {"template": template} if template is not None else {}
    config = make_config(args.method, objective, fields, base.tokenizer, num_layers, words, **shared)
    return CoOpModel(base.get_base_model(), config, processor=base.processor)


def fit_head(model: CoOpModel, train, args: CoOpTrainingArguments) -> None:
    """What a head takes from the shots before it learns."""
    images = LabelledImages(train, model.image_processor, args.image_column, args.label_column, model.class_names)
    image_embeds = embed_images(model, images, cache_dir=args.feature_cache_dir, progress=False)[0]
    model.adapter.fit(image_embeds, images.labels, model.template_embeds())


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, CoOpTrainingArguments))
    field_names = add_field_arguments(parser)
    parser.set_defaults(num_shots=16, output_dir="coop_output", seed=1, save_strategy="no")
    method = parser.parse_known_args()[0].method
    is_head = issubclass(ADAPTERS.get(method, object), Head)
    if is_head:  # the recipe of the head, instead of one for prompts
        num_shots = parser.parse_known_args()[0].num_shots
        parser.set_defaults(**{"num_views": 0, **ADAPTERS[method].arguments(num_shots)})
    model_args, data_args, training_args, *more = parser.parse_args_into_dataclasses()
    fields = {name: value for given in more for name, value in vars(given).items() if name in field_names}
    check_fields(method, fields)
    if is_head and training_args.objective != "cross_entropy":
        raise ValueError(f"{method!r} is a head on image features and has its own objective: leave --objective out.")
    start = time.perf_counter()

    train, test = draw_train_and_test(
        data_args, training_args.num_shots, training_args.label_column, training_args.seed
    )
    set_seed(training_args.seed)
    names = data_args.read_class_names()
    if names is None and hasattr(train.features.get(training_args.label_column), "names"):
        names = train.features[training_args.label_column].names
    model = make_model(model_args, data_args, training_args.objective, fields, names)
    learns = True
    if is_head:
        fit_head(model, train, training_args)
        learns = bool(model.adapter.arguments(training_args.num_shots))
    own = {"train_dataset": train} if learns else {}
    trainer = CoOpTrainer(model=model, args=training_args, eval_dataset=test, **own)
    source = data_args.dataset or data_args.coop_split
    trainer.about = {"dataset": source or f"the embedded emoji images, style {data_args.style}"}
    if data_args.dataset is not None and not os.path.exists(data_args.dataset):
        trainer.about["dataset_id"] = data_args.dataset

    with model.disable_adapter():
        zero_shot = trainer.evaluate(metric_key_prefix="zero_shot")
    measured = {}
    if learns:
        measured = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
    learned = trainer.evaluate()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()

    if trainer.is_world_process_zero():
        results = {
            **zero_shot,
            **measured,
            **learned,
            "num_shots": training_args.num_shots,
            "seed": training_args.seed,
            "total_runtime": time.perf_counter() - start,
        }
        with open(os.path.join(training_args.output_dir, "all_results.json"), "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2, sort_keys=True)
        show(model, training_args, results, len(train), len(test))


def describe(model: CoOpModel) -> str:
    """What was learned, in a few words."""
    config = model.config
    if config.method == "coop":
        return f"{config.n_ctx} vectors" + (" for each class" if config.class_specific else "")
    return f"{config.method}, {sum(tensor.numel() for tensor in model.adapter.learned_state().values()):,} values"


def show(model: CoOpModel, args: CoOpTrainingArguments, results: dict, num_train: int, num_test: int) -> None:
    """The table at the end."""
    before, after = results["zero_shot_accuracy"], results["eval_accuracy"]
    what = "head" if isinstance(model.adapter, Head) else "prompt"
    rows = [
        (f'hand-written prompt "{model.config.template}"', f"{before:.1%}"),
        (f"learned {what} ({describe(model)}, {num_train} images)", f"{after:.1%}"),
        ("gain", f"{100 * (after - before):+.1f} points"),
        ("time to train", f"{results.get('train_runtime', 0.0):.1f} s"),
        ("time in all", f"{results['total_runtime']:.1f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    print(f"\nAccuracy on {num_test} test images, {len(model.class_names)} classes, seed {args.seed}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>12}")
    print(f"The learned {what} is in {args.output_dir}: CoOpModel.from_pretrained({args.output_dir!r})")


if __name__ == "__main__":
    run_command(main)

"""Learn a prompt from a few labelled images, and compare it with a hand-written one.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --base_model openai/clip-vit-base-patch32 --dataset my_images --num_shots 4

Without arguments: the small emoji CLIP and the emoji images that come with the repository, 16 shots.
"""

import json
import os
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser, set_seed

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, CoOpTrainingArguments, emoji_model_path
from coop_hf.experiments.commands import DataArguments, draw_train_and_test, run_command


# For the embedded default, chosen on its validation part: the best of the templates that the protocols try, and a
# context.
EMOJI_TEMPLATE = "an emoji of a {}."
EMOJI_CONTEXT = {"class_specific": True, "n_ctx": 4}


@dataclass
class ModelArguments:
    """Which base model, and which context."""

    base_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a CLIP model. Default: the embedded emoji CLIP."}
    )
    base_model_revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the Hub."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16, for the frozen base."})
    n_ctx: int | None = field(
        default=None,
        metadata={"help": "Context tokens. Default: 16, or those of --ctx_init; 4 on the embedded images."},
    )
    class_token_position: str = field(default="end", metadata={"help": "end, middle or front."})
    class_specific: bool | None = field(
        default=None,
        metadata={"help": "One context for each class. Default: one for all; on the embedded images one for each."},
    )
    ctx_init: str | None = field(default=None, metadata={"help": 'Words to start from, such as "a photo of a".'})
    template: str | None = field(
        default=None, metadata={"help": 'Hand-written prompt to compare with. Default: "a photo of a {}."'}
    )


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, CoOpTrainingArguments))
    parser.set_defaults(num_shots=16, output_dir="coop_output", seed=1, save_strategy="no")
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    start = time.perf_counter()

    train, test = draw_train_and_test(
        data_args, training_args.num_shots, training_args.label_column, training_args.seed
    )
    set_seed(training_args.seed)
    names = ("n_ctx", "class_token_position", "class_specific", "ctx_init")
    given = {name: getattr(model_args, name) for name in names if getattr(model_args, name) is not None}
    if data_args.is_emoji and not given.keys() & {"n_ctx", "class_specific", "ctx_init"}:
        given |= EMOJI_CONTEXT
    if model_args.template is not None:
        given["template"] = model_args.template
    elif data_args.is_emoji:
        given["template"] = EMOJI_TEMPLATE
    names = data_args.read_class_names()
    if names is None and hasattr(train.features.get(training_args.label_column), "names"):
        names = train.features[training_args.label_column].names
    model = CoOpModel.from_pretrained(
        model_args.base_model or emoji_model_path(),
        CoOpConfig(**given),
        class_names=names,
        revision=model_args.base_model_revision,
        dtype=model_args.dtype,
    )
    trainer = CoOpTrainer(model=model, args=training_args, train_dataset=train, eval_dataset=test)
    source = data_args.dataset or data_args.coop_split
    trainer.about = {"dataset": source or f"the embedded emoji images, style {data_args.style}"}
    if data_args.dataset is not None and not os.path.exists(data_args.dataset):
        trainer.about["dataset_id"] = data_args.dataset

    with model.disable_adapter():
        zero_shot = trainer.evaluate(metric_key_prefix="zero_shot")
    training = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    learned = trainer.evaluate()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()

    if trainer.is_world_process_zero():
        results = {
            **zero_shot,
            **training.metrics,
            **learned,
            "num_shots": training_args.num_shots,
            "seed": training_args.seed,
            "total_runtime": time.perf_counter() - start,
        }
        with open(os.path.join(training_args.output_dir, "all_results.json"), "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2, sort_keys=True)
        show(model, training_args, results, len(train), len(test))


def show(model: CoOpModel, args: CoOpTrainingArguments, results: dict, num_train: int, num_test: int) -> None:
    """The table at the end."""
    before, after = results["zero_shot_accuracy"], results["eval_accuracy"]
    vectors = f"{model.config.n_ctx} vectors" + (" for each class" if model.config.class_specific else "")
    rows = [
        (f'hand-written prompt "{model.config.template}"', f"{before:.1%}"),
        (f"learned prompt ({vectors}, {num_train} images)", f"{after:.1%}"),
        ("gain", f"{100 * (after - before):+.1f} points"),
        ("time to train", f"{results['train_runtime']:.1f} s"),
        ("time in all", f"{results['total_runtime']:.1f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    print(f"\nAccuracy on {num_test} test images, {len(model.class_names)} classes, seed {args.seed}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>12}")
    print(f"The learned prompt is in {args.output_dir}: CoOpModel.from_pretrained({args.output_dir!r})")


if __name__ == "__main__":
    run_command(main)

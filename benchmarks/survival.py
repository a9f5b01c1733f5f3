"""Trainings that are killed at random moments, also while they save, and resumed: each must end with the same bits.

python benchmarks/survival.py --kills 100
python benchmarks/survival.py --kills 20 --processes 2

One process is forked for each attempt from one that has everything loaded. Several run under torchrun's launcher; by
turns one of them is killed, whom the launcher follows with the others, or all at once, the launcher with them.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import IO

import torch
from common import WordTokenizer, make_base, report

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, CoOpTrainingArguments, EmbeddedImages
from coop_hf.files.adapter_files import read_adapter
from coop_hf.training.checkpoints import last_checkpoint, read_checkpoint


NAMES = ["cat", "dog", "sea lion"]
STEPS = 12
RECIPES = ("fast", "paper")


def linger_in_saves() -> None:
    """Stays longer in the middle of writing a checkpoint, so that more kills fall there."""
    real = CoOpTrainer._save_training_state

    def save(self: CoOpTrainer, folder: str) -> None:
        time.sleep(0.02)
        real(self, folder)
        time.sleep(0.02)

    CoOpTrainer._save_training_state = save  # type: ignore[method-assign]


def train(folder: str, recipe: str, slow: bool) -> None:
    """Goes on from the last checkpoint in `folder`, if there is one, and saves the end in `folder/final`."""
    os.dup2(2, 1)  # standard output is for the report
    if slow:
        linger_in_saves()
    base = make_base(size="tiny")
    torch.manual_seed(0)
    model = CoOpModel(base, CoOpConfig(n_ctx=4), NAMES, WordTokenizer())
    embeds = torch.randn(3, 17, base.config.projection_dim, generator=torch.Generator().manual_seed(0))
    args = CoOpTrainingArguments(
        folder,
        recipe=recipe,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = CoOpTrainer(model=model, args=args, train_dataset=EmbeddedImages(embeds, [i % 3 for i in range(17)]))
    with open(os.path.join(folder, f".pid-{args.process_index}"), "w") as file:
        file.write(str(os.getpid()))
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) is not None)
    trainer.save_model(os.path.join(folder, "final"))


def attempt(
    folder: str, recipe: str, slow: bool, kill_after: float | None, processes: int, rng: random.Random
) -> bool:
    """One attempt; whether it was killed, `kill_after` seconds after the start of the training itself.

    Raises:
        RuntimeError: it failed by itself.
    """
    os.makedirs(folder, exist_ok=True)
    marks = [os.path.join(folder, f".pid-{index}") for index in range(processes)]
    for mark in marks:
        if os.path.exists(mark):
            os.remove(mark)
    with tempfile.TemporaryFile() as errors:
        pid = _fork(folder, recipe, slow, processes, errors)
        killed, ended = False, 0
        if kill_after is not None:
            while not ended and not all(os.path.exists(mark) and os.path.getsize(mark) for mark in marks):
                time.sleep(0.005)
                ended, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(kill_after)
            if not ended:
                ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:  # else these numbers may be other processes'
                victims = [int(open(mark).read()) for mark in marks]
                victims = [rng.choice(victims)] if rng.random() < 0.5 else [*({pid} - {*victims}), *victims]
                for victim in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                        killed = True
        if not ended:
            status = os.waitpid(pid, 0)[1]
        if status and not killed:
            errors.seek(0)
            raise RuntimeError(f"the training failed: {errors.read().decode(errors='replace')[-3000:]}")
    return killed and status != 0


def _fork(folder: str, recipe: str, slow: bool, processes: int, errors: IO) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(errors.fileno(), 2)
        try:
            if processes > 1:
                _train_under_torchrun(folder, recipe, slow, processes)
            else:
                train(folder, recipe, slow)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def _train_under_torchrun(folder: str, recipe: str, slow: bool, processes: int) -> None:
    # What torchrun does for --standalone, but that its processes are forked and so need not import everything again.
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, train)(folder, recipe, slow)


def survive(folder: str, recipe: str, kills: int, processes: int, seed: int) -> dict:
    """Trains until `kills` attempts were killed, and looks at everything that they left."""
    rng = random.Random(seed)
    straight, run = os.path.join(folder, "straight"), os.path.join(folder, "run")
    attempt(straight, recipe, True, None, processes, rng)
    started = os.path.getmtime(os.path.join(straight, ".pid-0"))
    seconds = os.path.getmtime(os.path.join(straight, "final", "adapter_model.safetensors")) - started
    expected = read_adapter(os.path.join(straight, "final"))[1]
    files = sorted(os.listdir(os.path.join(straight, f"checkpoint-{STEPS}")))
    result = {"kills": 0, "kills_in_a_save": 0, "resumed_from_a_checkpoint": 0, "checkpoints_read_after_a_kill": 0}
    result |= {"trainings_ended": 0, "ended_with_other_bits": 0, "damaged_checkpoints": 0, "leftovers": 0}
    while result["kills"] < kills:
        shutil.rmtree(run, ignore_errors=True)
        # A moment anywhere in what is left of the training, or just behind it: then the attempt goes through.
        moment: float | None = rng.uniform(0.0, 1.1) * seconds
        reached, patience = 0, 1.0
        while attempt(run, recipe, rng.random() < 0.7, moment, processes, rng):
            names = os.listdir(run)
            checkpoints = [os.path.join(run, name) for name in names if name.startswith("checkpoint-")]
            steps = [int(name.split("-")[1]) for name in names if name.startswith("checkpoint-")]
            # A busy machine may take longer to resume than is left by this count: then later.
            patience = 1.0 if max(steps, default=0) > reached else 1.3 * patience
            reached = max(steps, default=0)
            moment = rng.uniform(0.0, 1.1 - reached / STEPS) * seconds * patience
            if "final" in names:  # killed while it ended: let it through
                moment = None
            result["kills"] += 1
            result["kills_in_a_save"] += any(name.startswith(".saving-") for name in names)
            result["resumed_from_a_checkpoint"] += bool(checkpoints)
            print(recipe, result["kills"], names, file=sys.stderr, flush=True)
            for checkpoint in checkpoints:
                result["checkpoints_read_after_a_kill"] += 1
                try:
                    assert sorted(os.listdir(checkpoint)) == files
                    read_checkpoint(checkpoint)
                    read_adapter(checkpoint)
                except (AssertionError, ValueError, OSError) as error:
                    print(f"{checkpoint}: {error}", file=sys.stderr)
                    result["damaged_checkpoints"] += 1
        found = read_adapter(os.path.join(run, "final"))[1]
        result["trainings_ended"] += 1
        print(recipe, "ended", flush=True, file=sys.stderr)
        result["ended_with_other_bits"] += not all(torch.equal(found[key], expected[key]) for key in expected)
        result["leftovers"] += len([name for name in os.listdir(run) if name.startswith(".saving-")])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared among the recipes")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    results = {}
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            share = -(-args.kills // len(args.recipes))
            results[recipe] = survive(folder, recipe, share, args.processes, args.seed)
    seconds = round(time.perf_counter() - start)
    report("survival", {"processes": args.processes, "seconds": seconds, "recipes": results})


if __name__ == "__main__":
    main()

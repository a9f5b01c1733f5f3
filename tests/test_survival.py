"""Killed at any moment and resumed, a training ends with the bits of one that was never killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


# Forks one child for each attempt from a process that has everything loaded, so that an attempt takes a moment.
DRIVER = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_trainer as t
from conftest import make_base, make_tokenizer
from coop_hf.files.adapter_files import read_adapter
from coop_hf.training.checkpoints import last_checkpoint
from coop_hf.training.trainer import CoOpTrainer

tokenizer = make_tokenizer()
base = make_base(tokenizer)
given = dict(recipe={recipe!r}, max_steps=12, per_device_train_batch_size=4, learning_rate=0.05,
             save_strategy="steps", save_steps=1, save_total_limit=3)


def train(folder, slow):
    if slow:  # stay longer in the middle of writing a checkpoint
        real = CoOpTrainer._save_training_state
        def save(self, path):
            time.sleep(0.02)
            real(self, path)
            time.sleep(0.02)
        CoOpTrainer._save_training_state = save
    trainer = CoOpTrainer(
        model=t.make_model(base, tokenizer), args=t.arguments(folder, **given), train_dataset=t.embedded(17, views=3)
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) is not None)
    trainer.save_model(folder + "/final")


def attempt(folder, slow, kill_after=None):
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, slow)
        except BaseException as error:
            print("child failed:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status), status, time.perf_counter() - start


folder = {folder!r}
killed, status, seconds = attempt(folder + "/straight", slow=True)
assert status == 0, status
expected = t.read_context(folder + "/straight/final")
rng = random.Random({seed})
kills = resumed = 0
while kills < {kills}:
    run = folder + "/run"
    shutil.rmtree(run, ignore_errors=True)
    done = False
    while not done:
        # Two moments in a training on average, anywhere in it; the last attempt may go through.
        was_killed, status, _ = attempt(run, rng.random() < 0.7, rng.uniform(0.1, 1.0) * seconds)
        kills += was_killed
        if not was_killed:
            assert status == 0, status
            done = True
        else:
            names = os.listdir(run) if os.path.isdir(run) else []
            steps = [int(name.split("-")[1]) for name in names if name.startswith("checkpoint-")]
            resumed += bool(steps)
            for step in steps:  # every checkpoint that is there is whole
                assert sorted(os.listdir(run + f"/checkpoint-{{step}}")) == t.CHECKPOINT_FILES, step
                read_adapter(run + f"/checkpoint-{{step}}")
    assert torch.equal(t.read_context(run + "/final"), expected)
    assert not [n for n in os.listdir(run) if n.startswith(".saving-")], os.listdir(run)
print("kills", kills, "resumed", resumed)
assert resumed >= {kills} // 4
"""


@pytest.mark.parametrize("recipe, seed", [("paper", 0), ("fast", 1)])
def test_killed_at_random_moments(tmp_path, recipe, seed):
    script = tmp_path / "driver.py"
    values = {"tests": str(Path(__file__).parent), "folder": str(tmp_path), "recipe": recipe, "seed": seed}
    script.write_text(DRIVER.format(kills=20, **values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]

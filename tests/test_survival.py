"""Killed at any moment and resumed, a training ends with the bits of one that was never killed."""

import pytest
from test_benchmarks import run


@pytest.mark.parametrize("recipe, seed", [("paper", 0), ("fast", 1)])
def test_killed_at_random_moments(recipe, seed):
    found = run("survival.py", "--kills", 20, "--recipes", recipe, "--seed", seed)["recipes"][recipe]
    assert found["kills"] >= 20 and found["resumed_from_a_checkpoint"] >= 5, found
    assert found["trainings_ended"] and found["checkpoints_read_after_a_kill"], found
    assert not found["ended_with_other_bits"] and not found["damaged_checkpoints"] and not found["leftovers"], found


@pytest.mark.slow
def test_two_processes_killed_at_random_moments():
    for found in run("survival.py", "--kills", 6, "--processes", 2)["recipes"].values():
        assert found["kills"] >= 3 and found["trainings_ended"], found
        assert not found["ended_with_other_bits"] and not found["damaged_checkpoints"], found

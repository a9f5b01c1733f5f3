"""Several processes on a machine without an accelerator, where launchers and transformers say nothing and do less."""

import os
from typing import Any

import torch
from transformers.utils import logging


__all__ = ["prepare_processes"]

logger = logging.get_logger(__name__)

# What launchers tell a process of its place: torchrun and accelerate, and the three MPIs that accelerate knows.
_RANKS = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_ONE_PROCESS = (
    "accelerate was asked for several processes and started one, which it does where it sees no GPU. For several on "
    "the CPU: `accelerate launch --multi_gpu --num_processes N ...` (that is how it is called there, too), or "
    "`torchrun --nproc_per_node N ...`."
)


def prepare_processes(args: Any) -> None:
    """Makes the processes of a launcher work together on a CPU too, and warns where there is only one.

    Without `use_cpu` transformers leaves each process alone where there is no accelerator: all of them would train the
    same, and write the same files.

    Args:
        args (`TrainingArguments`): before its own `__post_init__`, which makes the group of processes.
    """
    if args.use_cpu or not torch.accelerator.is_available():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
            args.use_cpu = True
        # `accelerate launch` sets the second where more than one process was asked for, and no rank if it starts one.
        elif {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and not any(
            name in os.environ for name in _RANKS
        ):
            logger.warning(_ONE_PROCESS)

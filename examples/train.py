"""`coop-hf train` as a script, for launchers: learn prompts from a few labelled images.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --base_model openai/clip-vit-base-patch32 --dataset my_images --num_shots 4
    accelerate launch examples/train.py --method maple --recipe paper
    accelerate launch examples/train.py --method maple --objective kgcoop --n_ctx 4 --depth 2

What it does is in `coop_hf/cli/train.py`.
"""

from coop_hf.cli.train import main
from coop_hf.experiments.commands import run_command


if __name__ == "__main__":
    run_command(main)

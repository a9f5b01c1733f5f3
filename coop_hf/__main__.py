"""`python -m coop_hf` is `coop-hf`."""

from .cli.main import main


if __name__ == "__main__":
    main()

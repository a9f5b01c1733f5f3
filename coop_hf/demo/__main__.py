"""`python -m coop_hf.demo`."""

import sys

from .app import main


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:  # what was named is not there, or not fit
        sys.exit(f"coop_hf.demo: {error}")

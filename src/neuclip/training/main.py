"""`python -m neuclip.training.main`: the entry point of published command lines."""

import sys

from neuclip.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""`python -m neuclip.evaluation.datacomp`: DataComp's door to `neuclip eval`."""

import sys

from neuclip.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))

"""`python -m neuclip.evaluation.datacomp`: `neuclip eval` for DataComp's command line."""

import sys

from neuclip.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))

"""`python -m neuclip`."""

import sys

from neuclip.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m neuclip`, and the command `neuclip`."""

import signal
import sys


def main() -> int:
    """Runs the command line; Ctrl-C while its modules load ends the process without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from neuclip.cli.app import main as run

    signal.signal(signal.SIGINT, before)
    return run()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m neuclip`, and the command `neuclip`."""

import signal
import sys


def main() -> int:
    """Runs the command line; Ctrl-C while its modules load ends the process without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from neuclip.cli.app import main as run

    signal.signal(signal.SIGINT, before)
    return run()


if __name__ == "__main__":
    sys.exit(main())

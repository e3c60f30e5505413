"""`python -m modular_concepts`: see cli/main.py."""

import os
import signal
import sys

if not __package__:  # started by its path, as which nothing in it finds the rest
    sys.exit(
        "error: this is no script; go into the folder that holds modular_concepts and run python -m modular_concepts"
    )

from . import before_torch  # noqa: E402, F401 - sets what torch reads when `cli` imports it


def main() -> int:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _stopped)
    from .cli.streams import Streams

    with Streams():
        try:
            os.getcwd()
        except FileNotFoundError:  # with which torch's libraries end the process
            sys.stderr.write("error: the folder that you are in was deleted; go into one that is there\n")
            return 2
        from .cli.main import main

        return main()


def _stopped(*_: object) -> None:
    """Ctrl-C, or another end, while everything is imported, of which some libraries would make a fault of their own."""
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())

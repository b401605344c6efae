"""The process of ``stackwise`` and ``python -m stackwise``; it answers signals before it imports anything large."""

import sys

from stackwise.signals import end_with_parent, leave_on_signal


def run() -> None:
    """The console entry point."""
    with leave_on_signal():
        end_with_parent()
        from stackwise.cli.main import main

        code = main()
    sys.exit(code)


if __name__ == "__main__":
    run()

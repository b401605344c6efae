"""``python -m stackwise``: the command line."""

from stackwise.cli.main import run

if __name__ == "__main__":
    run()

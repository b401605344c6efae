"""``stackwise COMMAND``: the table of commands, and what becomes an exit code.

A command is one function in a file of its own, registered below by one line. Its file imports only light things
at the top; what needs torch or the config is imported inside the function, so that help stays quick::

    # cli/train.py
    def train(config: Annotated[Path, typer.Argument(help="YAML file")], ...) -> None:
        '''Train as CONFIG says.'''
        from stackwise.runs.run import train_run
        train_run(...)

    # here
    app.command()(train.train)

It returns nothing and raises ``UserError``, ``RunError`` or ``StoppedBySignal``; ``main`` does the rest.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer

from stackwise import __version__
from stackwise.cli import (
    compare,
    demo,
    doctor,
    embed,
    eval,
    export,
    finetune,
    generate,
    import_,
    init,
    join,
    migrate,
    plan,
    recipes,
    report,
    resume,
    train,
)
from stackwise.config.legacy import OldKeyWarning
from stackwise.errors import INTERRUPTED, STOPPED, RunError, StoppedBySignal, UserError, out_of_memory

DONE, FAILED, WRONG_INPUT = 0, 1, 2

app = typer.Typer(
    name="stackwise",
    help="Train transformers from scratch, Stack by Stack, inside a memory budget.",
    epilog="Exit codes: 0 done; 1 failed while running; 2 the input is wrong (one line says what); 3 stopped by a "
    "signal (the last line says how to continue); 130 interrupted, with nothing to continue from.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"stackwise {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command(short_help="Grow a small model on text that every machine has.")(demo.demo)
app.command(epilog=init.EPILOG)(init.init)
app.command()(train.train)
app.command(short_help="Continue a run, where asked with other settings.")(resume.resume)
app.command(short_help="Train a run further on labelled texts.")(finetune.finetune)
app.command(short_help="Show what a run will take, before anything runs.")(plan.plan)
app.command(short_help="Train by several recipes at equal FLOPs, side by side.")(compare.compare)
app.command(short_help="List the named ways to train.")(recipes.recipes)
app.command(short_help="Write what became of a run as one HTML file.")(report.report)
app.command("eval")(eval.evaluate)
app.command(short_help="Write texts as vectors.")(embed.embed)
app.command()(generate.generate)
app.command(short_help="Write a run as a folder that transformers loads.")(export.export)
app.command("import", short_help="Bring a Hugging Face folder in as a run.")(import_.import_)
app.command(short_help="Join experts that were trained apart.")(join.join)
app.command(short_help="Rewrite configs of the first public versions.")(migrate.migrate)
app.command()(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's) and returns its exit code."""
    try:
        with _old_keys_as_notes():
            code = app(arguments, prog_name="stackwise", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        _say(_usage(error))
        return error.exit_code
    except UserError as error:
        _say(error)
        return WRONG_INPUT
    except RunError as error:
        _say(error)
        return FAILED
    except StoppedBySignal as error:
        _say(error)
        return STOPPED
    except BrokenPipeError:
        # The reader of our output is gone (`| head`). Python flushes again at exit: let it write nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _say("out of memory; a smaller model, batch or sequence takes less")
        return FAILED
    except OSError as error:
        _say(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error)
        return FAILED
    except SystemExit as error:  # typer's answer to a closed pipe
        return error.code if isinstance(error.code, int) else FAILED
    if code == INTERRUPTED:
        _say("interrupted")
    return code if isinstance(code, int) else DONE


def _say(message: object) -> None:
    print(f"stackwise: {' '.join(str(message).split())}", file=sys.stderr)


def _usage(error: typer.TyperException) -> str:
    """One line for a wrong command line, and where the right one is described."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "stackwise"
    return f"{error.format_message().rstrip('.')} (see {path} --help)"


@contextmanager
def _old_keys_as_notes() -> Iterator[None]:
    """Old config keys become one line each on stderr, once; other warnings stay as Python has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", OldKeyWarning)
        others = warnings.showwarning
        said: set[str] = set()

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, OldKeyWarning):
                others(message, category, filename, lineno, file, line)
            elif str(message) not in said:
                said.add(str(message))
                _say(f"note: {message}")

        warnings.showwarning = show
        yield

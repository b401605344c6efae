"""The command line's frame: what it imports, what it says, and its exit codes."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stackwise import __version__
from stackwise.cli.main import app, main
from stackwise.config.base import StackWiseConfig
from stackwise.errors import RunError, StoppedBySignal, UserError

HEAVY = ("torch", "numpy", "tokenizers", "transformers", "pyarrow", "datasets", "matplotlib", "tensorboard")
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_importing_the_package_asking_for_help_and_writing_a_config_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {d_modle: 3}")
    done = python(
        f"""
import sys, stackwise
def loaded(): return [name for name in {HEAVY} if name in sys.modules]
report = [("import stackwise", loaded())]
from stackwise.cli.main import main
for line in ("--help", "--version", "plan --help", "train --help", "init -", "plan " + sys.argv[1]):
    main(line.split(" "))
    report.append((line, loaded() + (["pydantic"] if line == "--help" and "pydantic" in sys.modules else [])))
print("REPORT", [entry for entry in report if entry[1]])
""",
        str(tmp_path / "bad.yaml"),
    )
    assert done.stdout.splitlines()[-1] == "REPORT []", done.stderr


def test_help_lists_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert {"demo", "init", "train", "resume", "plan", "eval", "generate", "doctor"} <= set(COMMANDS)
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert "..." not in out.split("Commands:")[1], "a command's first sentence is cut"
    assert "Exit codes: 0 done; 1 failed while running; 2 the input is wrong" in out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr().out
    main(["--help"])
    assert alone == capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: stackwise {name}")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stackwise {__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inti", "No such command 'inti'. Did you mean 'init'? (see stackwise --help)"),
        ("init --forse", "No such option: --forse (Possible options: --force, --preset) (see stackwise init --help)"),
        ("init a b", "Got unexpected extra argument(s) (b) (see stackwise init --help)"),
        ("plan", "Missing argument 'CONFIG' (see stackwise plan --help)"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr() == ("", f"stackwise: {message}\n")


BAD_CONFIGS = [
    ("model: {d_modle: 3}", [], "model.d_modle: unknown key; did you mean model.d_model?"),
    ("model: {d_model: '3'}", [], "model.d_model: '3' has the wrong type; must be a whole number"),
    ("model: {d_model: 0}", [], "model.d_model: 0 is out of range; must be at least 1"),
    ("model: {n_heads: 3}", [], "model.n_heads: 3 does not divide d_model (128)"),
    ("model: {n_heads: 4", [], "not valid YAML at line 1, column 19: expected ',' or '}', but got '<stream end>'"),
    ("", ["training.seed=-1"], f"training.seed: -1 is out of range; must be at least 0 and below {2**63}"),
]


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(("text", "overrides", "message"), BAD_CONFIGS)
def test_a_bad_config_is_one_line_and_exit_code_2(
    command: str, text: str, overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert main([command, str(file), *overrides]) == 2
    assert capsys.readouterr() == ("", f"stackwise: {file}: {message}\n")


def test_a_bad_config_ends_the_real_process_with_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {optimzer: {lr: 1}}")
    done = python("from stackwise.__main__ import run; run()", "train", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"stackwise: {file}: training.optimzer: unknown key; did you mean training.optimizer?\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("wrong\n  input"), 2, "wrong input"),
        (RunError("it failed"), 1, "it failed"),
        (StoppedBySignal("stopped; go on with stackwise resume x"), 3, "stopped; go on with stackwise resume x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/a"), 1, "runs/x/a: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_way_to_end_has_its_exit_code_and_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    (tmp_path / "c.yaml").write_text("{}")
    monkeypatch.setattr(StackWiseConfig, "from_dict", fail)
    assert main(["plan", str(tmp_path / "c.yaml")]) == code
    assert capsys.readouterr() == ("", f"stackwise: {line}\n")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    monkeypatch.setattr(StackWiseConfig, "from_dict", lambda *_: {}["no such key"])
    with pytest.raises(KeyError):
        main(["plan", str(tmp_path / "c.yaml")])


def test_an_old_key_is_one_note_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {n_blocks: 6, architecture: {n_stacks: 2}}\ndata: {path: x}")
    assert main(["plan", str(file)]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note == (
        "stackwise: note: model.n_blocks is deprecated; write model.architecture: {n_stacks: 2, blocks_per_stack: 3}"
    )
    assert error.startswith(f"stackwise: {file}: data.path:")


def test_deprecations_of_other_packages_are_not_for_the_user(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("{}")
    done = python(
        """
import warnings
from stackwise.__main__ import run
from stackwise.config.base import StackWiseConfig
from stackwise.config.legacy import OldKeyWarning
def read(*_):
    for category in (DeprecationWarning, OldKeyWarning, OldKeyWarning):
        warnings.warn_explicit(category.__name__, category, "elsewhere.py", 1, module="elsewhere")
    raise SystemExit(0)
StackWiseConfig.from_dict = read
run()
""",
        "plan",
        str(config),
    )
    assert done.stderr == "stackwise: note: OldKeyWarning\n"


@pytest.mark.parametrize("line", ["--help", "init -", "one-line"])
def test_a_reader_that_goes_away_ends_the_command_quietly(line: str) -> None:
    code = "from stackwise import __main__, cli; import stackwise.cli.main\n"
    code += "cli.main.app.command('one-line')(lambda: print('x')); __main__.run()"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=buffered,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1

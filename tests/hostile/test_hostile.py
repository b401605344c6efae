"""A few of the hostile cases, and the judge on commands that it must fail. ``make hostile`` runs all cases.

In a process of its own, which forks before any library has started threads.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = 150
"""One case in this many: some fifteen in all."""
JUDGED = """
import os, sys
from pathlib import Path
import stackwise.cli.main as cli
from hostile import judge

def fails(): raise KeyError("a traceback")
def writes_outside(): Path("../outside/thesis.txt").write_text("gone"); return 0
def says_nothing(): return 2
def leaves_a_file(): Path("left").write_text("x"); print("stackwise: wrong", file=sys.stderr); return 2
def takes_long():
    while True: pass
def takes_memory(): return len(bytearray(3 << 30)) * 0
def is_wrong(): print("7"); return 0
def is_right(): print("8"); return 0
def is_killed(): os.kill(os.getpid(), 9)

judge.SECONDS = 1
found = []
commands = (fails, writes_outside, says_nothing, leaves_a_file, takes_long, takes_memory, is_wrong, is_right, is_killed)
result = lambda inside, out: out.strip()
for command in commands:
    cli.main = lambda arguments, command=command: command()
    case = judge.Case(command.__name__, "", lambda inside: None, (), same_as="8", result=result)
    found.append((command.__name__, judge.judge(case, Path(sys.argv[1]) / command.__name__).problems))
print(found)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=500)


def test_the_judge_fails_what_it_must(tmp_path: Path) -> None:
    done = run("-c", JUDGED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == [
        ("fails", ["traceback"]),
        ("writes_outside", ["outside", "wrong"]),
        ("says_nothing", ["not one line"]),
        ("leaves_a_file", ["refused, yet left is changed"]),
        ("takes_long", ["slow"]),
        ("takes_memory", ["traceback"]),
        ("is_wrong", ["wrong"]),
        ("is_right", []),
        ("is_killed", ["slow"]),
    ]


@pytest.mark.timeout(600)
def test_a_sample_of_hostile_cases_is_answered() -> None:
    done = run("-m", "hostile", "--every", str(SAMPLE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "traceback 0, slow 0, memory 0, outside 0, wrong 0" in done.stdout

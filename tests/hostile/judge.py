"""Runs hostile cases, each in a forked child of a warm process, and judges what came of them.

A case is a folder with ``inside`` (the current folder of the command) and ``outside`` (another user's files). It fails
on a traceback, on more than 20 s of processor time or 2 GiB of memory, on any change of ``outside``, on an exit code
that does not fit, on an error of no line or of several, on a refusal that leaves files, and on a wrong result: damaged
input may be refused, or give what the undamaged input gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 20
"""Of the processor, that a case may take."""
WALL_SECONDS = 180
"""A busy machine may take longer, but a case that sleeps must end too."""
MEMORY = 2 << 30
"""Bytes that a case may hold."""
_CODES = frozenset((0, 1, 2, 3))


@dataclass(frozen=True)
class Case:
    """A command line in a folder that ``build`` fills.

    Args:
        name: says what is done to what.
        group: cases of one kind.
        build: fills ``inside``; ``outside`` is its neighbour.
        arguments: of ``stackwise``.
        codes: exit codes that fit.
        same_as: what the result must equal when the command succeeds; ``None``: any success is right.
        result: what is compared, from the folder and the standard output.
    """

    name: str
    group: str
    build: Callable[[Path], None]
    arguments: tuple[str, ...]
    codes: frozenset[int] = _CODES
    same_as: str | None = None
    result: Callable[[Path, str], str] | None = None


@dataclass
class Outcome:
    case: Case
    code: int | None
    seconds: float
    memory: int
    output: str
    errors: str
    problems: list[str] = field(default_factory=list)


def warm() -> None:
    """Imports all that a command needs, so that a forked child starts at once.

    It computes nothing: threads do not survive a fork.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import pkgutil
    from importlib import import_module

    import torch

    import stackwise

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(stackwise.__path__, "stackwise."):
        if not module.name.endswith(("__main__", "interop.lm_eval")) and ".remote." not in module.name:
            import_module(module.name)
    for name in ("torch._subclasses.fake_tensor", "torch.utils._python_dispatch", "torch.utils.flop_counter"):
        import_module(name)


def in_child(work: Callable[[], int | None], folder: Path, memory: int | None, seconds: int) -> tuple[int | None, Any]:
    """Runs ``work`` in a forked child with ``out`` and ``err`` in ``folder``; its exit code and its resources."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if memory is not None:
                mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
            result = work()
            code = result if isinstance(result, int) else 0
        except BaseException:  # noqa: BLE001 (this is what is looked for)
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + WALL_SECONDS
    pause = 0.002
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            break
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whatever it left running
    return (os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None), used


def stackwise(arguments: Sequence[str], inside: Path, log: Path, limits: bool = True) -> tuple[int | None, float, int]:
    """A command line in ``inside``: exit code (``None``: killed), seconds of the processor, most bytes held."""

    def work() -> int:
        from stackwise.cli.main import main

        os.chdir(inside)
        os.environ["HOME"] = str(inside / "home")
        for name in ("XDG_CACHE_HOME", "STACKWISE_CACHE", "HF_HOME"):
            os.environ.pop(name, None)
        os.environ["HF_HUB_OFFLINE"] = "1"
        return main(list(arguments))

    code, used = in_child(work, log, MEMORY if limits else None, SECONDS + 5 if limits else 600)
    return code, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def state_of(folder: Path) -> dict[str, str]:
    """Every name under ``folder``, with its kind and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        name = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
        if stat.S_ISLNK(mode):
            found[name] = f"link to {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = str(stat.S_IFMT(mode))
    return found


def judge(case: Case, folder: Path, keep: bool = False) -> Outcome:
    """Builds and runs one case in the new ``folder``."""
    inside, outside, log = (folder / name for name in ("inside", "outside", "log"))
    for made in (inside, outside, log):
        made.mkdir(parents=True)
    (outside / "thesis.txt").write_text("three years of work\n" * 100)
    (outside / "folder").mkdir()
    (outside / "folder" / "letter.txt").write_text("dear reader\n" * 50)
    case.build(inside)
    before, there = state_of(outside), state_of(inside)
    code, seconds, memory = stackwise(case.arguments, inside, log)
    output, errors = ((log / name).read_text(errors="replace") for name in ("out", "err"))
    outcome = Outcome(case, code, seconds, memory, output, errors)
    problems = outcome.problems
    if "Traceback (most recent call last)" in errors + output or code == 70:
        problems.append("traceback")
    if code is None or seconds > SECONDS:
        problems.append("slow")
    if memory > MEMORY:
        problems.append("memory")
    if state_of(outside) != before:
        problems.append("outside")
    if code is not None and code != 70 and code not in case.codes:
        problems.append("code")
    lines = [line for line in errors.splitlines() if line.startswith("stackwise: ") and "note:" not in line]
    if code in (1, 2) and "traceback" not in problems and (len(lines) != 1 or len(lines[0]) > 6000):
        problems.append("not one line")
    if code == 2 and not problems:
        after = state_of(inside)
        left = [name for name in after if name not in there and not _may_stay(name)]
        lost = [name for name in there if after.get(name) != there[name] and not _may_stay(name)]
        if left or lost:
            problems.append(f"refused, yet {(left + lost)[0]} is changed")
    if code == 0 and case.same_as is not None and case.result is not None:
        try:
            if case.result(inside, output) != case.same_as:
                problems.append("wrong")
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"wrong: no result ({error})")
    if not keep:
        shutil.rmtree(folder)
    return outcome


def _may_stay(name: str) -> bool:
    """Whether a refused command may leave this: locks, and the caches that any command may fill."""
    parts = name.split("/")
    return ".lock" in parts or parts[0] in ("home", "cache") or "owner.lock" in parts


def run(cases: Iterable[Case], work: Path, report: Callable[[str], None], keep: bool = False) -> list[Outcome]:
    """Judges ``cases`` one after another; tells about each that fails."""
    failed, total = [], Counter[str]()
    started = time.monotonic()
    for i, case in enumerate(cases):
        outcome = judge(case, work / f"{i:05}", keep)
        total["cases"] += 1
        total[f"exit {outcome.code}"] += 1
        total["seconds"] += round(outcome.seconds)
        for problem in outcome.problems:
            total[problem.split(":")[0].split(",")[0]] += 1
        if outcome.problems:
            failed.append(outcome)
            last = (outcome.errors.strip().splitlines() or [""])[-1]
            report(
                f"{case.group} | {case.name} | {' '.join(case.arguments)[:200]} | exit {outcome.code} | "
                f"{', '.join(outcome.problems)} | {outcome.seconds:.1f} s, {outcome.memory >> 20} MiB | {last[:300]}"
            )
        if (i + 1) % 100 == 0:
            report(f"-- {i + 1} cases, {len(failed)} failed, {time.monotonic() - started:.0f} s")
    counts = {key: total[key] for key in ("cases", "traceback", "slow", "memory", "outside", "wrong")}
    rest = {key: n for key, n in sorted(total.items()) if key not in counts}
    report("result: " + ", ".join(f"{key} {n}" for key, n in (counts | rest).items()))
    return failed

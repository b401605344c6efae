"""Kills and signals at random instants of every kind of work, which goes on each time and must end as if undisturbed.

    python tests/kill/harness.py --kills 300 --signals 200 --out DIR

A case is one piece of work that is hit one to six times and then left to end. Its weights, records and folder are
compared with those of the same work that nothing happened to. Half the instants are random times, the others random
calls that write: there a process is hit within the microseconds that a time rarely meets. Processes are forked from one
that has imported everything and made most plans, so that a case takes seconds. Cases are drawn from the seed; those in
``DIR/results.jsonl`` are not done again. The last line is JSON: cases, hits, and what was wrong. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = """
model: {d_model: 16, n_heads: 2, d_ff: 24, architecture: {n_stacks: 3, blocks_per_stack: 1}}
training:
  batch_size: 4
  seq_len: 13
  max_steps: 13
  schedule: {warmup_steps: 2, rewarmup_steps: 1}
  checkpoint: {every_steps: 2}
  evaluation: {max_tokens: 130}
  logging: {every_steps: 1}
  device: cpu
data: {source: files, tokenizer: {kind: characters}}
"""
LIMIT = 300
"""Seconds that one process may take on a busy machine."""
ORPHAN_SECONDS = 10
"""How long the processes of a dead one may take to notice."""
PROGRESSIVE = "training.progressive."
FROZEN = ["training.strategy=progressive", PROGRESSIVE + "trunk_strategy=frozen"]
TRAINED: dict[str, list[str]] = {
    "append": ["--recipe", "append-frozen-joint", "model.dropout=0.1"],
    "prepend": ["--recipe", "prepend-frozen"],
    "cached": ["--recipe", "append-cached"],
    "nf4 offloaded": [*FROZEN, PROGRESSIVE + "trunk_precision=nf4", "training.offload=disk"],
    "qlora": ["--recipe", "append-qlora"],
    "diffusion": [PROGRESSIVE + "training_objective=diffusion"],
    "mlm": [PROGRESSIVE + "training_objective=mlm", "data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=280"],
    "muon": ["training.optimizer.optimizer_type=muon"],
    "int8 in backward": [
        "training.optimizer.moments=int8", "training.optimizer.in_backward=true", "training.grad_clip=null",
    ],
    "accumulation": [
        "--recipe", "end-to-end-checkpointed", "training.micro_batch_size=2", "model.dropout=0.1",
    ],
    "sweep": ["--recipe", "block-coordinate"],
    "unfreezing": ["--recipe", "gradual-unfreezing", "training.optimizer.optimizer_type=sgd"],
    "best": [
        "training.keep_best=true", "training.evaluation.every_steps=1", "training.early_stopping.patience=2",
        "training.early_stopping.ends=phase",
    ],
    "from": ["--from", "{made}/base"],
}  # fmt: skip
BASE = [*FROZEN, "training.progressive.target_stacks=2", "training.max_steps=7"]
EXPERT = [*FROZEN, PROGRESSIVE + "training_objective=diffusion", PROGRESSIVE + "time_interpretation=depth",
          "model.architecture.n_stacks=2", "model.vocab_size=40", "training.max_steps=3"]  # fmt: skip
WEIGHTS = {**dict.fromkeys(TRAINED, 3), "export": 2, "import": 2, "join": 2, "compare": 1, "start": 2}
WHOLE = ("export", "import", "join")
"""Work that is there whole or not at all."""
CLOCK = {"seconds", "wall_seconds", "peak_memory_bytes", "tokens_per_second", "mfu", "memory_bytes"}


@dataclass(frozen=True)
class Hit:
    """What happens to a process: ``signals`` one after the other, at a time or at its n-th call that writes."""

    signals: tuple[signal.Signals, ...]
    seconds: float | None = None
    call: int | None = None


# One process.


def _writing_calls(hit: Hit | None, count: Path) -> Callable[[], None]:
    """Hits this process at one of its calls that write; returns what notes how many there were."""
    calls, owner = 0, os.getpid()

    def counted(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*rest: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if hit is not None and calls == hit.call and os.getpid() == owner:
                for which in hit.signals:
                    os.kill(owner, which)
            return inner(*rest, **options)

        return call

    for name in ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "fchmod", "ftruncate", "pwrite"):
        setattr(os, name, counted(getattr(os, name)))
    return lambda: print(calls, file=count.open("w"))


def _plan_key(config: Any, vocab_size: int, present: Sequence[int]) -> str:
    settings = {key: value for key, value in config.to_dict().items() if key != "data"}
    return json.dumps([settings, vocab_size, present], sort_keys=True)


def _planning(plans: Mapping[str, Any], note: Path) -> None:
    """Takes a run's plan from ``plans`` where it is among them, and notes of what it was made."""
    from stackwise.runs import limits

    inner = limits.plan_run

    def plan_run(config: Any, folder: Path, *, vocab_size: int, present: Sequence[int], **rest: Any) -> Any:
        note.write_text(json.dumps([config.to_dict(), vocab_size, present]))
        known = None if rest["given"] else plans.get(_plan_key(config, vocab_size, present))
        return known or inner(config, folder, vocab_size=vocab_size, present=tuple(present), **rest)

    limits.plan_run = plan_run


def spawn(arguments: Sequence[str], log: Path, hit: Hit | None, plans: Mapping[str, Any]) -> int:
    """``stackwise ARGUMENTS`` in a session of its own, forked from this process; its pid."""
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until the child has its handlers
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code: object = 99
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: what we began ends with us
        for number, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(log.with_suffix(suffix), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.argv = ["stackwise", *arguments]
        _planning(plans, log.with_suffix(".plan"))
        note = _writing_calls(hit, log.with_suffix(".calls"))
        from stackwise.__main__ import run

        try:
            run()
        except SystemExit as error:
            code = error.code or 0
        note()
        log.with_suffix(".modules").write_text("\n".join(sys.modules))
    except BaseException:  # noqa: BLE001 (a forked process must not go on as its parent does)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 98)


def ended(pid: int, limit: float) -> int | None:
    """The exit code of a child (minus the signal that killed it), None when it still runs after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def session(pid: int) -> list[int]:
    """The processes of the session that ``pid`` began."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(of) == pid and state != "Z":
                    found.append(int(entry.name))
    return found


def orphans(pid: int) -> int:
    """How many processes of a dead one live on; they are ended."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := session(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for other in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    return len(left)


# One kind of work.


def arguments_of(kind: str, work: Path, made: Path) -> list[str]:
    """The command that begins this work in the folder ``work``, or goes on with it."""
    out, cache = work / "out", f"data.cache_dir={work / 'cache'}"
    if kind in WHOLE:  # killed once it was in place, it is followed by another of its kind
        out = next(path for path in (out, *(work / f"another-{i}" for i in range(99))) if not path.exists())
    match kind:
        case "compare":
            small = ["training.max_steps=7", "--recipes", "append-frozen,end-to-end", "--json"]
            return [
                "compare",
                str(made / "config.yaml"),
                f"data.path={made / 'texts'}",
                cache,
                *small,
                "--out",
                str(out),
            ]
        case "export":
            return ["export", str(made / "base"), str(out)]
        case "import":
            return ["import", str(made / "folder"), str(out)]
        case "join":
            return ["join", str(made / "expert-0"), str(made / "expert-1"), "--out", str(out)]
    if (out / "config.yaml").exists():
        return ["resume", str(out)]
    settings = [setting.replace("{made}", str(made)) for setting in TRAINED.get(kind, TRAINED["append"])]
    return ["train", str(made / "config.yaml"), f"data.path={made / 'texts'}", cache, *settings, "--out", str(out)]


def outcome_of_run(run: Path) -> dict[str, Any]:
    """What of a finished run must not depend on what happened to it."""
    summary = json.loads((run / "summary.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = json.loads(max((run / "checkpoints").glob("step-*.json")).read_text())
    return {
        "weights_sha256": summary["weights_sha256"],
        "summary": {k: v for k, v in summary.items() if k not in CLOCK | {"phases"}},
        "phases": [{k: v for k, v in phase.items() if k not in CLOCK} for phase in summary["phases"]],
        "metrics": [{k: v for k, v in line.items() if k not in CLOCK} for line in metrics],
        "parts": newest["parts"],
    }


def outcome(kind: str, work: Path) -> dict[str, Any]:
    """What of finished work must not depend on what happened to it, and the names of all that it left."""
    out = work / "out"
    result: dict[str, Any] = {"names": names(work)}
    if kind in WHOLE:
        files = sorted(path for path in out.rglob("*") if path.is_file())
        result["files"] = {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        return result
    runs = [out / "append-frozen-seed-0", out / "end-to-end-seed-0"] if kind == "compare" else [out]
    return result | {"runs": [outcome_of_run(run) for run in runs]}


def names(work: Path) -> list[str]:
    """Every file and folder, but the checkpoints before the newest, which depend on when a run was stopped."""
    left = []
    for path in sorted(work.rglob("*")):
        relative = str(path.relative_to(work))
        if relative.startswith("another-"):
            continue
        if relative == "cache/hashes" or (path.parent.name == "hashes" and not path.name.startswith(".")):
            continue  # kept of texts that are some seconds old
        if path.parent.name == "checkpoints" and path.name.startswith("step-"):
            kept = sorted(path.parent.glob("step-*.json"))
            if len(kept) <= 2 and path != kept[-1]:
                continue
        if path.parent.name == "objects":
            manifests = [json.loads(file.read_text()) for file in path.parent.parent.glob("step-*.json")]
            if any(path.stem == part["object"] for manifest in manifests for part in manifest["parts"].values()):
                continue
        left.append(relative)
    return left


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Words for what is not as it must be."""
    problems = []
    if extra := set(found["names"]) - set(expected["names"]):
        problems.append(f"leftovers: {sorted(extra)}")
    if missing := set(expected["names"]) - set(found["names"]):
        problems.append(f"different: without {sorted(missing)}")
    for key in set(expected) - {"names"}:
        if expected[key] != found[key]:
            problems.append(f"different: {key}")
    return problems


# All of it.


class Harness:
    """``out`` holds the texts and runs that work is done on, its outcomes undisturbed, and the results."""

    def __init__(self, out: Path, seed: int, kinds: Sequence[str]) -> None:
        self.out, self.seed, self.kinds = out, seed, kinds
        self.made, self.results = out / "made", out / "results.jsonl"
        self.expected: dict[str, dict[str, Any]] = {}
        self.plans: dict[str, Any] = {}
        self.log = out / "log"
        self.modules = self.made / "modules.txt"

    def prepare(self) -> None:
        """Texts, runs to begin from, and the outcome of each kind of work that nothing happens to."""
        (self.made / "texts").mkdir(parents=True, exist_ok=True)
        self._import()
        draw = random.Random(11)
        words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(400)]
        for i in range(23):
            (self.made / "texts" / f"{i:02}.txt").write_text(" ".join(draw.choices(words, k=130)))
        (self.made / "config.yaml").write_text(CONFIG)
        if {"from", "export", "import"} & set(self.kinds):
            self._make("base", BASE)
        if "join" in self.kinds:
            self._make("expert-0", [*EXPERT, "training.diffusion.expert=0"])
            self._make("expert-1", [*EXPERT, "training.diffusion.expert=1", f"model.initial={self.made / 'expert-0'}"])
        if "import" in self.kinds and not (self.made / "folder").exists():
            self._undisturbed(["export", str(self.made / "base"), str(self.made / "folder")])
        for kind in self.kinds:
            file = self.made / f"{kind}.json"
            if not file.exists():
                work = self._empty("undisturbed")
                started = time.monotonic()
                # "start" is the work of "append", in processes that have imported nothing
                self._undisturbed(arguments_of(kind, work, self.made))
                life, calls = time.monotonic() - started, int(self.log.with_suffix(".calls").read_text())
                found = {"life": life, "calls": calls, "outcome": outcome(kind, work)}
                if kind in TRAINED:
                    found["plan"] = json.loads(self.log.with_suffix(".plan").read_text())
                file.write_text(json.dumps(found))
            self.expected[kind] = json.loads(file.read_text())
            if kind in TRAINED:
                self._plan(*self.expected[kind]["plan"])

    def _plan(self, settings: dict[str, Any], vocab_size: int, present: Sequence[int]) -> None:
        """Makes a plan once, for the processes that take it from here."""
        from stackwise.config.base import StackWiseConfig
        from stackwise.planning.plan import plan_run

        config = StackWiseConfig.from_dict(settings)
        plan = plan_run(config, self.made, vocab_size=vocab_size, present=tuple(present))
        self.plans[_plan_key(config, vocab_size, present)] = plan
        self._assert_no_threads()

    def _make(self, name: str, settings: Sequence[str]) -> None:
        out = self.made / name
        if not (out / "summary.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            data = [f"data.path={self.made / 'texts'}", f"data.cache_dir={self.made / 'cache'}"]
            self._undisturbed(["train", str(self.made / "config.yaml"), *data, *settings, "--out", str(out)])

    def _undisturbed(self, arguments: Sequence[str]) -> None:
        code = ended(spawn(arguments, self.log, None, {}), LIMIT)
        assert code == 0, f"{' '.join(arguments)}: {code}: {self.log.with_suffix('.err').read_text()}"
        self.modules.write_text(self.log.with_suffix(".modules").read_text())
        self._import()

    def _import(self) -> None:
        """What the last undisturbed process had imported, for those that are forked from this one."""
        for name in self.modules.read_text().splitlines() if self.modules.exists() else ():
            if name.partition(".")[0] in ("stackwise", "torch", "sympy", "numpy", "tokenizers", "safetensors", "rich"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        self._assert_no_threads()

    @staticmethod
    def _assert_no_threads() -> None:
        tasks = len(list(Path("/proc/self/task").iterdir()))
        assert threading.active_count() == tasks == 1, f"{tasks} threads; forked processes would lack them"

    def _empty(self, name: str) -> Path:
        work = self.out / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        return work

    def run(self, mode: str, hits: int) -> None:
        """Cases of ``mode`` (kills or signals) until each kind of work has its share of ``hits``."""
        done = self._done()
        total = sum(WEIGHTS[kind] for kind in self.kinds if (kind, mode) != ("start", "kills"))
        for kind in self.kinds:
            if (kind, mode) == ("start", "kills"):
                continue  # nothing is written before everything is imported
            wanted = -(-hits * WEIGHTS[kind] // total)
            had = sum(case["hits"] for case in done if (case["kind"], case["mode"]) == (kind, mode))
            index = sum((case["kind"], case["mode"]) == (kind, mode) for case in done)
            while had < wanted:
                case = {"kind": kind, "mode": mode, "index": index, **self.case(kind, mode, index, wanted - had)}
                with self.results.open("a") as file:
                    print(json.dumps(case), file=file)
                if case["problems"]:
                    print(json.dumps(case), file=sys.stderr, flush=True)
                had, index = had + case["hits"], index + 1
            print(f"{mode}  {kind}: {had}", file=sys.stderr, flush=True)

    def _done(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def case(self, kind: str, mode: str, index: int, most: int) -> dict[str, Any]:
        """One piece of work, hit a few times and then left to end."""
        draw = random.Random(f"{self.seed}/{kind}/{mode}/{index}")
        work = self._empty(f"work-{mode}")
        hits, problems = 0, []
        wanted = min(draw.randint(1, 6), most)
        life, calls = self.expected[kind]["life"], self.expected[kind]["calls"]
        for _ in range(20):
            plans = self.plans if draw.random() < 0.8 else {}  # a hit while it plans is wanted too
            # What is left of the work, about, so that most hits meet the process.
            hit = self._hit(kind, mode, draw, life / 2 if plans else life, calls) if hits < wanted else None
            importing = kind == "start" and hit is not None
            code, left = self._attempt(arguments_of(kind, work, self.made), hit, importing, plans)
            said = self.log.with_suffix(".err").read_text(errors="replace")
            problems += [f"orphans: {left}"] if left else []
            if any(word in said for word in ("Traceback", "Exception ignored", "Fatal Python", "terminate called")):
                problems.append(f"traceback: {said[-2000:]}")
            if code == 0:
                break
            if hit is None or code not in ((-signal.SIGKILL,) if mode == "kills" else (3, 130)):
                problems.append(f"refused: {code}: {said[-600:]}")
                break
            hits += 1
            life = max(life - 2 * (hit.seconds or 0), life / 4)
            calls = max(calls - (hit.call or 0), calls // 4)
            if mode == "signals" and not said.rstrip().rpartition("\n")[2].startswith("stackwise: "):
                problems.append(f"refused: {code} without its line: {said[-600:]}")
        else:
            problems.append("refused: 20 times not done")
        if not problems:
            problems = differences(self.expected[kind]["outcome"], outcome(kind, work))
        if problems:
            shutil.copytree(work, self.out / "kept" / f"{mode}-{kind}-{index}", symlinks=True, dirs_exist_ok=True)
        return {"hits": hits, "problems": problems}

    def _hit(self, kind: str, mode: str, draw: random.Random, life: float, calls: int) -> Hit:
        which = signal.SIGKILL if mode == "kills" else draw.choice((signal.SIGINT, signal.SIGTERM))
        signals = (which,) * (1 + (mode == "signals" and draw.random() < 0.2))
        if kind == "start":
            return Hit(signals, seconds=draw.uniform(0, 2))
        if draw.random() < 0.5:
            return Hit(signals, seconds=draw.uniform(0, life))
        return Hit(signals, call=draw.randint(1, calls))

    def _attempt(
        self, arguments: Sequence[str], hit: Hit | None, importing: bool, plans: Mapping[str, Any]
    ) -> tuple[int, int]:
        """(exit code, orphans) of one process."""
        with _started(arguments, self.log, hit, importing, plans) as pid:
            code = None if hit is None or hit.seconds is None else ended(pid, hit.seconds)
            if hit is not None and hit.seconds is not None and code is None:
                for which in hit.signals:
                    os.kill(pid, which)
                    time.sleep(0.01 if len(hit.signals) > 1 else 0)
            if code is None:
                code = ended(pid, LIMIT)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                ended(pid, LIMIT)
                raise SystemExit(f"{' '.join(arguments)}: still runs after {LIMIT} s")
            return code, orphans(pid)


@contextlib.contextmanager
def _started(
    arguments: Sequence[str], log: Path, hit: Hit | None, importing: bool, plans: Mapping[str, Any]
) -> Iterator[int]:
    """A forked process, or one that still has to import everything and already has its handlers."""
    if not importing:
        yield spawn(arguments, log, hit, plans)
        return
    with log.with_suffix(".err").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "stackwise", *arguments],
            stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip
    mask = 1 << (signal.SIGTERM - 1)
    with contextlib.suppress(FileNotFoundError):
        while not mask & int(Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0], 16):
            time.sleep(0.001)
    yield process.pid
    process.returncode = 0  # waited for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="SIGKILLs in all (default 300)")
    parser.add_argument("--signals", type=int, default=200, help="SIGINTs and SIGTERMs in all (default 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(WEIGHTS), help=f"of work (default all: {', '.join(WEIGHTS)})")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the results")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # sums of floats depend on it, and a process with threads cannot be forked
    kinds = options.kinds.split(",")
    started = time.monotonic()
    harness = Harness(options.out.resolve(), options.seed, kinds)
    harness.prepare()
    harness.run("kills", options.kills)
    harness.run("signals", options.signals)
    done = [case for case in harness._done() if case["kind"] in kinds]
    problems = [problem.partition(":")[0] for case in done for problem in case["problems"]]
    summary = {
        "kinds": len(kinds),
        "cases": len(done),
        **{mode: sum(case["hits"] for case in done if case["mode"] == mode) for mode in ("kills", "signals")},
        **{word: problems.count(word) for word in ("different", "orphans", "leftovers", "traceback", "refused")},
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(summary))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m hostile`` (``make hostile``): all hostile cases, and what came of them."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from hostile.cases import all_cases, prepare
from hostile.judge import run, state_of, warm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--only", default="", help="cases whose group and name contain this")
    parser.add_argument("--every", type=int, default=1, help="each so many cases (and every control)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the cases")
    options = parser.parse_args()
    started = time.monotonic()
    warm()
    work = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        base = prepare(work / "base")
        whole = state_of(base.folder)
        cases = [case for case in all_cases(base, options.seed) if options.only in f"{case.group} {case.name}"]
        controls = [case for case in cases if case.group == "control"]
        cases = controls + [case for case in cases if case.group != "control"][:: options.every]
        print(f"{len(cases)} cases, seed {options.seed}", flush=True)
        failed = run(cases, work / "cases", lambda line: print(line, flush=True), options.keep)
        if state_of(base.folder) != whole:
            print("a case changed the files that all cases share", flush=True)
            return 1
    finally:
        if options.keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{len(failed)} of {len(cases)} failed; {time.monotonic() - started:.0f} s on {os.uname().machine}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

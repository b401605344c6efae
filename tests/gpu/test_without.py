"""``make gpu`` where there is no GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available() or shutil.which("make") is None, reason="there is a GPU, or no make")
def test_make_gpu_says_in_one_line_that_there_is_none(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for stamp in (".stamp-venv", ".stamp-core", ".stamp-dev"):  # nothing to install
        (tmp_path / stamp).touch()
    # The tests may run under make; a make inside another says which folder it enters and takes over its flags.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    command = ["make", "gpu", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "make gpu: skipped, there is no GPU\n"), done.stderr

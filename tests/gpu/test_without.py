"""``make gpu`` where there is no GPU."""

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
    done = subprocess.run(["make", "gpu", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "make gpu: skipped, there is no GPU\n"), done.stderr

"""``stackwise doctor``: the facts, and the advice drawn from them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from stackwise.cli.doctor import advice, compared_dtypes, describe, examine, linear_speeds
from stackwise.cli.main import main


def test_json_is_one_object_with_the_facts_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_bytes(b"x" * 1009)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    facts = json.loads(out)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert facts["cpu"]["simd"] == torch.backends.cpu.get_cpu_capability()
    assert facts["cache"] == {"path": str(tmp_path), "bytes": 1009}
    assert facts["disk"]["cache_free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert facts["memory"]["total"] > 2**28
    assert bool(facts["accelerators"]) == (torch.cuda.is_available() or torch.backends.mps.is_available())
    assert facts["compute"]["auto_dtype"] == ("bfloat16" if facts["compute"]["device"] == "cuda" else "float32")
    assert facts["extras"].keys() == {"parquet", "datasets", "track", "wandb", "trackio", "hf", "eval"}
    people = describe(facts)
    assert torch.__version__ in people
    assert people.endswith(facts["compute"]["advice"])


def test_people_get_a_table_that_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = examine()
    facts["extras"] = {"parquet": {"pyarrow": "18.0"}, "wandb": {"wandb": None}}
    facts["accelerators"] = []
    lines = describe(facts).splitlines()
    assert "extra parquet   pyarrow 18.0" in lines
    assert "extra wandb     missing: pip install 'stackwise[wandb]'" in lines
    assert "accelerator     none" in lines


@pytest.mark.parametrize(
    ("float32", "bfloat16", "automatic", "sentence"),
    [
        (10.0, 35.0, "bfloat16", "bfloat16 (bfloat16 is 3.5 times as fast as float32); {}: auto picks it."),
        (10.0, 35.0, "float32", "bfloat16 (bfloat16 is 3.5 times as fast as float32); "
         "{}: set it, since auto picks float32."),
        (10.0, 11.0, "float32", "float32 (bfloat16 is no faster); {}: auto picks it."),
        (35.0, 10.0, "float32", "float32 (bfloat16 is 3.5 times slower); {}: auto picks it."),
        (35.0, 10.0, "bfloat16", "float32 (bfloat16 is 3.5 times slower); {}: set it, since auto picks bfloat16."),
    ],
)  # fmt: skip
def test_the_advice_names_the_faster_dtype_and_whether_auto_picks_it(
    float32: float, bfloat16: float, automatic: str, sentence: str
) -> None:
    assert advice({"float32": float32, "bfloat16": bfloat16}, automatic) == (
        "Best compute dtype here: " + sentence.format("training.compute_dtype")
    )


def test_a_device_without_bfloat16_is_only_measured_in_float32() -> None:
    assert advice({"float32": 1.0}, "float32").startswith("float32 is the only compute dtype here")
    assert list(compared_dtypes(torch.device("cpu"))) == ["float32", "bfloat16"]


def test_speed_counts_the_products_of_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    # Every run takes one second: FLOP/s are the FLOPs of three (512, 1024) by (1024, 1024) products.
    assert linear_speeds(torch.device("cpu"), compared_dtypes(torch.device("cpu"))) == {
        "float32": 3 * 2 * 512 * 1024 * 1024,
        "bfloat16": 3 * 2 * 512 * 1024 * 1024,
    }

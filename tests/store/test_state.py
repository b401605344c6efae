"""Manifests with a right digest and nonsense inside."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.errors import RunError
from stackwise.store.checkpoints import CheckpointError, CheckpointStore
from stackwise.store.rundir import RunDir
from stackwise.store.state import RunState, load_checkpoint, read_summary

pytestmark = pytest.mark.usefixtures("any_record")

STATE: dict[str, Any] = {
    "fingerprint": "f",
    "stacks": [0, 2],
    "precision": {"0": "int8"},
    "adapters": [{"stack": 2, "kind": "stack", "rank": 3, "alpha": 5, "dropout": 0.0}],
    "run": RunState(step=7, tokens=11, flops=13.0).to_dict(),
}


def save(folder: Path, change: dict[tuple[Any, ...], Any]) -> CheckpointStore:
    """A checkpoint of step 7 whose manifest is changed and signed again."""
    store = CheckpointStore(folder)
    path = store.save(7, {"norm": {"weight": torch.ones(3)}}, STATE)
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    for place, value in change.items():
        node = manifest
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    return store


def test_a_state_is_read_as_it_was_saved(tmp_path: Path) -> None:
    assert load_checkpoint(save(tmp_path, {})).state == STATE


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("step",), True), (("step",), 7.0), (("step",), "7"), (("parts",), []), (("parts", "norm"), 3),
        (("parts", "norm", "object"), "../../outside"), (("parts", "norm", "object"), 5),
        (("parts", "norm", "bytes"), "9"), (("parts", "norm", "bytes"), True), (("state",), [1]),
        (("state", "fingerprint"), None), (("state", "stacks"), []), (("state", "stacks"), 3),
        (("state", "stacks"), [0, 0]), (("state", "stacks"), [0, -2]), (("state", "stacks"), [0, 2.0]),
        (("state", "stacks"), [[0]]), (("state", "precision"), []), (("state", "precision"), {"0": "banana"}),
        (("state", "adapters"), {}), (("state", "adapters"), [3]), (("state", "adapters", 0, "stack"), 5),
        (("state", "adapters", 0, "rank"), 2**62), (("state", "adapters", 0, "rank"), 0),
        (("state", "adapters", 0, "kind"), "other"), (("state", "adapters", 0, "more"), 1), (("state", "run"), None),
        (("state", "run", "step"), 5), (("state", "run", "step"), 1e308), (("state", "run", "phase"), -1),
        (("state", "run", "phase"), "../x"), (("state", "run", "tokens"), {"": None}),
        (("state", "run", "records"), [0]), (("state", "run", "records"), ""), (("state", "run", "more"), 1),
    ],
)  # fmt: skip
def test_nonsense_under_a_right_digest_is_answered_by_one_line(
    tmp_path: Path, place: tuple[Any, ...], value: object
) -> None:
    store = save(tmp_path, {place: value})
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(store)
    assert "\n" not in str(raised.value) and "step 7" in str(raised.value)
    if place[0] == "state" and len(place) > 1:
        assert str(place[1]) in str(raised.value)


@pytest.mark.parametrize("shape", [[4], [-3], [3.0], ["3"], 3, None, [True, 3], [2**62, 4]])
def test_an_object_whose_header_lies_is_damaged(tmp_path: Path, shape: object) -> None:
    store = save(tmp_path, {})
    (path,) = (tmp_path / "objects").iterdir()
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["weight"]["shape"] = shape
    text = json.dumps(header).encode()
    lying = len(text).to_bytes(8, "little") + text + content[8 + length :]
    name = hashlib.sha256(lying).hexdigest()
    (tmp_path / "objects" / f"{name}.safetensors").write_bytes(lying)
    store = save(tmp_path, {("parts", "norm"): {"object": name, "bytes": len(lying)}})
    (tmp_path / "objects" / f"{name}.safetensors").write_bytes(lying)
    with pytest.raises(CheckpointError, match="damaged in part 'norm'"):
        load_checkpoint(store).part("norm")


@pytest.mark.parametrize(
    ("place", "value"),
    [(("phases", 0, "steps"), []), (("phases", 0, "seconds"), "x"), (("phases",), {}), (("validation", "loss"), None)],
)
def test_a_summary_that_no_run_wrote_is_answered_by_one_line(
    tmp_path: Path, place: tuple[Any, ...], value: object
) -> None:
    phase = {"name": "stack 0", "stack": 0, "steps": 7, "first_loss": 2.0, "last_loss": 1.0}
    summary: dict[str, Any] = {
        "phases": [phase], "validation": {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": None},
    }  # fmt: skip
    run = RunDir(tmp_path)
    run.write_summary(summary)
    assert read_summary(run) == summary
    node: Any = summary
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    run.write_summary(summary)
    with pytest.raises(RunError, match=r"summary\.json: not the summary of a run: " + r"\.".join(map(str, place))):
        read_summary(run)

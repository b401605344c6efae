"""A hook on the Rack sees all that a run computes: the plan, a cache, training, evaluation and what is generated."""

import random
from contextlib import contextmanager

import pytest
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.model.block import Block
from stackwise.model.embedding import TokenEmbedding
from stackwise.model.rack import Rack
from stackwise.runs.run import train_run
from stackwise.training.progress import SilentReporter

RUNS = {
    "clm, grown": {"progressive": {"trunk_strategy": "frozen", "cache_activations": True}},
    "mlm": {"strategy": "end_to_end", "progressive": {"training_objective": "mlm"}},
    "diffusion": {"strategy": "end_to_end", "progressive": {"training_objective": "diffusion"}},
    "diffusion by blocks": {
        "strategy": "end_to_end", "progressive": {"training_objective": "diffusion"}, "diffusion": {"block_length": 4},
    },
    "diffusion, time as depth": {
        "strategy": "end_to_end", "diffusion": {"depth_variant": "prefix"},
        "progressive": {"training_objective": "diffusion", "time_interpretation": "depth"},
    },
}  # fmt: skip


@contextmanager
def counted():
    """Counts the calls of Racks, and those of their embeddings and Blocks outside of any."""
    calls = {"inside": 0, "racks": 0, "within": 0, "beside": 0}

    def before(module, inputs):
        if isinstance(module, Rack):
            calls["inside"] += 1
            calls["racks"] += 1
        elif isinstance(module, (Block, TokenEmbedding)):
            calls["within" if calls["inside"] else "beside"] += 1

    def after(module, inputs, output):
        calls["inside"] -= isinstance(module, Rack)

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", RUNS)
def test_blocks_and_embeddings_run_inside_a_rack(name, tmp_path):
    (tmp_path / "text.txt").write_text("".join(random.Random(7).choices("abcdefg ", k=3000)))
    settings = {
        "batch_size": 5, "seq_len": 16, "max_steps": 4, "device": "cpu", "evaluation": {"max_tokens": 200},
        **RUNS[name],
    }  # fmt: skip
    shape = {"n_stacks": 2, "blocks_per_stack": 1}
    config = StackWiseConfig.from_dict(
        {
            "model": {"d_model": 20, "n_heads": 2, "d_ff": 36, "architecture": shape},
            "training": settings,
            "data": {"source": "files", "path": str(tmp_path / "text.txt"), "tokenizer": {"kind": "characters"}},
        }
    )
    with counted() as calls:
        train_run(config, tmp_path / "run", SilentReporter())
        trained = calls["racks"]
        assert main(["eval", str(tmp_path / "run")]) == 0
        evaluated = calls["racks"]
        if name != "mlm":
            assert main(["generate", str(tmp_path / "run"), "--prompt", "ab", "--tokens", "4"]) == 0
    assert calls["inside"] == calls["beside"] == 0 and calls["within"] > 2 * 4
    assert trained > 4 and evaluated > trained and (calls["racks"] > evaluated or name == "mlm")

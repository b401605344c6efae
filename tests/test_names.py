"""The names that users import, where the project promises them, in a process that has imported nothing yet."""

import inspect
import subprocess
import sys

import pytest

NAMES = {
    "stackwise": "load train plan generate evaluate",
    "stackwise.model.architecture": (
        "Block Stack Rack create_simple_rack create_rack_from_config create_rack_from_specs create_block_spec "
        "create_stack_from_spec create_stack_from_config"
    ),
    "stackwise.model.attention": "CoreAttention AttentionBuilder AttentionPresets",
    "stackwise.model.layers": "SwiGLUFFN MLGKALayer LexicalKernelManager",
    "stackwise.config.base": "StackWiseConfig ArchitectureConfig ModelConfig",
    "stackwise.training": (
        "ProgressiveRackBuilder ProgressiveTrainer ProgressiveDataLoader PrecisionManager ArchitectureTrainer"
    ),
    "stackwise.training.architecture_trainer": "ArchitectureTrainer",
}


@pytest.mark.parametrize("module", NAMES)
def test_the_promised_names_are_importable_and_listed(module: str) -> None:
    names = NAMES[module].split()
    code = f"from {module} import {', '.join(names)}\nimport {module} as m\nprint(*m.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(names) <= set(done.stdout.split())


def test_the_promised_methods_and_arguments_are_there() -> None:
    from stackwise.config.base import StackWiseConfig
    from stackwise.model.architecture import Rack, create_simple_rack
    from stackwise.model.attention import AttentionBuilder, AttentionPresets, CoreAttention
    from stackwise.model.layers import SwiGLUFFN
    from stackwise.training import ArchitectureTrainer, ProgressiveRackBuilder, ProgressiveTrainer

    methods = {
        StackWiseConfig: "from_yaml to_yaml from_dict to_dict validate",
        CoreAttention: "from_config",
        AttentionBuilder: "with_gqa with_mla with_kernel build",
        AttentionPresets: "bert_style gpt_style efficient_gqa mla_attention kernel_attention mlgka custom",
        ProgressiveRackBuilder: (
            "append_stack prepend_stack build_rack freeze_trunk freeze_all_but_qlora save_rack load_rack save_stack "
            "load_stack get_rack_info"
        ),
        ProgressiveTrainer: "train_rack",
        ArchitectureTrainer: "train_architecture",
    }
    for owner, names in methods.items():
        assert all(callable(getattr(owner, name)) for name in names.split()), owner
    arguments = {
        CoreAttention.forward: "x attention_mask",
        Rack.forward: "input_ids attention_mask",
        SwiGLUFFN.__init__: "d_model d_ff freeze_up_proj",
        create_simple_rack: "n_stacks blocks_per_stack d_model d_ff n_heads vocab_size",
        ProgressiveRackBuilder.__init__: "config building_mode",
        ProgressiveTrainer.train_rack: "rack_builder dataloader target_stacks",
        ArchitectureTrainer.train_architecture: "rack dataloader",
    }
    for function, names in arguments.items():
        given = [name for name in inspect.signature(function).parameters if name != "self"]
        assert given[: len(names.split())] == names.split(), function

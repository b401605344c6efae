"""A pretrained model comes in, grows over its frozen Stacks, and goes out deeper."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import stackwise
from stackwise.cli.main import main
from stackwise.data.store import prepare
from stackwise.objectives import create_objective
from stackwise.training import ProgressiveDataLoader

RECIPE = Path(__file__).parents[2] / "configs" / "block_expansion.yaml"
TEXT = "a rack is made of stacks, and a stack is made of blocks, one after the other. "


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=79, special_tokens=["</s>"], show_progress=False)
    library.train_from_iterator([TEXT], trainer)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=79, hidden_size=20, intermediate_size=33, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    llama.save_pretrained(folder / "llama")
    library.save(str(folder / "llama" / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT * 60)
    assert main(["import", str(folder / "llama"), str(folder / "base"), "--stacks", "2"]) == 0
    return folder


@pytest.mark.parametrize("mode, order", [("append", [0, 1, 2, 3]), ("interleave", [0, 2, 1, 3])])
def test_identity_stacks_over_an_imported_llama_start_at_its_loss_lower_it_and_go_out_in_the_new_depth(
    work, mode, order
):
    overrides = [
        f"training.progressive.building_mode={mode}",
        "model.architecture.blocks_per_stack=[2,1,1,1]",
        "training.batch_size=3", "training.seq_len=17", "training.optimizer.lr=1e-2",
        "training.device=cpu", "training.logging.every_steps=1",
        f"data.path={work / 'text.txt'}", f"data.cache_dir={work / 'cache'}",
    ]  # fmt: skip
    out = work / mode
    assert main(["train", str(RECIPE), *overrides, "--from", str(work / "base"), "--out", str(out)]) == 0

    base, grown = stackwise.load(work / "base"), stackwise.load(out)
    data = prepare(grown.config.data)
    objective = create_objective(grown.config, data.tokenizer)
    example = objective.corrupt(ProgressiveDataLoader(data.train, grown.config).batch(0))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 200
    assert metrics[0]["loss"] == objective.loss(base.rack, example, 1 / example.n_targets).item()
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert [stack.stack_id for stack in grown.rack.stacks] == order
    for stack in base.rack.stacks:
        after = next(s for s in grown.rack.stacks if s.stack_id == stack.stack_id)
        for (name, a), b in zip(stack.named_parameters(), after.parameters()):
            assert torch.equal(a, b), name
    assert torch.equal(base.rack.embedding.weight, grown.rack.embedding.weight)

    assert main(["export", str(out), str(work / f"{mode}-hf")]) == 0
    model = AutoModelForCausalLM.from_pretrained(work / f"{mode}-hf")
    assert isinstance(model, LlamaForCausalLM) and model.config.num_hidden_layers == 5
    tokenizer = AutoTokenizer.from_pretrained(work / f"{mode}-hf")
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    assert ids[0].tolist() == grown.tokenizer.encode(TEXT).tolist()
    torch.testing.assert_close(model(ids).logits, grown.rack(ids), atol=1e-5, rtol=1e-5)

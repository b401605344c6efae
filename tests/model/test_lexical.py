"""Token tables and tokenizers of pretrained models, and the adapter that makes them fit."""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import stackwise
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.data.tokenizers import open_pretrained, train_bpe
from stackwise.errors import UserError
from stackwise.growth.preparation import set_trainable
from stackwise.model.architecture import (
    Rack,
    RackSpec,
    create_block_spec,
    create_rack_from_config,
    create_rack_from_specs,
)
from stackwise.model.embedding import TokenEmbedding
from stackwise.model.layers import LexicalKernelManager
from stackwise.model.reading import Reading
from stackwise.ops import losses
from stackwise.planning.plan import plan_run
from stackwise.runs.builder import ProgressiveRackBuilder
from stackwise.runs.run import resume_run, train_run
from stackwise.training.progress import SilentReporter

E, C, HIDDEN, ROWS = 13, 22, 17, 283
TEXT = "a table of tokens comes from another model, and an adapter makes it fit this one. "
LLAMA, LLAMA_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def values(rows: int = ROWS, width: int = E, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def write_family(
    folder: Path, tensors: dict[str, Tensor] | None = None, *, tokenizer: bool = True, **settings: Any
) -> Path:
    """A Hugging Face folder: weights, config and tokenizer."""
    folder.mkdir(parents=True)
    if tensors is None:
        tensors = {LLAMA: values(), "model.layers.0.mlp.up_proj.weight": values(7, 5)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    if tokenizer:
        train_bpe(iter([TEXT * 9]), 271).save(folder / "saved")
        shutil.move(folder / "saved" / "tokenizer.json", folder / "tokenizer.json")
        shutil.rmtree(folder / "saved")
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return write_family(tmp_path / "family")


def rack_of(embedding_dim: int | None = None, adapter: int | None = None, **settings: Any) -> Rack:
    """One Stack of one Block, in double."""
    stacks = [{"stack_id": 0, "n_blocks": 1, "block_spec": create_block_spec(C, 10, 11)}]
    rack = create_rack_from_specs(
        ROWS, C, stacks, embedding_dim=embedding_dim, adapter_hidden_dim=adapter, seed=3, **settings
    )
    return rack.double()


def explicit_table(embedding: TokenEmbedding) -> Tensor:
    first, second = embedding.adapter_in, embedding.adapter_out
    assert first is not None and second is not None
    return F.gelu(embedding.weight @ first.weight.T + first.bias) @ second.weight.T + second.bias


# Reading


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("embed_tokens", LLAMA),
        ("embed_tokens", "transformer.wte.weight"),
        ("embed_tokens", "wte.weight"),
        ("embed_tokens", "model.embeddings.tok_embeddings.weight"),
        ("embed_tokens", "bert.embeddings.word_embeddings.weight"),
        ("lm_head", LLAMA_HEAD),
        ("lm_head", "decoder.weight"),
        ("lm_head", "cls.predictions.decoder.weight"),
    ],
)
def test_the_table_is_the_one_that_is_asked_for(tmp_path: Path, option: Any, name: str) -> None:
    other = LLAMA_HEAD if option == "embed_tokens" else LLAMA
    folder = write_family(tmp_path / "f", {other: values(seed=1), name: values(seed=2)}, tokenizer=False)
    read = LexicalKernelManager(folder, option)
    assert (read.vocab_size, read.embedding_dim) == (ROWS, E)
    assert torch.equal(read.weight, values(seed=2))


def test_every_shard_is_found_through_the_index(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "f", tokenizer=False)
    (folder / "model.safetensors").unlink()
    save_file({LLAMA: values(seed=4)}, folder / "model-00001-of-00002.safetensors")
    save_file({LLAMA_HEAD: values(seed=5)}, folder / "model-00002-of-00002.safetensors")
    shards = {LLAMA: "model-00001-of-00002.safetensors", LLAMA_HEAD: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert torch.equal(LexicalKernelManager(folder).weight, values(seed=4))
    assert torch.equal(LexicalKernelManager(folder, "lm_head").weight, values(seed=5))


def test_half_precision_becomes_fp32_exactly(tmp_path: Path) -> None:
    stored = values().to(torch.bfloat16)
    weight = LexicalKernelManager(write_family(tmp_path / "f", {LLAMA: stored}, tokenizer=False)).weight
    assert weight.dtype == torch.float32 and torch.equal(weight, stored.float())


def test_a_tied_head_is_the_input_table(tmp_path: Path) -> None:
    for number, settings in enumerate(({"tie_word_embeddings": True}, {"model_type": "gpt2"})):
        folder = write_family(tmp_path / str(number), tokenizer=False, **settings)
        assert torch.equal(LexicalKernelManager(folder, "lm_head").weight, values())


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM", "ModernBertForMaskedLM", "LlamaForCausalLM"])
def test_the_tables_are_those_that_transformers_uses(tmp_path: Path, name: str) -> None:
    import transformers

    model_class = getattr(transformers, name)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ids = {f"{role}_token_id": i for i, role in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    model = model_class(model_class.config_class(vocab_size=37, **sizes, **ids))
    model.save_pretrained(tmp_path / "f")
    for option, module in (
        ("embed_tokens", model.get_input_embeddings()),
        ("lm_head", model.get_output_embeddings()),
    ):
        assert torch.equal(LexicalKernelManager(tmp_path / "f", option).weight, module.weight)


def test_the_tokenizer_is_the_familys(family: Path) -> None:
    read = LexicalKernelManager(family)
    assert read.tokenizer.fingerprint == open_pretrained(family).fingerprint
    assert read.tokenizer.decode(read.tokenizer.encode(TEXT)) == TEXT
    assert read.tokenizer.vocab_size < read.vocab_size == ROWS


# Bad folders


def break_no_table(folder: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": values(7, 5)}, folder / "model.safetensors")


def break_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_empty(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_torn(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-40])


def break_quantised(folder: Path) -> None:
    save_file({LLAMA: values().to(torch.int8)}, folder / "model.safetensors")


def break_vector(folder: Path) -> None:
    save_file({LLAMA: values()[:, 0].clone()}, folder / "model.safetensors")


def break_escape(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {LLAMA: "../x.safetensors"}}))


def break_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {LLAMA: "a.safetensors"}}))


def break_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "a.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            break_no_table,
            "no embed_tokens table in its weights; they hold model.layers.0.mlp.up_proj.weight",
        ),
        (
            break_pickle,
            "no model.safetensors in it, only pytorch_model.bin, and pickle files are never opened; convert it first",
        ),
        (break_empty, "no model.safetensors in it"),
        (break_torn, "model.safetensors is not a readable safetensors file (*)"),
        (break_quantised, f"{LLAMA} is no token table but I8 of shape (283, 13); it must be two-dimensional *"),
        (break_vector, f"{LLAMA} is no token table but F32 of shape (283,); it must be two-dimensional *"),
        (break_escape, "model.safetensors.index.json does not say which .safetensors file beside it holds what"),
        (break_missing_shard, f"a.safetensors, which holds {LLAMA}, is not there"),
        (break_index, "a.safetensors does not hold wte.weight, as model.safetensors.index.json says"),
    ],
)
def test_a_folder_that_cannot_be_used_is_answered_by_one_line(family: Path, damage: Any, problem: str) -> None:
    damage(family)
    with pytest.raises(UserError) as raised:
        LexicalKernelManager(family)
    message = str(raised.value)
    assert "\n" not in message
    assert fnmatch(message, f"model.tokenizer_embedding.family: '{family}': {problem}"), message


def test_a_head_that_is_not_there_is_no_other_table(family: Path) -> None:
    with pytest.raises(UserError, match=r"no lm_head table in its weights, and config.json does not tie it to the i"):
        LexicalKernelManager(family, "lm_head")


def test_a_family_without_a_tokenizer_says_how_to_give_one(tmp_path: Path) -> None:
    read = LexicalKernelManager(write_family(tmp_path / "f", tokenizer=False))
    with pytest.raises(UserError, match=r"no tokenizer.json in it; give its tokenizer as data.tokenizer.kind: pretr"):
        read.tokenizer  # noqa: B018


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one sharded model, ``someone/model``; the list is what was fetched from it."""
    import huggingface_hub.errors

    class NotFound(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self) -> None:  # without the response that the library's needs
            Exception.__init__(self, "404\nmany\nlines")

    there = write_family(tmp_path / "remote")
    (there / "model.safetensors").unlink()
    names = ["a.safetensors", "b.safetensors"]
    save_file({LLAMA: values(seed=6)}, there / names[0])
    save_file({LLAMA_HEAD: values(seed=7)}, there / names[1])
    (there / "pytorch_model.bin").write_bytes(b"a pickle")
    shards = {LLAMA: names[0], LLAMA_HEAD: names[1]}
    (there / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    fetched: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], revision: str | None) -> str:
        if name != "someone/model":
            raise NotFound
        assert revision in (None, "f3a1")
        local = tmp_path / "hub" / "f3a1"
        local.mkdir(parents=True, exist_ok=True)
        for file in there.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, local)
                fetched.append(file.name)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fetched


def test_only_the_files_that_hold_the_table_and_the_tokenizer_are_fetched(hub: list[str]) -> None:
    read = LexicalKernelManager("someone/model", "lm_head")
    assert torch.equal(read.weight, values(seed=7))
    assert read.tokenizer.decode(read.tokenizer.encode(TEXT)) == TEXT
    assert "b.safetensors" in hub and not {"a.safetensors", "pytorch_model.bin"} & set(hub)


def test_a_name_that_the_hub_does_not_know_is_one_line(hub: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        LexicalKernelManager("someone/else")
    assert str(raised.value) == (
        "model.tokenizer_embedding.family: 'someone/else': no such folder, and no such model on the Hugging Face hub"
    )
    with pytest.raises(UserError, match=r"no such folder, and no name on the Hugging Face hub either$"):
        LexicalKernelManager("./somewhere/else")


def test_being_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.errors

    def unreachable(*arguments: Any, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection,\nand nothing here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"^[^\n]*and the Hugging Face hub cannot be reached to look there$"):
        LexicalKernelManager("someone/model")


def test_without_the_hub_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch, family: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'stackwise\[hf\]'$"):
        LexicalKernelManager("someone/model")
    assert LexicalKernelManager(family).vocab_size == ROWS  # a folder needs no package


# The adapter


def test_a_table_of_the_right_width_needs_no_adapter(family: Path) -> None:
    embedding = LexicalKernelManager(family).embedding(E)
    ids = torch.tensor([[5, 282, 0], [7, 7, 1]])
    assert {name for name, _ in embedding.named_parameters()} == {"weight"}
    assert torch.equal(embedding(ids), values()[ids]) and embedding.table() is embedding.weight
    adapted = LexicalKernelManager(family, adapter_hidden_dim=HIDDEN).embedding(E)
    assert adapted.adapter_in is not None and adapted.adapter_in.weight.shape == (HIDDEN, E)


def test_the_adapter_is_linear_gelu_linear_of_the_rows(family: Path) -> None:
    embedding = LexicalKernelManager(family, adapter_hidden_dim=HIDDEN).embedding(C, seed=2)
    assert embedding.adapter_in is not None and embedding.adapter_out is not None
    torch.nn.init.normal_(embedding.adapter_in.bias)
    torch.nn.init.normal_(embedding.adapter_out.bias)
    assert embedding.adapter_in.weight.shape == (HIDDEN, E) and embedding.adapter_out.weight.shape == (C, HIDDEN)
    ids = torch.tensor([[5, 282, 0], [7, 7, 1]])
    embedding.weight.requires_grad_(True)  # the family's rows are frozen
    table = explicit_table(embedding)
    torch.testing.assert_close(embedding.table(), table)
    torch.testing.assert_close(embedding(ids), table[ids])
    probe = torch.randn(2, 3, C, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((x * probe).sum(), list(embedding.parameters())) for x in (embedding(ids), table[ids])
    ]
    torch.testing.assert_close(*gradients)
    default = LexicalKernelManager(family).embedding(C)
    assert default.adapter_in is not None and default.adapter_in.weight.shape == (C, E)


def test_the_tokens_are_gathered_before_they_are_adapted(family: Path) -> None:
    embedding = LexicalKernelManager(family).embedding(C)
    rows = []
    assert embedding.adapter_in is not None
    embedding.adapter_in.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape))
    embedding(torch.tensor([[5, 282, 0]]))
    assert rows == [(1, 3, E)]


def test_a_frozen_table_stays_bit_identical_while_the_adapter_moves(family: Path) -> None:
    rack = rack_of(E, HIDDEN, freeze_embeddings=True, tie_embeddings=True).float()
    LexicalKernelManager(family).load_into(rack)
    set_trainable(rack, rack.parts())
    before = copy.deepcopy(rack.state_dict())
    optimizer = torch.optim.AdamW([p for p in rack.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    F.cross_entropy(rack(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    still = {name for name, value in rack.state_dict().items() if torch.equal(value, before[name])}
    assert still == {"embedding.weight"}
    assert torch.equal(rack.embedding.weight, values()) and rack.embedding.frozen


@pytest.mark.parametrize("frozen", [True, False])
def test_a_tied_head_reads_the_adapted_table_with_its_gradients(
    monkeypatch: pytest.MonkeyPatch, family: Path, frozen: bool
) -> None:
    rack = rack_of(E, HIDDEN, tie_embeddings=True, freeze_embeddings=frozen)
    LexicalKernelManager(family, freeze_embeddings=frozen).load_into(rack)
    set_trainable(rack, rack.parts())
    plain = rack_of(tie_embeddings=True)  # the same Stack, and the adapted table as a table of its own
    table = explicit_table(rack.embedding)
    with torch.no_grad():
        plain.embedding.weight.copy_(table)
    ids, targets = torch.randint(ROWS, (2, 3, 7), generator=torch.Generator().manual_seed(1))

    hidden = rack(Reading(ids))
    torch.testing.assert_close(rack(ids), hidden @ table.T)
    torch.testing.assert_close(hidden, plain(Reading(ids)))

    monkeypatch.setattr(losses, "chunk_rows", lambda n_rows, vocab_size: 4)  # several: the loss with its own gradients
    for model in (rack, plain):
        model.cross_entropy(model(Reading(ids)), targets).backward()
    wanted = {name: p for name, p in rack.embedding.named_parameters() if p.requires_grad}
    assert ("weight" in wanted) is not frozen and len(wanted) == (4 if frozen else 5)
    expected = torch.autograd.grad(table, list(wanted.values()), plain.embedding.weight.grad)
    for (name, parameter), gradient in zip(wanted.items(), expected):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, msg=name)
    for (name, one), other in zip(rack.stacks.named_parameters(), plain.stacks.parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_an_adapted_table_is_computed_once_where_nothing_trains(family: Path) -> None:
    embedding = LexicalKernelManager(family).embedding(C)
    with torch.no_grad():
        assert embedding.table() is not embedding.table()  # an optimizer may change it unseen
        embedding.requires_grad_(False)
        assert embedding.table() is embedding.table()
        assert embedding.adapter_in is not None
        for parameter in (embedding.weight, embedding.adapter_in.bias):
            parameter.mul_(0.5).add_(1.0)
            assert torch.equal(embedding.table(), explicit_table(embedding))
        with torch.autocast("cpu", torch.bfloat16):
            assert embedding.table().dtype == torch.bfloat16
        assert embedding.table().dtype == torch.float32
        assert torch.equal(copy.deepcopy(embedding).table(), embedding.table())
    embedding.requires_grad_(True)
    assert embedding.table().requires_grad


def test_a_spec_with_an_adapter_goes_through_json(family: Path) -> None:
    rack = rack_of(E, HIDDEN, tie_embeddings=True)
    again = Rack(RackSpec.from_dict(json.loads(json.dumps(rack.spec.to_dict())))).double()
    again.load_state_dict(rack.state_dict())
    ids = torch.tensor([[3, 1, 4]])
    assert torch.equal(again(ids), rack(ids))


@pytest.mark.parametrize(
    ("rack", "problem"),
    [
        (lambda: rack_of(E, freeze_embeddings=False), "freeze_embeddings is True here and False in the Rack's RackSp"),
        (
            lambda: rack_of(E + 1, freeze_embeddings=True),
            "is 283 by 13, that of the Rack 283 by 14; set its vocab_size",
        ),
    ],
)
def test_a_rack_of_another_shape_is_refused(family: Path, rack: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        LexicalKernelManager(family).load_into(rack())


# Runs


CONFIG = """
model:
  d_model: 22
  n_heads: 11
  d_ff: 10
  tie_embeddings: true
  architecture: {n_stacks: 2, blocks_per_stack: 1}
  tokenizer_embedding: {freeze_embeddings: true, adapter_hidden_dim: 17}
training:
  batch_size: 3
  seq_len: 14
  max_steps: 6
  schedule: {warmup_steps: 1, rewarmup_steps: 1}
  checkpoint: {every_steps: 2, keep_last: 9}
  device: cpu
data: {source: files}
"""


@pytest.fixture
def settings(tmp_path: Path, family: Path) -> Path:
    """A config whose family is in ``tmp_path``."""
    draw = random.Random(3)
    (tmp_path / "text.txt").write_text(" ".join(draw.choices(TEXT.split(), k=900)))
    data = yaml.safe_load(CONFIG)
    data["model"]["tokenizer_embedding"]["family"] = str(family)
    data["data"] |= {"path": str(tmp_path / "text.txt"), "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "c.yaml"


def test_a_run_needs_its_family_no_more(tmp_path: Path, family: Path, settings: Path, capsys: Any) -> None:
    run, later = tmp_path / "run", tmp_path / "later"
    assert main(["train", str(settings), "--out", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    tokenizer = open_pretrained(family)
    shutil.rmtree(family)

    loaded = stackwise.load(run)
    assert torch.equal(loaded.rack.embedding.weight, values())
    assert loaded.rack.embedding.adapter_in is not None and loaded.rack.embedding.frozen
    assert loaded.rack(torch.from_numpy(tokenizer.encode(TEXT))[None]).shape[-1] == ROWS
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    model = loaded.config.model
    assert (model.vocab_size, model.tokenizer_embedding.embedding_dim) == (ROWS, E)
    assert loaded.config.data.tokenizer.kind == "pretrained"
    assert summary["phases"][-1]["last_loss"] != summary["phases"][0]["first_loss"]

    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(summary["validation"]["loss"])
    assert resume_run(run, SilentReporter(), step=2)["weights_sha256"] == summary["weights_sha256"]

    grown = ["model.architecture.n_stacks=3", "training.max_steps=2"]
    assert main(["train", str(settings), "--from", str(run), *grown, "--out", str(later)]) == 0
    assert torch.equal(stackwise.load(later).rack.embedding.weight, values())
    with pytest.raises(UserError, match=r"embedding_option: 'lm_head', but the run that model.initial names has None"):
        changes = {
            "model.tokenizer_embedding.embedding_option": "lm_head",
            "model.initial": str(run),
            "data.tokenizer.path": str(run / "tokenizer"),
        }
        train_run(loaded.config.changed(changes), tmp_path / "other", SilentReporter())


def test_the_table_trains_where_it_is_not_frozen(tmp_path: Path, settings: Path) -> None:
    free = ["model.tokenizer_embedding.freeze_embeddings=false", "training.max_steps=1", "training.strategy=end_to_end"]
    assert main(["train", str(settings), *free, "--out", str(tmp_path / "run")]) == 0
    table = stackwise.load(tmp_path / "run").rack.embedding.weight
    assert not torch.equal(table, values()) and (table - values()).abs().max() < 0.01


def test_a_plan_counts_what_the_rack_of_the_config_has(tmp_path: Path, settings: Path) -> None:
    config = StackWiseConfig.from_yaml(settings)
    rack = create_rack_from_config(config)
    plan = plan_run(config, tmp_path)
    assert torch.equal(rack.embedding.weight, values())
    assert plan.costs[-1].parameters == sum(p.numel() for p in rack.parameters())
    assert plan.costs[-1].trainable_parameters == plan.costs[-1].parameters - ROWS * E
    # A tied head reads the adapted table: 2 FLOPs a multiply-add, forward, and backward but for the frozen table.
    without = plan_run(config.changed({"model.tie_embeddings": False}), tmp_path)
    adapter = ROWS * (2 * E * HIDDEN + 2 * HIDDEN * C) + ROWS * (2 * E * HIDDEN + 4 * HIDDEN * C)
    assert plan.costs[-1].flops - without.costs[-1].flops == adapter


def test_a_rack_whose_table_was_kept_can_be_copied_in_a_dry_run(settings: Path) -> None:
    rack = create_rack_from_config(StackWiseConfig.from_yaml(settings)).requires_grad_(False)
    with torch.no_grad():
        rack.embedding.table()
    with FakeTensorMode():
        fakes: dict[int, Tensor] = {
            id(p): torch.nn.Parameter(torch.empty(p.shape), requires_grad=False) for p in rack.parameters()
        }
        copied = copy.deepcopy(rack, fakes)
        assert copied(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, ROWS)


def test_a_builder_starts_from_the_familys_table(tmp_path: Path, settings: Path, family: Path) -> None:
    builder = ProgressiveRackBuilder(StackWiseConfig.from_yaml(settings))
    assert torch.equal(builder.build_rack().embedding.weight, values())
    builder.save_rack(tmp_path / "rack.safetensors")
    shutil.rmtree(family)  # a saved Rack needs it no more
    adapter = builder.rack.embedding.adapter_out
    again = builder.load_rack(tmp_path / "rack.safetensors").embedding.adapter_out
    assert adapter is not None and again is not None and torch.equal(adapter.weight, again.weight)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["model.vocab_size=291"],
            "model.vocab_size: 291 differs from the number of tokens in the embedding of '*' (283); leave it out",
        ),
        (
            ["model.tokenizer_embedding.embedding_dim=14"],
            "model.tokenizer_embedding.embedding_dim: 14 differs from the width of the embedding of '*' (13); *",
        ),
        (
            ["data.tokenizer.kind=bytes"],
            "data.tokenizer.kind: 'bytes' cannot be combined with model.tokenizer_embedding.family, *",
        ),
        (
            ["data.tokenizer.kind=pretrained", "data.tokenizer.path=other/tokenizer.json"],
            "data.tokenizer.path: 'other/tokenizer.json' is not the tokenizer of '*' "
            "(model.tokenizer_embedding.family); leave data.tokenizer out",
        ),
        (
            ["model.tokenizer_embedding.family=short"],
            "model.tokenizer_embedding.family: the embedding of 'short' has 269 rows, fewer "
            "than the 27? tokens of its tokenizer",
        ),
        (
            ["model.tokenizer_embedding.family=./none"],
            "model.tokenizer_embedding.family: './none': no such folder, and no name on the Hugging Face hub either",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_what_contradicts_the_family_is_one_line_before_anything_is_written(
    tmp_path: Path, settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str, overrides: list[str],
    problem: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    other = write_family(tmp_path / "other")
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|pad|>"}))
    write_family(tmp_path / "short", {LLAMA: values(269)})
    out = ["--out", "run"] if command == "train" else []
    capsys.readouterr()
    assert main([command, str(settings), *overrides, *out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and fnmatch(said.rstrip("\n"), f"stackwise: *{problem}"), said
    assert not (tmp_path / "run").exists()

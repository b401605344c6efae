"""Exported folders as their readers find them: without StackWise, through the Auto classes."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.data.tokenizers import ByteTokenizer, CharacterTokenizer, LibraryTokenizer, train_bpe
from stackwise.generation.autoregressive import generate, pad_prompts
from stackwise.interop.export import export_rack
from stackwise.interop.remote_code import remote_sources
from stackwise.interop.tokenizer_files import write_tokenizer
from stackwise.model.architecture import create_rack_from_specs
from stackwise.model.reading import Reading
from stackwise.runs.run import LoadedRun
from stackwise.store.checkpoints import Checkpoint
from stackwise.store.state import PhaseRecord, RunState
from variants import BLOCKS, V, rack_of

IDS = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(8))
MASK = torch.ones(2, 11, dtype=torch.bool)
MASK[1, :3] = False

# Run where `stackwise` cannot be imported: logits, loss, a saved and reloaded copy, and generated tokens.
READER = """
import sys
sys.modules["stackwise"] = None
import json, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
ids, mask = torch.tensor(json.loads(sys.argv[2])), torch.tensor(json.loads(sys.argv[3]))
results = {}
classes = Path(sys.argv[1]) / "classes"
model, report = AutoModelForSequenceClassification.from_pretrained(
    classes, trust_remote_code=True, output_loading_info=True
)
assert not report["missing_keys"] and not report["unexpected_keys"], report
out = model(ids, attention_mask=mask.long(), labels=torch.tensor([2, 0]))
results["classes/logits"], results["classes/loss"] = out.logits.detach(), out.loss.detach()
for folder in sorted(set(Path(sys.argv[1]).iterdir()) - {classes}):
    auto = AutoModelForMaskedLM if "mlm" in folder.name else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert not model.training
    assert model.accepts_loss_kwargs is False  # Trainer divides the loss by the batches that it accumulates
    out = model(ids, attention_mask=mask.long(), labels=torch.where(mask, ids, -100))
    results[folder.name + "/logits"], results[folder.name + "/loss"] = out.logits.detach(), out.loss.detach()
    model.save_pretrained(folder / "again")
    again = auto.from_pretrained(folder / "again", trust_remote_code=True)
    assert torch.equal(again(ids, attention_mask=mask.long()).logits, out.logits)
    if "mlgka" in folder.name:
        bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
        results[folder.name + "/hidden"] = bare(ids, attention_mask=mask.long()).last_hidden_state.detach()
    if "mlm" not in folder.name:
        made = model.generate(ids, attention_mask=mask.long(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        results[folder.name + "/tokens"] = made[:, ids.shape[1]:].contiguous()
save_file(results, sys.argv[4])
"""


def racks():
    """Racks that no class of transformers equals."""
    made = {name: rack_of(name, n_blocks=1) for name in BLOCKS if name not in NATIVE}
    made["gpt_style, mlm"] = rack_of("gpt_style", attention_mode="bidirectional")
    made["mlgka, mlm"] = rack_of("mlgka", attention_mode="bidirectional", learned_positions=11)
    block = {**BLOCKS["efficient_gqa"], "attention_mode": "bidirectional"}
    stacks = [
        {"stack_id": 3, "n_blocks": 1, "block_spec": block},
        {"stack_id": 1, "n_blocks": 2, "block_spec": BLOCKS["qk_norm"]},
    ]
    made["encoder beside decoder, mlm"] = create_rack_from_specs(
        V, block["d_model"], stacks, tie_embeddings=True, mlm_head=True, embedding_norm=True
    )
    return made


NATIVE = {
    "gpt_style": "LlamaForCausalLM",
    "bert_style": "LlamaForCausalLM",  # made causal
    "efficient_gqa": "LlamaForCausalLM",
    "mla_attention": "DeepseekV3ForCausalLM",
    "mla_full_queries": "DeepseekV3ForCausalLM",
    "qk_norm": "Qwen3ForCausalLM",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_native_class_is_chosen_where_it_is_exactly_equal(name, tmp_path):
    result = export_rack(rack_of(name), None, tmp_path / "out", 32)
    assert result["architecture"] == NATIVE.get(name, "StackWiseForCausalLM")
    assert result["remote_code"] == (name not in NATIVE)
    assert (tmp_path / "out" / "modeling_stackwise.py").exists() == result["remote_code"]


def test_a_native_class_without_rotary_or_learned_positions_does_not_exist(tmp_path):
    assert export_rack(rack_of("gpt_style", use_rope=False), None, tmp_path / "out", 32)["remote_code"]


def test_remote_code_gives_the_same_logits_loss_and_tokens_without_this_package(tmp_path, monkeypatch):
    made = racks()
    for name, rack in made.items():
        folder = tmp_path / "all" / name.replace(", ", "-").replace(" ", "_")
        assert export_rack(rack.eval(), None, folder, 32)["remote_code"]
    classifier = classifier_of("mlgka", pooling="mean")
    result = export_rack(classifier.rack, classifier.tokenizer, tmp_path / "all" / "classes", 32, classifier)
    assert result["architecture"] == "StackWiseForSequenceClassification" and result["remote_code"]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [str(tmp_path / "all"), json.dumps(IDS.tolist()), json.dumps(MASK.tolist()), str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, "-c", READER, *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = load_file(tmp_path / "results")
    for name, rack in made.items():
        key = name.replace(", ", "-").replace(" ", "_")
        logits = rack(IDS, MASK)
        torch.testing.assert_close(results[f"{key}/logits"][MASK], logits[MASK], atol=1e-5, rtol=1e-5)
        if "mlgka" in name:
            hidden = rack(Reading(IDS, MASK))
            torch.testing.assert_close(results[f"{key}/hidden"][MASK], hidden[MASK], atol=1e-5, rtol=1e-5)
        targets = torch.where(MASK, IDS, -100)
        if "mlm" in name:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        else:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
            rows = [ids[mask].tolist() for ids, mask in zip(IDS, MASK)]
            ids, mask = pad_prompts(rows, 0)
            tokens = torch.stack(list(generate(rack, ids, 4, temperature=0, attention_mask=mask)), 1)
            assert torch.equal(results[f"{key}/tokens"], tokens), name
        torch.testing.assert_close(results[f"{key}/loss"], loss, atol=1e-5, rtol=1e-5)
    scores = classifier.rack(IDS, MASK)[..., :3].double()
    means = torch.stack([row[real].mean(0) for row, real in zip(scores, MASK)])  # the head is linear
    torch.testing.assert_close(results["classes/logits"].double(), means, atol=1e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(means, torch.tensor([2, 0])).float()
    torch.testing.assert_close(results["classes/loss"], loss, atol=1e-5, rtol=1e-5)


def classifier_of(name, pooling=None):
    """A run of three classes whose Rack has the Blocks ``name``, as ``load`` gives it."""
    labelled = name == "mla_attention"
    named = {"names": ["bad", "fair", "good"]} if labelled else {}
    data = {"source": "labelled", "path": "a.tsv", "validation_path": "b.tsv"} if labelled else {}
    section = {"classes": 3, "pooling": pooling, **named}
    training = {"progressive": {"training_objective": "classification"}, "classification": section}
    mode = {"attention_preset": "gpt_style" if pooling is None else "bert_style"}
    config = StackWiseConfig.from_dict({"model": {**mode, "vocab_size": V}, "training": training, "data": data})
    record = PhaseRecord("end to end | <b>", None, 7, tokens=91, flops=1.5e9, first_loss=1.25, last_loss=0.75)
    state = {"run": RunState(step=7, tokens=91, flops=1.5e9, records=[record]).to_dict(), "fingerprint": "0f1e2d"}
    rack = rack_of(name, attention_mode="causal" if pooling is None else "bidirectional").eval()
    words = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz")
    return LoadedRun(rack, words, config, Checkpoint(7, state, {}))


@pytest.mark.parametrize("name", ("gpt_style", "mla_attention"))
def test_a_causal_classifier_is_a_class_of_transformers_whose_logits_are_the_head_s_first_rows(name, tmp_path):
    run = classifier_of(name)
    result = export_rack(run.rack, run.tokenizer, tmp_path / "out", 32, run)
    assert not result["remote_code"] and result["architecture"].endswith("ForSequenceClassification")
    card = (tmp_path / "out/README.md").read_text()  # where names are text
    assert "| end to end b | 7 | 1.5e+09 | – | – | 1.250 | 0.750 | – | – |" in card and "<b>" not in card
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_labels == 3
    assert model.config.id2label[2] == ("good" if name == "mla_attention" else "LABEL_2")
    pad = run.tokenizer.pad_id
    ids = torch.where(MASK.flip(1), IDS.clamp(min=max(run.tokenizer.special_ids) + 1), pad)
    found = model(ids, attention_mask=MASK.flip(1).long()).logits
    logits = run.rack(ids, MASK.flip(1))
    expected = torch.stack([logits[0, 10, :3], logits[1, 7, :3]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    hidden = AutoModel.from_pretrained(tmp_path / "out")(ids, attention_mask=MASK.flip(1).long()).last_hidden_state
    ours = run.rack(Reading(ids, MASK.flip(1)))
    torch.testing.assert_close(hidden[MASK.flip(1)], ours[MASK.flip(1)], atol=1e-5, rtol=1e-5)


def test_the_model_card_says_how_the_model_was_trained_planned_and_measured(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf/README.md").read_text()
    weights = hashlib.sha256((tmp_path / "hf/model.safetensors").read_bytes()).hexdigest()
    assert f"| model.safetensors | `{weights}` |" in card
    assert "pipeline_tag: text-generation" in card and "AutoModelForCausalLM.from_pretrained" in card
    assert "| data | files text.txt |" in card and str(run.parent) not in card
    summary = json.loads((run / "summary.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| stack")]
    assert [row[0] for row in rows] == [phase["name"] for phase in summary["phases"]]
    for row, phase in zip(rows, summary["phases"]):
        assert row[1] == str(phase["steps"]) and row[2] == f"{phase['flops']:.3g}"
        assert row[6] == f"{phase['last_loss']:.3f}" and row[8] == f"{phase['bits_per_byte']:.3f}"
        assert all("iB" in memory for memory in row[3:5])


def test_the_model_s_file_imports_every_other_itself():
    # Versions of transformers before 5 copy no others out of the folder.
    sources = remote_sources()
    for name in set(sources) - {"modeling_stackwise.py"}:
        assert f"from .{name.removesuffix('.py')} import" in sources["modeling_stackwise.py"]


def test_remote_code_is_this_package_s_own_source():
    sources = remote_sources()
    assert {"modeling_stackwise.py", "configuration_stackwise.py", "stackwise_ops_rope.py"} <= set(sources)
    for name, text in sources.items():
        assert "from stackwise." not in text and "pydantic" not in text, name
    settings = [name for name in sources if "config_" in name or "training" in name]
    assert settings == ["stackwise_config_attention.py"], "the spec of a layer alone, which is plain data"


TEXT = "one rack, two stacks: ünïcödé → \n\t tabs  and   spaces 12345"


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_a_tokenizer_gives_the_same_ids_in_transformers(kind, tmp_path):
    tokenizer = {
        "bytes": ByteTokenizer,
        "characters": lambda: CharacterTokenizer(TEXT),
        "bpe": lambda: train_bpe(iter([TEXT] * 3), 300),
    }[kind]()
    write_tokenizer(tokenizer, tmp_path, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, TEXT[::-1], " ", ""):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == text == tokenizer.decode(np.array(ids, dtype=np.int64))
    roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id)
    assert roles == (tokenizer.end_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id)
    assert len(theirs) == tokenizer.vocab_size


AROUND = {
    "gpt2": (None, {"bos_token_id": 0, "eos_token_id": 0}),
    "llama": ("[CLS] $A", {"bos_token_id": 3, "eos_token_id": 0}),
    "bert": ("[CLS] $A [SEP]", {"bos_token_id": 3, "eos_token_id": 0, "cls_token_id": 3, "sep_token_id": 4}),
}


@pytest.mark.parametrize("kind", AROUND)
def test_what_a_pretrained_tokenizer_puts_around_a_text_is_kept_and_named(kind, tmp_path):
    template, expected = AROUND[kind]
    library = train_bpe(iter([TEXT] * 3), 300).library()
    library.add_special_tokens(["[CLS]", "[SEP]"])
    ids = {name: library.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    expected = {key: [0, 1, 2, *ids.values()][value] for key, value in expected.items()}
    if template is not None:
        library.post_processor = TemplateProcessing(single=template, special_tokens=list(ids.items()))
    tokenizer = LibraryTokenizer(library, "pretrained", end="<|endoftext|>", pad="<|pad|>", mask=None)
    rack = rack_of("gpt_style")
    rack = create_rack_from_specs(tokenizer.vocab_size, rack.d_model, [])
    export_rack(rack, tokenizer, tmp_path / "out", 32)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in expected.items():
        assert getattr(theirs, key) == value and config[key] == value, key
    assert theirs(TEXT)["input_ids"] == library.encode(TEXT).ids
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("name", ["gpt_style", "qk_norm", "mla_attention", "kernel_attention"])
def test_a_tokenizer_beside_any_model_is_read_as_it_was_written(name, tmp_path):
    tokenizer = CharacterTokenizer("abcdefghijklmnop qrstuvwxyz_")
    rack = rack_of(name)
    assert tokenizer.vocab_size <= rack.vocab_size
    export_rack(rack, tokenizer, tmp_path / "out", 32)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=name == "kernel_attention")
    assert theirs("a rack of stacks")["input_ids"] == tokenizer.encode("a rack of stacks").tolist()
    assert theirs.model_max_length == 32


def test_the_longest_sequence_can_be_declared(run, tmp_path):
    for option, expected in ([], 12), (["--max-tokens", "40"], 40):
        folder = tmp_path / str(expected)
        assert main(["export", str(run), str(folder), *option]) == 0
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("stacks of blocks in a rack; " * 60)
    (folder / "config.yaml").write_text(
        "model: {d_model: 16, n_heads: 2, architecture: {n_stacks: 2, blocks_per_stack: 1}}\n"
        "training: {batch_size: 3, seq_len: 12, max_steps: 4, device: cpu}\n"
        f"data: {{source: files, path: {folder / 'text.txt'}, cache_dir: {folder / 'cache'}, "
        "tokenizer: {kind: characters}}\n"
    )
    assert main(["train", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_the_commands_export_and_import_go_round(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().err
    assert "LlamaForCausalLM (exactly equal)" in said and f'from_pretrained("{tmp_path / "hf"}")' in said
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back"), "--stacks", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stacks"] == 2
    texts = []
    for folder in (run, tmp_path / "back"):
        assert main(["generate", str(folder), "--prompt", "stack", "--tokens", "9", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["eval", str(tmp_path / "back"), "--data", str(run.parent / "text.txt"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert main(["eval", str(run), "--data", str(run.parent / "text.txt"), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert scores["loss"] == pytest.approx(expected["loss"], rel=0.05)  # in windows of another length


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "{run}", "{here}"], "{here}: already exists; give a new or an empty folder"),
        (["import", "{here}/none", "{here}/out"], "{here}/none: no such folder"),
        (["import", "{here}", "{here}/out"], "{here}: not a Hugging Face folder: it has no config.json"),
        (["import", "{run}", "{run}"], "{run}: already exists; give a new or an empty folder"),
    ],
)
def test_wrong_folders_are_answered_in_one_line(run, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    places = {"run": run, "here": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert capsys.readouterr().err == f"stackwise: {message.format(**places)}\n"

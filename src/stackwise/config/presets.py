"""Starting points for ``stackwise init`` and ``demo``: the settings that differ from the defaults, as in a file."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "demo": {
        "model": {"d_model": 192, "n_heads": 6, "architecture": {"n_stacks": 3, "blocks_per_stack": 1}},
        "training": {
            "batch_size": 16,
            "seq_len": 128,
            "max_flops": 1.6e13,
            "optimizer": {"lr": 4e-3, "betas": [0.9, 0.98]},
            "schedule": {"kind": "cosine", "min_lr_ratio": 0.05},
            "progressive": {"phase_fractions": [0.25, 0.3, 0.45]},
            "checkpoint": {"every_steps": 200},
            "evaluation": {"max_tokens": None},  # its losses stand beside the entropies of the same tokens
        },
        "data": {"tokenizer": {"vocab_size": 1024}},
    },
    "tiny": {
        "model": {"d_model": 64, "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
        "training": {"batch_size": 8, "seq_len": 64, "max_steps": 100, "schedule": {"warmup_steps": 10}},
        "data": {"tokenizer": {"kind": "bytes"}},
    },
    "characters": {
        "training": {"batch_size": 12, "seq_len": 64, "max_steps": 2000},
        "data": {"source": "files", "path": "input.txt", "tokenizer": {"kind": "characters"}},
    },
    "bert": {
        "model": {"attention_preset": "bert_style"},
        "training": {"progressive": {"training_objective": "mlm"}},
    },
    "diffusion": {
        "training": {
            "strategy": "end_to_end",
            "batch_size": 32,
            "seq_len": 64,
            "max_steps": 5000,
            "optimizer": {"lr": 2e-3, "betas": [0.9, 0.99]},
            "progressive": {"training_objective": "diffusion"},
            "diffusion": {"weighting": "exact_counts"},
        },
        "data": {"source": "files", "path": "input.txt", "tokenizer": {"kind": "characters"}},
    },
    "gpu": {
        "model": {"d_model": 768, "n_heads": 12, "architecture": {"n_stacks": 4, "blocks_per_stack": 3}},
        "training": {
            "batch_size": 64,
            "micro_batch_size": 16,
            "seq_len": 1024,
            "max_tokens": 2_500_000_000,
            "optimizer": {"lr": 6e-4},
            "schedule": {"warmup_steps": 500, "rewarmup_steps": 100},
            "compile": True,
        },
        "data": {"source": "files", "path": "corpus", "tokenizer": {"vocab_size": 32768}},
    },
}

ABOUT = {
    "default": "a small model of the Python library sources on this machine; runs on any laptop",
    "demo": "what `stackwise demo` runs",
    "tiny": "the smallest run worth looking at, under a minute: to try a change",
    "characters": "your own text (data.path), character by character, in minutes on a CPU",
    "bert": "masked words read from both sides, for embeddings and classification",
    "diffusion": "masked diffusion on your own text (data.path), character by character: fills gaps, in any order",
    "gpu": "12 layers of width 768 on your own text (data.path), for one GPU with bfloat16",
}
"""One sentence on each preset."""

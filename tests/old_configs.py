"""Ten configs as the first public versions had them, by the kinds of keys that they have."""

HIERARCHY = """\
# A run of ours.

model:
  vocab_size: 1009            # small, for tests
  d_model: 48
  n_heads: 4
  n_kv_heads: 2
  d_ff: 52

  # Stacks of Blocks
  architecture:
    n_stacks: 2       # groups
    blocks_per_stack: 3

  attention_preset: "bert_style"    # bert_style | gpt_style
  attention_custom:
    attention_type: "mha"
    attention_mode: "bidirectional"
    mla_rq: 64
    kernel_type: "linear"
  tie_embeddings: true
  freeze_up_proj: true
  mask_fraction_min: 0.15
  mask_fraction_max: 0.90
  special_mask_id: 4
  # The table of another model
  tokenizer_embedding:
    family: "gpt2"            # downloaded
    freeze_embeddings: true
    adapter_hidden_dim: null

training:
  batch_size: 4
  seq_len: 17
  max_steps: 10
  optimizer:
    optimizer_type: "AdamW"  # AdamW | SGD
    lr: 1.0e-4
    momentum: 0.9
    custom_params: {}
    groups: []
    # A group would look like this:
    #   - lr: 1.0e-4
  # Where it runs
  device: "cpu"
  cache_dir: "./cache"             # of activations
  save_stacks: true
  epochs_per_stack: 1
  strategy: "progressive"
  end_to_end_scope: "stackwise"
  progressive:
    building_mode: "prepend"
  qlora:
    enabled: true
    rank: 16
    alpha: 32
    lr: 1.0e-5
    rank_pattern: "constant"
    mixed_precision: true
  quantization_enabled: true
  quantization_type: "fp16"
  time_step_masking: false
  progressive:
    enabled: true
    target_stacks: 2               # as many as there are
    trunk_strategy: "frozen"
    cache_activations: true
    time_interpretation: "depth"
    training_objective: "mlm"
    max_stacks: 12
  log_interval: 10   # steps

data:
  use_dummy_data: true
  num_samples: 128
  tokenizer_path: null
  shuffle: true
# The end.
"""

N_BLOCKS = """\
model: {vocab_size: 1009, d_model: 36, n_heads: 3, n_blocks: 6, architecture: {n_blocks: 6, n_stacks: 2}}
training: {strategy: end_to_end, end_to_end_scope: rackwise, progressive: {training_objective: clm}}
"""

TOP_OF_MODEL = """\
model:
  vocab_size: 1009
  d_model: 48
  n_heads: 4
  n_layers: 8
  attention_type: "mla"             # mha | gqa | mla
  attention_mode: "bidirectional"
  mla_rq: 12
  mla_rkv: 10
  kernel_type: "laplacian"          # linear | gaussian | laplacian | uniform
  kernel_dim: 22
training:
  lr: 1.0e-4
  weight_decay: 0.1
  betas: [0.9, 0.95]
  mode: "blockwise"                 # layerwise | blockwise | fused
  block_size: 4
  learning_rate: 1.0e-4
  min_mask_fraction: 0.15
  max_mask_fraction: 0.90
  mask_token_id: 0
"""

GROUPED = """\
model: {vocab_size: 1009, d_model: 48, n_heads: 6, n_kv_heads: 3, attention_type: gqa, attention_mode: causal,
        kernel_type: linear, kernel_dim: 64, mla_rq: 1024, mla_rkv: 512}
training: {training_architecture: blockwise, max_steps: 50, gradient_checkpointing: true}
"""

LAYERWISE = """\
model: {vocab_size: 1009, d_model: 48, n_heads: 4, attention_preset: gpt_style}
training: {mode: layerwise, epochs_per_layer: 3, run_id: mine, device: auto, progressive: {training_objective: clm}}
"""

FUSED = """\
model: {vocab_size: 1009, d_model: 48, n_heads: 4, attention_mode: causal, tie_embeddings: true}
training:
  mode: "fused"
  fusion_mode: "frozen"   # frozen | trainable
  total_blocks: 3
  block_size: 2
  qlora_enabled: true
  qlora_lr: 1.0e-5
  quantization_type: "fp8"
  progressive: {training_objective: clm}
"""

DUAL_ADAPTERS = """\
model: {vocab_size: 1009, d_model: 48, n_heads: 4, architecture: {n_stacks: 3, blocks_per_stack: 1}}
training:
  qlora: {enabled: true, rank: 8, strategy: simplified}
  progressive:
    trunk_strategy: qlora
    training_objective: clm
    qlora_enabled: true
    qlora_strategy: variable        # simplified | progressive | variable
    qlora_rank: 16
    qlora_alpha: 32
    progressive_qlora: true
    progressive_qlora_rank: 6
    progressive_qlora_alpha: 12
    qlora_rank_pattern: increasing
    qlora_configs:
      0: {rank: 4, alpha: 8}        # the first
      2: {rank: 12, alpha: 24}
"""

TIME_AS_DEPTH = """\
model: {vocab_size: 1009, d_model: 48, n_heads: 4, architecture: {n_stacks: 3, blocks_per_stack: 1}}
training:
  strategy: progressive
  time_step_masking: true
  num_time_steps: 8
  time_step_mask_fractions: [0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85]
  progressive:
    training_objective: diffusion
    time_interpretation: depth
    stack_time_mapping: exponential
    time_per_stack: 100
    cache_activations: true
    new_stack_precision: fp32
"""

TIME_AS_INPUT = """\
model: {vocab_size: 1009, d_model: 48, n_heads: 4}
training:
  progressive:
    enabled: false
    training_objective: diffusion
    time_interpretation: input
    time_embedding_dim: 38
    time_encoding_type: learned
data: {dataset_path: book.txt, use_dummy_data: false, max_length: 23}
"""

DUMPED = """\
data: !!python/object:config.base.DataConfig
  dataset_path: null
  max_length: 64
  use_dummy_data: true
model: !!python/object:config.base.ModelConfig
  architecture: !!python/object:config.base.ArchitectureConfig
    blocks_per_stack: 1
    n_stacks: 4
  attention_preset: gpt_style
  d_ff: 52
  d_model: 48
  n_heads: 4
  n_kv_heads: 4
  vocab_size: 1009
training: !!python/object:config.base.TrainingConfig
  optimizer: !!python/object:config.base.OptimizerConfig
    betas:
    - 0.9
    - 0.95
    groups: []
    lr: 1e-4
    optimizer_type: SGD
    momentum: 0.9
    use_groups: false
  progressive: !!python/object:config.base.ProgressiveConfig
    training_objective: clm
    trunk_strategy: frozen
    new_stack_precision: full
  use_wandb: false
  wandb_tags: []
  save_interval: 100
"""

OLD = {
    "hierarchy": HIERARCHY, "n_blocks": N_BLOCKS, "top_of_model": TOP_OF_MODEL, "grouped": GROUPED,
    "layerwise": LAYERWISE, "fused": FUSED, "dual_adapters": DUAL_ADAPTERS, "time_as_depth": TIME_AS_DEPTH,
    "time_as_input": TIME_AS_INPUT, "dumped": DUMPED,
}  # fmt: skip

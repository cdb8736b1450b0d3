"""What is trained and how: the options of a run, the presets, and the learning rate."""

import math
from dataclasses import dataclass

from model import SIZES
from runtime.options import option

# A preset overrides the defaults of TrainConfig, which are the published recipe of GPT-2 124M; flags override both.
PRESETS = {
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=256, seq_len=128, total_batch_size=2048,
        max_steps=550, max_lr=2e-3, min_lr=0.0, warmup_steps=100,
        eval_every=110, eval_tokens=32768, hellaswag_every=0, sample_every=110, save_every=110,
    ),
    "small": dict(
        n_layer=6, n_head=6, n_embd=384, seq_len=256, total_batch_size=8192,
        max_steps=200, max_lr=1.5e-3, min_lr=0.0, warmup_steps=40,
        eval_every=50, eval_tokens=32768, hellaswag_every=0, sample_every=50, save_every=100,
    ),
    # Learning rates: GPT-3's (Brown et al., 2020, table 2.1). llm.c's scripts have the same, but 6e-4 for 1558M.
    "gpt2": SIZES["gpt2"],
    "gpt2-medium": SIZES["gpt2-medium"] | dict(max_lr=3e-4),
    "gpt2-large": SIZES["gpt2-large"] | dict(max_lr=2.5e-4),
    "gpt2-xl": SIZES["gpt2-xl"] | dict(max_lr=2e-4),
}  # fmt: skip

# Muon reaches the same loss in half the steps. The learning rate of small-fast was tuned, that of gpt2-fast was not.
FAST = dict(optimizer="muon", schedule="wsd", decay_fraction=0.5, min_lr=0.0)
PRESETS |= {
    "small-fast": PRESETS["small"] | FAST | dict(max_steps=100, max_lr=4e-3, warmup_steps=15),
    "gpt2-fast": PRESETS["gpt2"] | FAST | dict(max_steps=9536, max_lr=1.2e-3, warmup_steps=715),
}


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. None stands for a default that depends on the machine or the data."""

    preset: str | None = option(
        None, "size and recipe, listed below (default: tiny; on a GPU small, for shards gpt2)", choices=tuple(PRESETS)
    )
    n_layer: int = option(12, "number of layers", low=1, high=1000)
    n_head: int = option(12, "number of attention heads per layer", low=1, high=2**24)
    n_embd: int = option(768, "number of channels", low=1, high=2**24)
    vocab_size: int | None = option(None, "encode a text with GPT-2's first N tokens", low=257, high=50257)
    bias: bool = option(True, "use biases in linear layers and LayerNorms, as GPT-2 does")
    data: str | None = option(
        None, "directory of token shards, or UTF-8 text file (default: edu_fineweb10B/, else input.txt)", metavar="PATH"
    )
    log_dir: str = option("log", "directory for the log and the checkpoints", metavar="DIR")
    init_from: str | None = option(
        None, "fine-tune this model, a directory or hub name: sets shape, seq_len and a constant 3e-5", metavar="MODEL"
    )
    resume: str | None = option(None, "resume from DIR, or from the newest in log_dir", const="newest", metavar="DIR")
    max_steps: int | None = option(None, "steps; 0 only evaluates (default: one epoch of shards, 19,073 at most)")
    total_batch_size: int = option(524288, "tokens per optimizer step, over all ranks", low=1)
    micro_batch_size: int | None = option(None, "sequences per pass and rank (default: as many as fit)", low=1)
    seq_len: int = option(1024, "tokens per sequence: the context of the model", low=1, high=2**24)
    max_lr: float = option(6e-4, "learning rate after warm-up")
    min_lr: float | None = option(None, "learning rate at the end (default: max_lr / 10)")
    schedule: str = option("cosine", "decay of the learning rate after warm-up", choices=("cosine", "wsd"))
    decay_fraction: float = option(0.5, "fraction of the steps, at the end, in which wsd decays", high=1)
    warmup_steps: int | None = option(None, "steps of linear warm-up (default: 715, at most max_steps / 10)")
    optimizer: str = option("adamw", "AdamW, or Muon for the matrices of the blocks", choices=("adamw", "muon"))
    muon_lr_scale: float = option(1.0, "learning rate of Muon's matrices, as a multiple of AdamW's")
    weight_decay: float = option(0.1, "weight decay of matrices and embeddings")
    grad_clip: float = option(1.0, "clip the gradient to this norm; 0 does not clip")
    dropout: float = option(0.0, "dropout probability, in embeddings, attention and residual branches", high=0.99)
    seed: int = option(1337, "seed of initial weights, data order and dropout", high=2**31)
    device: str = option(
        "auto", "auto takes the first there is of these", choices=("auto", "cuda", "xpu", "mps", "cpu")
    )
    dtype: str = option(
        "auto", "auto: bfloat16 if built in, or float16 on cuda", choices=("auto", "float32", "bfloat16", "float16")
    )
    compile: str = option("auto", "use torch.compile; auto where it saves time", choices=("auto", "on", "off"))
    recompute: str = option(
        "auto", "recompute activations; auto if one sequence needs it", choices=("auto", "on", "off"), const="on"
    )
    shard: str = option("off", "divide weights and moments among ranks (FSDP2)", choices=("on", "off"), const="on")
    eval_every: int = option(250, "steps between evaluations of the validation loss; 0 for none")
    eval_tokens: int = option(10485760, "validation tokens per evaluation, over all ranks", low=1)
    hellaswag_every: int = option(250, "steps between HellaSwag evaluations (downloads the data once); 0 for none")
    sample_every: int = option(250, "steps between samples; 0 for none")
    save_every: int = option(1000, "steps between checkpoints; 0 for one at the end")
    keep: int = option(2, "number of newest checkpoints to keep, besides the best by validation loss", low=1)
    wandb: str | None = option(None, "also log to Weights & Biases (pip install wandb)", metavar="PROJECT")
    dist_timeout: float = option(600.0, "seconds after which a rank that gets no answer from another stops", low=1)
    dry_run: bool = option(False, "run four steps, print what the run would take, write nothing")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: linear warm-up to max_lr, then decay to min_lr at max_steps.

    cosine decays after warm-up (GPT-3: Brown et al., 2020, appendix B), wsd (warm-up, stable, decay) linearly over the
    last decay_fraction of the steps (Hägele et al., 2024, section 3).
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    steps_after_warmup = max(1, config.max_steps - config.warmup_steps)
    if config.schedule == "cosine":
        fraction = 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / steps_after_warmup))
    else:
        decay_steps = min(steps_after_warmup, max(1, config.decay_fraction * config.max_steps))
        fraction = min(1, (config.max_steps - step) / decay_steps)
    return config.min_lr + fraction * (config.max_lr - config.min_lr)

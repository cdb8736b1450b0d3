"""What is trained and how: the options of a run, the presets, and the learning rate."""

import math
from dataclasses import dataclass, field

from model import SIZES

FULL_RUN = "python fineweb.py && torchrun --nproc_per_node=8 train_gpt2.py --preset gpt2"


# Laid over the defaults of TrainConfig, which are the published recipe of GPT-2 124M, and under the user's flags.
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
    **SIZES,
}  # fmt: skip

# What leads the same network to the same loss in half the steps: small's rates are from a sweep, gpt2's are not.
FAST = dict(optimizer="muon", schedule="wsd", decay_share=0.5, min_lr=0.0)
PRESETS |= {
    "small-fast": PRESETS["small"] | FAST | dict(max_steps=100, max_lr=4e-3, warmup_steps=15),
    "gpt2-fast": PRESETS["gpt2"] | FAST | dict(max_steps=9536, max_lr=1.2e-3, warmup_steps=715),
}


def option(default, text: str, low: float = 0, high: float = 2**40, choices: tuple = (), metavar: str = ""):
    """A field of TrainConfig: its default, its line of help, and the values that are allowed."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices, metavar=metavar))


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run. None stands for what is worked out when the run starts, as the help says."""

    preset: str | None = option(
        None,
        "size and recipe to start from, listed below (default: tiny on a CPU, small on a GPU, gpt2 on one with shards)",
        choices=(*PRESETS,),
    )
    n_layer: int = option(12, "layers", low=1)
    n_head: int = option(12, "attention heads per layer", low=1)
    n_embd: int = option(768, "width of the residual stream", low=1)
    bias: bool = option(True, "biases in linear maps and LayerNorms, as GPT-2 has them")
    data: str | None = option(
        None,
        "directory of token shards, or a UTF-8 text file (default: edu_fineweb10B/ if it is there, else input.txt)",
        metavar="PATH",
    )
    log_dir: str = option("log", "directory of this run's log and saves", metavar="DIR")
    init_from: str | None = option(
        None,
        "fine-tune this model: a directory, or a name on the Hugging Face hub (its shape and seq_len are then the "
        "defaults, and a constant learning rate of 3e-5)",
        metavar="MODEL",
    )
    resume: str | None = option(
        None, "go on from the save DIR, such as log/step_000110, or without DIR from the newest in log_dir"
    )
    max_steps: int | None = option(
        None, "optimizer steps; 0 only evaluates (default: 19,073, or one epoch of shards under 9.5B tokens)"
    )
    total_batch_size: int = option(524288, "tokens per optimizer step, over all ranks", low=1)
    micro_batch_size: int | None = option(
        None, "rows of seq_len tokens per forward pass and rank (default: the most that divide and should fit)", low=1
    )
    seq_len: int = option(1024, "tokens per row, the model's context", low=1)
    max_lr: float = option(6e-4, "learning rate after warm-up")
    min_lr: float | None = option(None, "learning rate at the end (default: max_lr / 10)")
    schedule: str = option("cosine", "the learning rate's way down, from warm-up on or late", choices=("cosine", "wsd"))
    decay_share: float = option(0.5, "share of the steps, the last, in which wsd goes down", high=1)
    warmup_steps: int | None = option(None, "steps of linear warm-up (default: 715, at most max_steps / 10)")
    optimizer: str = option("adamw", "muon: for the blocks' matrices, adamw for the rest", choices=("adamw", "muon"))
    muon_ratio: float = option(1.0, "learning rate of muon's matrices, as a multiple of the rest's")
    weight_decay: float = option(0.1, "decay of matrices and embeddings")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 for no limit")
    dropout: float = option(0.0, "its probability, in embedding, attention and residual", high=0.99)
    seed: int = option(1337, "of weights, order of rows, dropout", high=2**31)
    device: str = option(
        "auto", "where to compute: auto takes cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps")
    )
    dtype: str = option(
        "auto",
        "precision of matrix products: auto takes bfloat16 where the hardware has it, else float16 on cuda or float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: str = option("auto", "torch.compile: auto where it can work and pays", choices=("auto", "on", "off"))
    eval_every: int = option(250, "steps between evaluations on the validation tokens; 0 for none")
    eval_tokens: int = option(10485760, "validation tokens per evaluation, however many ranks", low=1)
    hellaswag_every: int = option(250, "steps between HellaSwag exams, whose questions are downloaded once; 0 for none")
    sample_every: int = option(250, "steps between samples; 0 for none")
    save_every: int = option(1000, "steps between saves; 0 for one at the end")
    keep: int = option(2, "newest saves to keep, besides the best by validation loss", low=1)
    wandb: str | None = option(
        None, "project on Weights & Biases to log to, too (pip install wandb)", metavar="PROJECT"
    )
    dist_timeout: float = option(600.0, "seconds until a rank that waits for another gives up", low=1)
    dry_run: bool = option(False, "take four steps, say what the run would take, and write nothing")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to max_lr, then down to min_lr at max_steps: along a cosine (GPT-3: Brown et al., 2020, appendix
    B), or with wsd (warm-up, stable, decay) in a line over the last steps alone (Hägele et al., 2024, section 3)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    falling = max(1, config.max_steps - config.warmup_steps)
    if config.schedule == "wsd":
        height = min(1, (config.max_steps - step) / min(falling, max(1, config.decay_share * config.max_steps)))
    else:
        height = 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / falling))
    return config.min_lr + height * (config.max_lr - config.min_lr)

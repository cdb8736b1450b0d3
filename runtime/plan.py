"""How flags, preset, checkpoint and data become the final configuration of a run."""

from errors import UserError
import math
import os
import re
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data import Data
from model import GPT, GPTConfig, load_tokenizer
from recipe import PRESETS, TrainConfig
from runtime import checkpoint
from runtime.device import choose_device, choose_dtype, eager_reason, free_memory
from runtime.distributed import Distributed
from runtime.options import check_values
from tokens import Tokenizer, gpt2_tokenizer

ROOT = Path(__file__).resolve().parent.parent

# With any of these changed, a resumed run would be another run.
RESUME_INVARIANT = (
    "n_layer n_head n_embd bias init_from max_steps total_batch_size seq_len max_lr min_lr schedule decay_fraction "
    "warmup_steps optimizer muon_lr_scale weight_decay grad_clip dropout seed vocab_size"
).split()
# These may differ from machine to machine. A checkpoint records which of them were typed.
MACHINE_OPTIONS = "device", "dtype", "compile", "micro_batch_size", "recompute", "shard"


@dataclass(frozen=True)
class Plan:
    """The decisions about a run. In merge_flags' draft, what depends on data or device is still None or "auto"."""

    flags: dict  # the options that were typed
    config: TrainConfig
    tokenizer: Tokenizer | None  # of the model or of --vocab_size; None is that of the data
    vocab_size: int | None  # of the model, which may have more tokens than GPT-2's tokenizer; None is the tokenizer's
    resume_from: Path | None  # a checkpoint
    record: dict | None  # its checkpoint.json
    lines: list[str]  # what to print
    machine_flags: dict  # the MACHINE_OPTIONS that were typed, now or in the commands that are resumed
    data_fingerprint: dict | None = None

    @property
    def model_config(self) -> GPTConfig:
        shape = {name: getattr(self.config, name) for name in ("n_layer", "n_head", "n_embd", "dropout", "bias")}
        return GPTConfig(self.config.seq_len, self.vocab_size, **shape)


def merge_flags(flags: dict, ranks: int) -> Plan:
    """Merge flags, checkpoint, --init_from, preset and defaults; leave open what make_plan decides. Raise UserError."""
    resume_from, record, lines = find_checkpoint(flags)
    machine_flags = {name: flags[name] for name in MACHINE_OPTIONS if name in flags}
    flag, source = ("--resume", resume_from) if record is not None else ("--init_from", flags.get("init_from"))
    tokenizer, vocab_size, options = None, None, {}
    if source is not None:
        with checkpoint.errors_of(f"{flag} {source}: cannot be loaded as a GPT-2"):
            model_config = GPTConfig.from_pretrained(source)
            vocab_size = model_config.vocab_size
            tokenizer = load_tokenizer(source, vocab_size)
    elif "vocab_size" in flags:
        tokenizer = gpt2_tokenizer().first(flags["vocab_size"])
    if record is not None:
        machine_flags = record["flags"] | machine_flags
        config = resumed_config(flags, machine_flags, resume_from, record, ranks)
    else:
        if source is not None:
            options = pretrained_options(flags, model_config)
        config = new_config(flags, options)
    return Plan(flags, config, tokenizer, vocab_size, resume_from, record, lines, machine_flags)


def find_checkpoint(flags: dict) -> tuple[Path | None, dict | None, list[str]]:
    """Return the checkpoint to resume, its record, and what to print about others; Nones for a new run."""
    if "resume" not in flags:
        return None, None, []
    if flags["resume"] == "newest":
        log_dir = Path(flags.get("log_dir", TrainConfig.log_dir))
        directory, record, skipped = checkpoint.newest(log_dir)
        notes = [f"skipped a checkpoint: {reason}" for reason in skipped]
        if directory is None:
            notes.append(f"no checkpoint in {log_dir}/: this is a new run")
        return directory, record, notes
    directory = Path(os.path.realpath(flags["resume"])) if os.path.islink(flags["resume"]) else Path(flags["resume"])
    # It may be the directory of a run, or a step that does not exist: name the checkpoints that are there.
    others = checkpoint.checkpoints(directory if directory.exists() else directory.parent)
    if others:
        found = ", ".join(map(str, others.values()))
        raise UserError(f"--resume {directory}: is not a checkpoint; there is {found}")
    try:
        return directory, checkpoint.verify(directory), []
    except checkpoint.CheckpointError as e:
        raise UserError(f"--resume {directory}: {e}; --resume alone takes the newest that verifies") from None


def resumed_config(flags: dict, machine_flags: dict, resume_from: Path, record: dict, ranks: int) -> TrainConfig:
    """Return the options of a run that is resumed: the flags, over what the checkpoint says."""
    try:
        check_values(TrainConfig, record["config"] | machine_flags)
        TrainConfig(**record["config"])
    except (TypeError, UserError) as e:
        raise UserError(f"--resume {resume_from}: checkpoint.json: {e}") from None
    values = dict(record["config"], dry_run=False, resume=None)
    # The run continues where its checkpoint is, and not where that was written: it may be a copy.
    in_log_dir = re.fullmatch(r"step_\d+", resume_from.name)
    values["log_dir"] = str(resume_from.parent) if in_log_dir else TrainConfig.log_dir
    if flags["resume"] != "newest":
        values["wandb"] = None  # the checkpoint may be somebody else's
    if not Path(values["data"]).exists():
        values["data"] = default_data()
    if "preset" in flags and flags["preset"] != values["preset"]:
        values |= PRESETS[flags["preset"]]
    values["device"] = choose_device(machine_flags.get("device", "auto"))
    values["dtype"] = machine_flags.get("dtype", "auto")
    if (values["device"], ranks) != (record["config"]["device"], record["ranks"]):  # another machine: decide anew
        for name in "compile", "micro_batch_size", "recompute", "shard":
            values[name] = machine_flags.get(name, getattr(TrainConfig, name))
    values |= {name: value for name, value in flags.items() if name != "device"}
    return TrainConfig(**values)


def pretrained_options(flags: dict, config: GPTConfig) -> dict:
    """Return the options that the model of --init_from sets. Raise UserError if flags contradict them."""
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "bias")}
    for name, value in (shape | dict(vocab_size=config.vocab_size)).items():
        if flags.get(name, value) != value:
            raise UserError(f"--{name} {flags[name]}: the model of --init_from has {value}; leave the flag out")
    if flags.get("seq_len", 1) > config.block_size:
        raise UserError(f"--seq_len {flags['seq_len']}: the model of --init_from has {config.block_size} positions")
    return shape | dict(seq_len=config.block_size, max_lr=3e-5, min_lr=None, warmup_steps=None)


def new_config(flags: dict, options: dict) -> TrainConfig:
    """Return the options of a new run: the flags, over --init_from, over the preset, over the defaults."""
    device = choose_device(flags.get("device", "auto"))
    data = flags.get("data", default_data())
    defaults = dict(cpu="tiny", cuda="gpt2" if Path(data).is_dir() else "small")
    preset = flags.get("preset", defaults.get(device, "small"))
    values = dict(preset=preset, data=data) | PRESETS[preset] | options
    if "max_steps" in flags:
        values.pop("warmup_steps", None)  # a preset's warm-up is for its own length
    return TrainConfig(**(values | flags | dict(device=device)))


def default_data() -> str:
    """Return the prepared shards if there are any, else the text that comes with the project."""
    shards = ROOT / "edu_fineweb10B"
    path = shards if [*shards.glob("*train*"), *shards.glob("part-*")] else ROOT / "input.txt"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def make_plan(plan: Plan, data: Data, dist: Distributed) -> Plan:
    """Return the plan with nothing left open. Raise UserError if the run cannot be made."""
    config = resolve_schedule(plan.config, data)
    if config.n_embd % config.n_head:
        divisor = divisor_up_to(config.n_head, config.n_embd)
        raise UserError(f"--n_head {config.n_head}: does not divide --n_embd {config.n_embd}; {divisor} would")
    vocab_size = plan.vocab_size or data.tokenizer.vocab_size
    plan = replace(plan, config=config, vocab_size=vocab_size, data_fingerprint=data.fingerprint)
    with torch.device("meta"):  # shapes alone, to count
        model = GPT(plan.model_config)
    config, reason = resolve_machine_options(config, model, dist)
    lines = summary(replace(plan, config=config), data, model, dist.size, reason) + plan.lines
    if plan.record is not None:
        changed = check_resume(config, data, plan, dist.size)
        lines.append(f"resumed {plan.resume_from} at step {plan.record['step']}: {changed}")
    return replace(plan, config=config, lines=lines)


def resolve_schedule(config: TrainConfig, data: Data) -> TrainConfig:
    """Return the configuration with the number of steps and the learning rate decided. Raise UserError."""
    steps, min_lr, warmup = config.max_steps, config.min_lr, config.warmup_steps
    if steps is None:
        steps = 19073 if data.is_text or data.n_tokens >= 9.5e9 else max(1, data.n_tokens // config.total_batch_size)
    if min_lr is None:
        min_lr = config.max_lr if config.init_from else config.max_lr / 10
    if warmup is None:
        warmup = 0 if config.init_from else min(715, steps // 10)
    if min_lr > config.max_lr:
        raise UserError(f"--min_lr {min_lr:g}: larger than --max_lr {config.max_lr:g}")
    if warmup > steps > 0:
        raise UserError(f"--warmup_steps {warmup}: more than --max_steps {steps}")
    return replace(config, max_steps=steps, min_lr=min_lr, warmup_steps=warmup)


def resolve_machine_options(config: TrainConfig, model: GPT, dist: Distributed) -> tuple[TrainConfig, str | None]:
    """Return the configuration with all machine options decided, and why it is not compiled."""
    shards = dist.size if config.shard == "on" else 1
    if shards > 1 and config.optimizer == "muon":
        raise UserError("--shard: Muon needs whole matrices; use --optimizer adamw, or no --shard")
    free = free_memory(config.device, dist.local_size)
    weights = 4 * model.num_parameters()
    needed = training_bytes(model, shards) if config.max_steps and config.optimizer == "adamw" else weights
    if needed > free:
        hint = what_would_fit(model, free, dist.size) if needed > weights else "a smaller --preset"
        sizes = f"it takes {needed / 1e9:,.1f} GB a rank, and {free / 1e9:,.1f} GB are free"
        raise UserError(f"the model does not fit into memory: {sizes}; try {hint}")
    recompute = config.recompute
    if recompute == "auto":
        recompute = "off" if estimate_micro_batch_size(model, free, "off", shards) >= 1 else "on"
    dtype = choose_dtype(config.dtype, config.device)
    T, ranks, total = config.seq_len, dist.size, config.total_batch_size
    sequences, rest = divmod(total, T * ranks)  # of each rank
    if rest:
        near = " and ".join(str(n * T * ranks) for n in (sequences, sequences + 1) if n)
        hint = f", or {divisor_up_to(ranks, total // T)} ranks" if ranks > 1 and total % T == 0 else ""
        product = f"{T * ranks} = seq_len {T} × {ranks} rank{'s' * (ranks > 1)}"
        raise UserError(f"--total_batch_size {total}: not a multiple of {product}; {near} would be{hint}")
    B = config.micro_batch_size or divisor_up_to(estimate_micro_batch_size(model, free, recompute, shards), sequences)
    if sequences % B:
        hint = f"{divisor_up_to(B, sequences)} would"
        raise UserError(f"--micro_batch_size {B}: does not divide the {sequences} sequences of a step and rank; {hint}")
    # The whole run counts, and not what is left of it: a resumed run is compiled if the first part was.
    flops = model.flops_per_token() * config.total_batch_size * config.max_steps
    reason = eager_reason(config.compile, config.device, flops / dist.size)
    compile, shard = "off" if reason else "on", "on" if shards > 1 else "off"
    return replace(config, dtype=dtype, micro_batch_size=B, compile=compile, recompute=recompute, shard=shard), reason


def divisor_up_to(limit: int, n: int) -> int:
    """Return the largest divisor of n that is at most limit, or 1."""
    divisors = {d for small in range(1, math.isqrt(n) + 1) if n % small == 0 for d in (small, n // small)}
    return max(d for d in divisors if d == 1 or d <= limit)


def training_bytes(model: GPT, shards: int) -> float:
    """Return the bytes of a rank's weights, gradients and Adam's moments: 16 a parameter. Sharding divides 12 of them.
    The others hold a rank's gradients while it accumulates them, or the whole weights in an evaluation."""
    return (16 if shards == 1 else 12 / shards + 4) * model.num_parameters()


def estimate_micro_batch_size(model: GPT, free: float, recompute: str, shards: int) -> int:
    """Estimate the largest micro-batch that fits into this many bytes. (One that is too large is halved later.)

    A token's activations in mixed precision take about 48 bytes a channel and layer, and its logits, with their copies
    and gradients, 18 bytes an entry. With recomputation, one layer at a time has its activations, and all keep their
    input, 4 bytes a channel. A fifth of what training_bytes leaves is for temporary tensors and fragmentation.
    """
    c = model.config
    bytes_per_channel = 48 * c.n_layer if recompute == "off" else 48 + 4 * c.n_layer
    bytes_per_token = bytes_per_channel * c.n_embd + 18 * c.vocab_size
    return int(0.8 * (0.95 * free - training_bytes(model, shards)) / (bytes_per_token * c.block_size))


def what_would_fit(model: GPT, free: float, ranks: int) -> str:
    """Return the options with which a model too large for this many bytes a rank is estimated to fit."""
    for n in (ranks * 2**i for i in range(10)):
        if (B := estimate_micro_batch_size(model, free, "on", n)) >= 1:
            return f"--shard --recompute on {n} ranks with as much memory each (micro-batch {B})"
    return "a smaller --preset"


def check_resume(config: TrainConfig, data: Data, plan: Plan, ranks: int) -> str:
    """Return what has changed since the checkpoint. Raise UserError if it would be another run."""
    missing = asdict(TrainConfig()) | dict(recompute="off")  # options that an older checkpoint lacks
    old = missing | plan.record["config"] | dict(ranks=plan.record["ranks"])
    new = asdict(config) | dict(ranks=ranks)
    changed = {k: f"{k} {old[k]} → {new[k]}" for k in new if old[k] != new[k] and k not in ("resume", "dry_run")}
    forbidden = [line for name, line in changed.items() if name in RESUME_INVARIANT]
    if plan.record["data"] != data.fingerprint:
        forbidden.append(f"the data {old['data']} → {new['data']}, which has other tokens")
    if forbidden:
        options = ", ".join(forbidden)
        raise UserError(f"--resume {plan.resume_from}: these may not change in a run: {options}; start a new run?")
    return ", ".join(changed.values()) or "nothing changed"


def summary(plan: Plan, data: Data, model: GPT, ranks: int, reason: str | None) -> list[str]:
    """Return the first lines of a run: what was chosen, and why. reason says why it is not compiled."""
    config, new = plan.config, plan.record is None
    preset_origin = f" (default for {config.device})" if new and "preset" not in plan.flags else ""
    model_origin = f", from {config.init_from}" if config.init_from else ""
    kind = "a text" if data.is_text else f"{len(data.train)} shards"
    epochs = config.max_steps * config.total_batch_size / max(1, data.n_tokens)  # DataLoaderLite refuses 0
    steps = f"{config.max_steps:,} steps of {config.total_batch_size:,} tokens, {epochs:.2f} epochs"
    steps += "; nothing is written" if config.dry_run else f"; log and checkpoints in {config.log_dir}/"
    grad_accum_steps = config.total_batch_size // (config.micro_batch_size * config.seq_len * ranks)
    memory = ", sharded" * (config.shard == "on") + ", recomputing activations" * (config.recompute == "on")
    compiling = f"not compiled: {reason}" if reason else "compiling (the first time takes a minute)"
    lines = [
        f"preset   {config.preset}{preset_origin}",
        f"model    {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, context "
        f"{config.seq_len}, {model.num_parameters() / 1e6:,.2f}M parameters{model_origin}",
        f"data     {config.data}, {kind} of {data.n_tokens:,} training tokens, vocabulary of {plan.vocab_size:,}",
        f"run      {steps if config.max_steps else 'no steps: it only evaluates, and writes nothing'}",
        f"compute  {ranks} × {config.device}, {config.dtype}, {grad_accum_steps} × {config.micro_batch_size} sequences "
        f"a step{memory}, {compiling}",
    ]
    if new and not config.init_from:
        loss = f"begins near ln {plan.vocab_size:,} = {math.log(plan.vocab_size):.2f}: each token is equally likely"
        lines.append(f"loss     {loss}")
    wrapping = dict(subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)
    return [textwrap.fill(line, 80, **wrapping) for line in lines]

"""Train GPT-2: the same script on a laptop and on eight GPUs.

python train_gpt2.py                               the default for this machine and the data that is there
torchrun --nproc_per_node=8 train_gpt2.py          one process per GPU
python train_gpt2.py --init_from gpt2 --data my.txt    fine-tune on a text of yours
python train_gpt2.py --resume                      go on where the run in log/ stopped
"""

from errors import UserError

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import hellaswag
from data import DataLoaderLite, inputs_and_targets, open_data
from model import GPT, GPTConfig
from recipe import TrainConfig, learning_rate
from runtime import checkpoint
from runtime.device import if_it_fits, keep_pages, out_of_memory, peak_flops, peak_memory, why_eager
from runtime.distributed import Ranks, Signals, disk_error
from runtime.options import parse_flags
from runtime.plan import changes, default_data, divisor_up_to, find_save, request, resolve
from runtime.runlog import RunLog, facts, introduce, is_due
from tokens import ShardError, first_line, gpt2_encoding


def build(
    config: TrainConfig, pretrained: GPT | None, resumed: Path | None, ranks: Ranks
) -> tuple[GPT, torch.optim.AdamW, torch.amp.GradScaler]:
    """The model, its optimizer and the float16 scaler: from the save, from --init_from, or new. Rank 0 alone reads, for
    hosts may share no disk; then all get its tensors. Raises UserError."""

    def read() -> tuple[GPT, dict | None]:
        if resumed is not None:
            return checkpoint.load(resumed)
        names = "n_layer", "n_head", "n_embd", "dropout", "bias"
        torch.manual_seed(config.seed)
        return pretrained or GPT(GPTConfig(config.seq_len, **{name: getattr(config, name) for name in names})), None

    def place() -> GPT:
        placed = model or GPT(shape)
        placed.adapt(config.seq_len, config.dropout)
        return placed.to(ranks.device)

    model, state = ranks.each(lambda: if_it_fits(read, "the model") if ranks.rank == 0 else (None, None))
    shape = ranks.first(lambda: model.config)
    model = ranks.each(lambda: if_it_fits(place, "the model"))
    optimizer = model.configure_optimizers(
        config.weight_decay,
        config.max_lr,
        muon_ratio=config.muon_ratio if config.optimizer == "muon" else None,
        muon_dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
    )
    scaler = torch.amp.GradScaler(config.device, enabled=config.dtype == "float16")
    if resumed is not None:
        layout = ranks.first(lambda: tree_map_only(torch.Tensor, lambda t: t.to("meta"), state))
        if ranks.rank > 0:
            state = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cpu"), layout)
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    if ranks.size > 1:
        moments = [t for entry in optimizer.state.values() for t in entry.values()]
        for tensor in [p.data for p in model.parameters()] + moments:
            dist.broadcast(tensor, src=0)
    return model, optimizer, scaler


def prepare(
    raw_model: GPT,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    ranks: Ranks,
    amp: torch.autocast,
    compiled: bool,
) -> tuple[nn.Module, int, list[str]]:
    """Compile, wrap for DDP, and try an evaluation's pass and a step's; if one fails, with a smaller micro-batch, or
    uncompiled. No rank waits for another in the trial, after which all agree. Returns the module to train with, the
    micro-batch, and what there is to say."""
    B, T = config.micro_batch_size, config.seq_len
    notes = []
    if ranks.size > 1:
        ddp = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)

    def trial() -> None:  # whose end, well or not, ends all that it has made
        moments = [torch.empty_like(p) for p in raw_model.parameters() for _ in range(0 if optimizer.state else 2)]
        if B * T * ranks.size < config.total_batch_size:  # the gradients of micro-batches before
            for p in raw_model.parameters():
                p.grad = torch.zeros_like(p)
        x, y = inputs_and_targets(torch.zeros(B, T + 1, dtype=torch.int32), ranks.device)
        with torch.no_grad(), amp:
            raw_model.eval()(x, y)
        model.train().require_backward_grad_sync = False
        with amp:
            _, loss = model(x, y)
        loss.backward()
        del moments

    while True:
        model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
        if ranks.size > 1:  # compiled inside DDP the graph is cut at its buckets, so that sending overlaps computing
            ddp.module, model = model, ddp
        no_memory, no_compiler = False, ""
        try:
            trial()
        except Exception as e:
            no_memory = out_of_memory(e)
            if not no_memory and compiled and isinstance(e, torch._dynamo.exc.TorchDynamoException):
                no_compiler = first_line(e)
            elif not no_memory:
                raise
        raw_model.zero_grad(set_to_none=True)
        any_no_memory, any_no_compiler = ranks.sum(no_memory, bool(no_compiler))
        if any_no_compiler:
            compiled = False
            notes.append(f"not compiled, torch.compile failed: {no_compiler or 'on another rank'}")
        elif not any_no_memory:
            break
        elif B == 1:
            raise UserError(f"out of memory with one row of {T} tokens: try a smaller --preset or --seq_len")
        else:
            B = divisor_up_to(B // 2, config.total_batch_size // (T * ranks.size))
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    if B < config.micro_batch_size:
        notes.append(f"out of memory: micro-batch {config.micro_batch_size} → {B}, the total batch stays")
    return model, B, notes


def dropout_seed(config: TrainConfig, step: int, micro_batch: int) -> int:
    """For the step's micro-batch of that number, counted over all ranks: so there is no random state to save."""
    return int(np.random.SeedSequence((config.seed, step, micro_batch)).generate_state(1)[0])


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Iterator[torch.Tensor],
    step: int,
    config: TrainConfig,
    ranks: Ranks,
    amp: torch.autocast,
    signals: "Signals",
) -> tuple[float, float]:
    """One optimizer step over total_batch_size tokens. Returns the loss before it, over all of them, and the norm of
    its gradient. Raises UserError, with no weight changed on any rank, if either is not finite."""
    accumulate = config.total_batch_size // (config.micro_batch_size * config.seq_len * ranks.size)
    loss_sum = torch.zeros((), device=ranks.device)
    for m in range(accumulate):
        x, y = inputs_and_targets(next(micro_batches), ranks.device)
        torch.manual_seed(dropout_seed(config, step, m * ranks.size + ranks.rank))
        model.require_backward_grad_sync = m == accumulate - 1  # DDP: average over the ranks once, with the last
        with amp:
            _, loss = model(x, y)
        loss = loss / accumulate
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    # The one time in a step that the host waits for the device: all ranks learn of one's NaN, or its signal to stop.
    loss, norm, *signals.seen = ranks.sum(loss_sum / ranks.size, norm / ranks.size, *signals.received)
    # To a float16 scaler an infinite norm is nothing unusual: it skips the step and halves the scale, down to 1.
    finite = math.isfinite(norm) or (scaler.is_enabled() and scaler.get_scale() >= 1)
    if not (math.isfinite(loss) and finite):
        raise UserError(f"step {step}: loss {loss:g}, gradient norm {norm:g}; stopped before any weight changed", 3)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def evaluate(model: GPT, loader: DataLoaderLite, config: TrainConfig, ranks: Ranks, amp: torch.autocast) -> float:
    """Mean loss over the first eval_tokens of the validation rows: the same rows whatever the micro-batch and ranks."""
    n = min(loader.n_rows, max(1, config.eval_tokens // config.seq_len))
    B = config.micro_batch_size
    total = torch.zeros((), device=ranks.device)
    for first in range(ranks.rank * B, n, ranks.size * B):
        numbers = list(range(first, min(first + B, n)))
        x, y = inputs_and_targets(loader.rows(numbers), ranks.device)
        with amp:
            _, loss = model(x, y)
        total += loss * len(numbers)
    (total,) = ranks.sum(total)
    return total / n


def load_exam(seq_len: int) -> tuple[list[hellaswag.Example] | None, str | None]:
    """HellaSwag's examples, or None and why: a run goes on without. Raises UserError if they do not fit."""
    try:
        examples = hellaswag.read_examples(hellaswag.find_file(), hellaswag.render_nanogpt)
        hellaswag.make_rows(examples, seq_len)
        return examples, None
    except UserError as e:
        if e.status == 2:
            raise UserError(f"--hellaswag_every: {e}; 0 leaves the exam out") from None
        return None, f"no HellaSwag exam: {e}"


def take_exam(
    model: GPT, exam: list[hellaswag.Example], config: TrainConfig, ranks: Ranks, amp: torch.autocast
) -> float:
    """The share of HellaSwag that the model gets right by build-nanogpt's acc_norm, each rank doing its part."""
    with amp:
        scores, _ = hellaswag.score(model, exam, config.micro_batch_size * config.seq_len, ranks.rank, ranks.size)
    return hellaswag.judge(ranks.add(scores).cpu(), exam).acc_norm / len(exam)


def draw_samples(model: GPT, device: torch.device) -> list[str]:
    """What the model makes of a beginning: four continuations by 32 tokens, always from the same random numbers."""
    encoding = gpt2_encoding()
    prompt = encoding.encode_ordinary("Hello, I'm a language model,")
    idx = torch.tensor([prompt] * 4, device=device)
    rows = model.generate(idx, 32, top_k=50, generator=torch.Generator(device).manual_seed(42))
    return [encoding.decode(row) for row in rows.tolist()]


def forecast(
    seconds: float, first_step: int, eval_rows: int, config: TrainConfig, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> list[str]:
    """What a run would take from this step on, if a step takes so many seconds: time, memory, disk."""
    eval_tokens = min(config.eval_tokens, eval_rows * config.seq_len)
    evaluations = sum(
        is_due(config.eval_every, step, config.max_steps) for step in range(first_step, config.max_steps + 1)
    )
    evaluation = seconds / 3 * eval_tokens / config.total_batch_size  # forward alone is a third of the work
    total = timedelta(seconds=round(seconds * (config.max_steps - first_step) + evaluations * evaluation))
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    save = sum(t.nbytes for t in weights + [t for entry in optimizer.state.values() for t in entry.values()])
    peak = peak_memory(ranks.device)
    return [
        f"time     {total}: {seconds:.3g} s a step, {evaluation:.3g} s an evaluation, exams and samples not counted",
        f"memory   {f'{peak / 1e9:.2f} GB a rank, at the peak' if peak else 'n/a here'}",
        f"disk     {(config.keep + 2) * save / 1e9:.2f} GB for {config.keep} saves, the best, and one being written",
        "this was a dry run: nothing is written",
    ]


def train(given: dict, ranks: Ranks) -> int:
    """A whole run, from flags to the last save; returns the exit status. Raises UserError."""
    torch.set_float32_matmul_precision("high")  # TF32, for what is left in float32
    # On a CPU: compiled, its threads would else add up the embedding's gradient in any order, and slowly.
    torch.use_deterministic_algorithms(ranks.device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    resumed, record, notes = ranks.first(lambda: find_save(given))
    init_from = None if resumed else given.get("init_from")
    reads = init_from and ranks.rank == 0
    pretrained = ranks.each(lambda: checkpoint.pretrained(init_from, "--init_from") if reads else None)
    requested = ranks.first(lambda: request(given, resumed, record, pretrained and pretrained.config, ranks))
    path = ranks.first(lambda: requested.data or default_data())
    data = ranks.each(lambda: open_data(Path(path)))
    config = ranks.first(lambda: replace(resolve(requested, data, ranks), data=path))
    loader = ranks.each(lambda: DataLoaderLite(data.train, config.seq_len, config.seed, shuffle_first=data.is_text))
    val_loader = ranks.each(lambda: DataLoaderLite(data.val, config.seq_len))
    step = first_step = record["step"] if record else 0
    if record is not None:
        different = ranks.first(lambda: changes(config, data, ranks, resumed, record))
        notes.append(f"resumed {resumed} at step {step}: {different}")
    log = ranks.each(lambda: RunLog(config) if ranks.rank == 0 else None)
    say = log.say if log else lambda line: None

    raw_model, optimizer, scaler = build(config, pretrained, resumed, ranks)
    amp = torch.autocast(config.device, getattr(torch, config.dtype), enabled=config.dtype != "float32")
    exam = None
    if config.hellaswag_every and not config.dry_run:
        exam, problem = ranks.first(lambda: load_exam(config.seq_len))
        notes += [problem] if problem else []
    tokens_left = (config.max_steps - step) * config.total_batch_size
    eager = ranks.first(lambda: why_eager(config, ranks.device, raw_model.flops_per_token() * tokens_left / ranks.size))
    for line in introduce(config, given, resumed, data, ranks, raw_model, eager) + notes:
        say(line)
    if tokens_left:
        model, B, notes = prepare(raw_model, optimizer, config, ranks, amp, compiled=eager is None)
        config = replace(config, micro_batch_size=B)
        for line in notes:
            say(line)
    if config.max_steps and not config.dry_run:  # from here on the run writes; one of no steps only evaluates
        ranks.first(lambda: log.open(resumed, step, facts(config, ranks, raw_model, data)))

    signals, saver = Signals(), checkpoint.Saver()

    def save() -> None:
        saver.wait()
        state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        info = dict(requested=asdict(replace(requested, resume=None)), config=asdict(config))
        info |= dict(data=data.fingerprint, ranks=ranks.size)
        if_it_fits(
            lambda: saver.start(partial(write, step, info), raw_model, state), "the copy that a save is made from"
        )

    def write(step: int, info: dict, model: GPT, state: dict) -> None:
        try:
            say(f"step {step}: saved {checkpoint.save(log.dir, step, model, state, info)}")
            for line in checkpoint.prune(log.dir, config.keep, log.best_saved_step(before=step)):
                say(line)
        except BaseException:
            signals.received[-1] = 1.0  # all ranks stop at the end of their step
            raise

    def due(every: int) -> bool:
        return is_due(every, step, config.max_steps)

    def examine() -> None:
        raw_model.eval()
        if due(config.eval_every):
            loss = evaluate(raw_model, val_loader, config, ranks, amp)
            if log:
                log.result(step, "val", loss, "validation loss")
        if due(config.hellaswag_every) and exam is not None:
            accuracy = take_exam(raw_model, exam, config, ranks, amp)
            if log:
                log.result(step, "hella", accuracy, "HellaSwag accuracy")
        if due(config.sample_every) and log:
            with amp:
                for text in draw_samples(raw_model, ranks.device):
                    say(f"  > {text!r}")
        raw_model.train()

    B, T, W = config.micro_batch_size, config.seq_len, ranks.size
    micro_batches = loader.micro_batches(step * (config.total_batch_size // T) + ranks.rank * B, B, stride=W * B)
    peak = peak_flops(ranks.device, config.dtype)

    def take_step() -> tuple[float, float, float]:
        started = time.perf_counter()
        loss, norm = train_step(model, optimizer, scaler, micro_batches, step, config, ranks, amp, signals)
        return loss, norm, time.perf_counter() - started

    try:
        if config.dry_run and tokens_left:
            seconds = sorted(take_step()[2] for _ in range(4))[1]  # the first is slow, the fastest may be luck
            for line in forecast(seconds, step, val_loader.n_rows, config, optimizer, ranks):
                say(line)
            return 0
        while True:
            last, stopping = step == config.max_steps, signals.stopping
            if signals.failed:
                ranks.first(saver.wait)  # raises what the save failed of
            if step > first_step and (last or stopping or due(config.save_every)):
                ranks.first(save)
            if stopping:
                ranks.first(saver.wait)
                say(f"stopped by {stopping.name} after step {step - 1}; add --resume to go on")
                return 128 + stopping
            if any(map(due, (config.eval_every, config.hellaswag_every, config.sample_every))):
                examine()
            if last:
                ranks.first(saver.wait)
                signals.seen = ranks.sum(*signals.received)
                if log and log.files:
                    log.draw()
                return 128 + signals.stopping if signals.stopping else 0
            loss, norm, seconds = take_step()
            mfu = peak and config.total_batch_size * raw_model.flops_per_token() / (seconds * peak * W)
            if log:
                log.train(step, loss, learning_rate(step, config), norm, seconds, mfu)
            step += 1
    finally:
        if error := saver.close():
            complain(error)
        signals.restore()
        micro_batches.close()
        if log:
            log.close()


def complain(error: object) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"train_gpt2.py: error: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit status."""
    try:
        keep_pages()
        given = parse_flags(argv)
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and not given.get("dry_run")
        if restarts and given.get("resume") != "newest":
            raise UserError("torchrun --max-restarts: add --resume without DIR; a restart then takes the newest save")
        ranks = Ranks.start(given.get("device", "auto"), given.get("dist_timeout", TrainConfig.dist_timeout))
        return train(given, ranks)
    except ShardError as e:  # which the rank that read the tokens found alone
        complain(e)
        return 2
    except UserError as e:  # which all ranks know of: one speaks on each host
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            complain(e)
        return e.status
    except OSError as e:
        complain(disk_error(e))
        return 4
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "/gloo/" in str(e)):
            raise
        said = f"rank {os.environ['RANK']} has lost another: {first_line(e)}"
        complain(f"{said}; --resume goes on from the newest save")
        return 1
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

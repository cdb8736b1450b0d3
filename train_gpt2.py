"""Train GPT-2: the same script on a laptop and on eight GPUs.

python train_gpt2.py                                              defaults for this machine and the data on it
torchrun --standalone --nproc_per_node=8 train_gpt2.py            one process per GPU
python train_gpt2.py --init_from gpt2 --data my.txt               fine-tune on your own text
python train_gpt2.py --resume                                     resume the run in log/
"""

from errors import UserError, first_line, print_error, run_script
import contextlib
import gc
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import hellaswag
from data import Data, DataLoaderLite, inputs_and_targets, open_data
from model import GPT
from recipe import PRESETS, TrainConfig, learning_rate
from runtime import checkpoint, sharding
from runtime.device import (
    classify_error,
    disable_cudnn_sdp,
    oom_as_user_error,
    peak_flops,
    peak_memory,
    sdpa_without_cudnn,
    tune_malloc,
)
from runtime.distributed import Distributed, StopSignals, read_environment
from runtime.options import parse_options
from runtime.plan import Plan, divisor_up_to, make_plan, merge_flags
from runtime.runlog import RunLog, run_metadata
from scoring import Scorer, make_rows
from tokens import gpt2_tokenizer

PRESET_LINES = "\n".join(
    f"  {name:12}" + " ".join(f"{k}={v}" for k, v in preset.items()) for name, preset in PRESETS.items()
)
EPILOG = f"""
The defaults above are the published recipe of GPT-2 124M. A preset overrides them, and your flags override both:
{PRESET_LINES}

Ctrl-C or SIGTERM: the run finishes its step, saves a checkpoint and stops; --resume continues it. A second one stops
the run at once. Exit status: 0 done, 2 wrong flags or data, 3 loss not finite, 4 disk or network, 130 Ctrl-C,
143 SIGTERM, 1 other errors.

The full reproduction: python fineweb.py && torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset gpt2
"""


@dataclass(frozen=True)
class StepStats:
    """What an optimizer step reports: the mean loss of its tokens (nats) and the norm of its gradient, both before the
    update, its learning rate, and how long it took."""

    loss: float
    grad_norm: float
    lr: float
    seconds: float


class Trainer:
    """A training run on one of its ranks: data, model, optimizer, log, and the loop over the steps."""

    def __init__(self, plan: Plan, data: Data, dist: Distributed):
        self.plan, self.config, self.dist, self.sharded = plan, plan.config, dist, plan.config.shard == "on"
        self.step = plan.record["step"] if plan.record else 0  # the number of steps taken, and of the next one
        self.saved_step = self.step  # a resumed step is not saved again
        self.evaluated_step = self.step if plan.record and plan.record["evaluated"] else -1
        self.val_loss: float | None = None  # at evaluated_step
        self.stop_signal = 0  # number of the signal that all ranks stop for
        self.checkpoint_failed = False  # on the main rank, which all ranks know of
        dtype = getattr(torch, self.config.dtype)
        amp = dict(enabled=dtype != torch.float32, cache_enabled=not self.sharded)  # a cache keeps gathered weights
        self.autocast = torch.autocast(self.config.device, dtype, **amp)
        self.log = RunLog(self.config, dist.is_main)
        self.tokenizer = data.tokenizer
        with dist.agree():
            dist.set_device(self.config.device)
            if data.fingerprint != plan.data_fingerprint:
                raise UserError(f"--data {self.config.data}: rank {dist.rank} has other data than rank 0")
            T, seed = self.config.seq_len, self.config.seed
            vocab_size = data.tokenizer.vocab_size
            self.train_loader = DataLoaderLite(data.train, T, seed, data.is_text, vocab_size)
            self.val_loader = DataLoaderLite(data.val, T, vocab_size=vocab_size)
            self.n_val = min(self.val_loader.n_rows, max(1, self.config.eval_tokens // T))  # sequences of a validation
        self.build_model()
        for line in plan.lines:
            self.log.print(line)
        self.examples = dist.from_main(self.read_hellaswag)
        if self.step < self.config.max_steps:
            self.compile_and_fit()
        if self.config.max_steps and not self.config.dry_run:  # a run of no steps only evaluates
            metadata = run_metadata(self.config, dist.size, self.raw_model.num_parameters(), data.n_tokens)
            dist.from_main(lambda: self.log.open(self.step, plan.resume_from, metadata))
            peak = peak_flops(dist.device, self.config.dtype)
            self.log.peak_speed = peak and peak * dist.size / self.raw_model.flops_per_token()
        self.start_loading()
        self.writer = checkpoint.Writer(self.log.dir, self.config.keep, self.tokenizer, self.log.print)
        self.signals = StopSignals()

    def train(self) -> int:
        """Train up to max_steps, or until a signal; return the exit status."""
        while True:
            finished = self.step >= self.config.max_steps
            if self.checkpoint_failed:
                self.dist.from_main(self.writer.wait)  # raises on all ranks what went wrong
            if not self.stop_signal:
                self.run_evals()
            if self.step > self.saved_step and (finished or self.stop_signal or self.is_due(self.config.save_every)):
                self.save_checkpoint()
            if finished or self.stop_signal:
                return self.finish()
            stats = self.train_step()
            self.log.step(self.step, stats)
            self.step += 1

    def train_step(self) -> StepStats:
        """Take one optimizer step over total_batch_size tokens. Raise UserError, with no weight changed on any rank, if
        the loss or the norm of the gradient is not finite."""
        started = time.perf_counter()
        self.model.train()
        loss_sum = torch.zeros((), device=self.dist.device)
        for micro_step in range(self.grad_accum_steps):
            x, y = inputs_and_targets(next(self.micro_batches), self.dist.device)
            torch.manual_seed(dropout_seed(self.config.seed, self.step, micro_step * self.dist.size + self.dist.rank))
            # The gradients are averaged over the ranks once, with the last micro-step.
            self.set_gradient_sync(self.model, micro_step == self.grad_accum_steps - 1)
            with self.autocast:
                loss = self.model(x, y)
            loss = loss / self.grad_accum_steps
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        max_norm = self.config.grad_clip or math.inf  # an infinite one only measures the norm
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        if self.sharded:
            grad_norm = grad_norm.full_tensor()
        # The only time in a step that the host waits for the device. The gradients are averaged, so all ranks have the
        # same grad_norm. A signal or a failure of one rank reaches all.
        loss, grad_norm, sigterm, sigint, failed = self.dist.sum_scalars(
            loss_sum / self.dist.size, grad_norm / self.dist.size, *self.signals.received, self.writer.failed
        )
        self.stop_if_any(sigterm, sigint)
        self.checkpoint_failed = failed > 0
        # In float16 an infinite norm is normal while the scale is at least 1: the scaler skips the step and halves it.
        finite = math.isfinite(grad_norm) or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1)
        if not (math.isfinite(loss) and finite):
            values = f"loss {loss:g}, gradient norm {grad_norm:g}"
            raise UserError(f"step {self.step}: {values}; stopped before any weight changed", 3, agreed=True)
        lr = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(loss, grad_norm, lr, time.perf_counter() - started)

    def stop_if_any(self, sigterm: float, sigint: float) -> None:
        """Let all ranks stop before the next step if any of them has received a signal."""
        self.stop_signal = signal.SIGTERM if sigterm else signal.SIGINT if sigint else 0

    def run_evals(self) -> None:
        """Compute what is due at this step: validation loss, HellaSwag accuracy, samples."""
        if self.evaluated_step == self.step:  # before the checkpoint that was resumed
            return
        self.evaluated_step, self.val_loss = self.step, None
        if not any(map(self.is_due, (self.config.eval_every, self.config.hellaswag_every, self.config.sample_every))):
            return
        model = self.whole_model()
        if self.is_due(self.config.eval_every):
            self.val_loss = self.evaluate(model, self.n_val)
            bpb = self.val_loss / math.log(2) / self.bytes_per_token
            text = f"validation loss {self.val_loss:.4f}, {bpb:.4f} bits per byte"
            self.log.result(self.step, text, val=self.val_loss, bpb=bpb)
        if self.is_due(self.config.hellaswag_every) and self.examples:
            hella = self.evaluate_hellaswag(model)
            self.log.result(self.step, f"HellaSwag accuracy {hella:.4f}", hella=hella)
        if self.is_due(self.config.sample_every):
            for text in self.generate_samples(model):
                self.log.print_sample(self.step, text)
        self.stop_if_any(*self.dist.sum_scalars(*self.signals.received))  # evaluating may take minutes

    def whole_model(self) -> GPT:
        """Return the model to evaluate, on all ranks: not compiled, as batches differ in size, and not sharded, since
        ranks differ in their number of batches."""
        if not self.sharded:
            return self.raw_model.eval()
        weights = {name: p.full_tensor() for name, p in self.raw_model.state_dict().items()}
        return GPT.from_weights(self.raw_model.config, weights).eval()

    @torch.no_grad()
    @sdpa_without_cudnn()
    def evaluate(self, model: GPT, n_sequences: int) -> float:
        """Return the mean loss over the first n validation sequences: the same ones for any micro-batch and ranks."""
        n, B = min(self.val_loader.n_rows, n_sequences), self.config.micro_batch_size
        total = torch.zeros((), device=self.dist.device)
        for first in range(self.dist.rank * B, n, self.dist.size * B):
            rows = self.val_loader.rows(first, min(B, n - first))
            x, y = inputs_and_targets(rows, self.dist.device)
            with self.autocast:
                loss = model(x, y)
            total += loss * len(rows)
        (total,) = self.dist.sum_scalars(total)
        return total / n

    @cached_property
    def bytes_per_token(self) -> float:
        """Return the mean number of bytes of the text that a target of the validation stands for."""
        targets = self.val_loader.read(1, self.n_val * self.config.seq_len)
        return max(1, self.tokenizer.token_bytes[targets].sum()) / len(targets)

    def evaluate_hellaswag(self, model: GPT) -> float:
        """Return the fraction of HellaSwag that the model gets right, by build-nanogpt's acc_norm."""
        batch_tokens = self.config.micro_batch_size * self.config.seq_len
        with self.autocast:
            scores = Scorer(model, batch_tokens, self.dist).score(self.examples)
        return hellaswag.compute_accuracy(scores, self.examples).acc_norm / len(self.examples)

    @sdpa_without_cudnn()
    def generate_samples(self, model: GPT) -> list[str]:
        """Return continuations by 32 tokens, always from the same random numbers: of a customary prompt, and of the
        first tokens of the validation data."""
        prompts = (
            self.tokenizer.encode("Hello, I'm a language model,"),
            self.val_loader.read(0, min(16, self.config.seq_len)),
        )
        generator = torch.Generator(self.dist.device).manual_seed(42)
        texts = []
        for prompt in prompts:
            idx = torch.tensor(prompt[None].astype(int), device=self.dist.device)  # (1, T)
            with self.autocast:
                (ids,) = model.generate(idx, 32, top_k=50, generator=generator).tolist()
            texts.append(self.tokenizer.encoding.decode(ids))
        return texts

    def save_checkpoint(self) -> None:
        """Copy the state and write it in a thread. Raise UserError if the weights give no finite loss."""
        evaluated = self.evaluated_step == self.step
        val_loss = self.val_loss if evaluated else None
        # What the last step has made may not be finite. Where no validation is due, one batch shows it.
        n = self.config.micro_batch_size * self.dist.size
        loss = self.evaluate(self.whole_model(), n) if val_loss is None else val_loss
        if not math.isfinite(loss):
            message = f"the validation loss is {loss:g} after step {self.step - 1}; no checkpoint is written"
            raise UserError(f"step {self.step}: {message}; try a lower --max_lr", 3, agreed=True)
        record = dict(step=self.step, validation_loss=val_loss, evaluated=evaluated, ranks=self.dist.size)
        record |= dict(config=asdict(self.config), flags=self.plan.machine_flags, data=self.plan.data_fingerprint)
        self.dist.from_main(self.writer.wait)  # memory may not hold two copies
        state = dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
        weights, state = self.dist.gather_tree((self.raw_model.state_dict(), state))
        config = self.raw_model.config
        self.dist.from_main(lambda: self.writer.start(config, weights, state, record, self.log.contents()))
        self.saved_step = self.step

    def finish(self) -> int:
        """Wait for the last checkpoint; return the exit status."""
        self.dist.from_main(self.writer.wait)
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            self.log.print(f"stopped by {name} after step {self.step - 1}; add --resume to continue")
            return 128 + self.stop_signal
        self.dist.from_main(self.log.finish)
        # A signal that came while the last checkpoint was written still sets the exit status.
        sigterm, sigint = self.dist.sum_scalars(*self.signals.received)
        return 143 if sigterm else 130 if sigint else 0

    def is_due(self, every: int) -> bool:
        """Return whether something that is done every N steps, and at the end, is done at this step."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.max_steps)

    def dry_run(self) -> int:
        """Run four steps and print what the run would take from here on: time, memory, disk."""
        config = self.config
        self.signals.restore()  # there is nothing to save
        if self.step >= config.max_steps:
            self.log.print("nothing is left to run")
            return 0
        seconds = sorted(self.train_step().seconds for _ in range(4))[1]  # the first is slow, the fastest may be luck
        steps = config.max_steps - self.step
        evaluations = math.ceil(steps / config.eval_every) + 1 if config.eval_every else 0
        evaluation = self.measure_evaluation() if evaluations else 0.0
        total = timedelta(seconds=round(seconds * steps + evaluations * evaluation))
        state = [t for entry in self.optimizer.state.values() for t in entry.values()]
        size = sum(t.numel() * t.itemsize for t in [*self.raw_model.parameters(), *state])
        peak = peak_memory(self.dist.device)
        speed = f"{seconds:.3g} s a step, {evaluation:.3g} s an evaluation, no HellaSwag or samples"
        disk = f"{(config.keep + 2) * size / 1e9:.2f} GB for {config.keep} checkpoints, the best, and one being written"
        self.log.print(f"time     {total}: {speed}")
        self.log.print(f"memory   {f'{peak / 1e9:.2f} GB a rank, at the peak' if peak else 'n/a here'}")
        self.log.print(f"disk     {disk}")
        self.log.print("this was a dry run: nothing is written")
        return 0

    def measure_evaluation(self) -> float:
        """Return the seconds that a validation takes, from one batch on each rank."""
        model, batch = self.whole_model(), self.config.micro_batch_size * self.dist.size
        self.evaluate(model, batch)  # warm up
        started = time.perf_counter()
        self.evaluate(model, batch)
        return (time.perf_counter() - started) * math.ceil(self.n_val / batch)

    # -- The parts of the setup

    def build_model(self) -> None:
        """Make model, optimizer and float16 scaler: from the checkpoint, from --init_from, or new. The main rank alone
        reads files, as hosts may share no disk; the others get its tensors."""
        config, dist, state = self.config, self.dist, None
        with dist.agree(), oom_as_user_error("the model"):
            torch.manual_seed(config.seed)
            if not dist.is_main or not (self.plan.resume_from or config.init_from):
                model = GPT(self.plan.model_config)
            elif self.plan.resume_from:
                model, state = checkpoint.load(self.plan.resume_from)
            else:
                model, _ = checkpoint.load_model("--init_from", config.init_from)
                model.crop_block_size(config.seq_len)
            model.set_dropout(config.dropout)
            model.set_recompute(config.recompute == "on")
            self.raw_model = self.model = model.to(dist.device)
        dist.broadcast_parameters(self.raw_model)
        mesh = sharding.shard(self.raw_model, dist) if self.sharded else None
        muon_dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        muon = dict(muon_lr_scale=config.muon_lr_scale, muon_dtype=muon_dtype) if config.optimizer == "muon" else {}
        self.optimizer = self.raw_model.configure_optimizers(config.weight_decay, config.max_lr, **muon)
        self.scaler = torch.amp.GradScaler(config.device, enabled=config.dtype == "float16")
        if self.plan.resume_from:
            state = dist.broadcast_tree(state, mesh)
            with dist.agree(), checkpoint.errors_of(f"{self.plan.resume_from}: cannot be loaded"):
                self.optimizer.load_state_dict(state["optimizer"])
                if self.scaler.is_enabled() and state["scaler"]:
                    self.scaler.load_state_dict(state["scaler"])

    def read_hellaswag(self) -> list[hellaswag.Question] | None:
        """Return HellaSwag's examples; None if they are not evaluated, or cannot be had, which costs one line."""
        if not self.config.hellaswag_every or self.config.dry_run:
            return None
        if self.tokenizer != gpt2_tokenizer():
            self.log.print("no HellaSwag evaluation: its tokens are GPT-2's")
            return None
        try:
            examples = hellaswag.read_examples(hellaswag.find_file(), hellaswag.render_nanogpt)
            make_rows(examples, self.config.seq_len + 1)  # raises if one does not fit
            return examples
        except UserError as e:
            if e.status == 2:
                raise UserError(f"--hellaswag_every: {e}; 0 leaves HellaSwag out") from None
            self.log.print(f"no HellaSwag evaluation: {e}")
            return None

    def compile_and_fit(self) -> None:
        """Compile, wrap in DDP and run a probe step. Out of memory, halve the micro-batch, then recompute activations.
        If cuDNN's attention fails, disable it; if compiling fails, run eager. No rank waits for another in a probe;
        they agree on its outcome afterwards."""
        config, dist = self.config, self.dist
        B, compiled, recompute = config.micro_batch_size, config.compile == "on", config.recompute == "on"
        self.model = self.wrap_model(self.raw_model, compiled)
        while True:
            problem, message = self.probe(B, compiled)
            out_of_memory, cudnn, compiler = dist.sum_scalars(*(problem == p for p in ("memory", "cudnn", "compiler")))
            if cudnn:
                disable_cudnn_sdp()
                reason = message if problem == "cudnn" else "on another rank"
                self.log.print(f"cuDNN attention is disabled, it failed: {reason}")
            elif compiler:
                compiled = False
                reason = message if problem == "compiler" else "on another rank"
                self.log.print(f"not compiled, torch.compile failed: {reason}")
                self.model = self.wrap_model(self.raw_model, compiled)
            elif not out_of_memory:
                break
            elif B > 1:
                B = divisor_up_to(B // 2, config.total_batch_size // (config.seq_len * dist.size))
            elif not recompute and self.plan.machine_flags.get("recompute") != "off":
                recompute = True
                self.raw_model.set_recompute(True)
                self.log.print("out of memory with one sequence: recomputing activations")
            else:
                hint = "try --shard on more ranks, or a smaller --preset or --seq_len"
                raise UserError(f"out of memory with one sequence of {config.seq_len} tokens: {hint}", agreed=True)
        if B < config.micro_batch_size:
            self.log.print(f"out of memory: micro-batch {config.micro_batch_size} → {B}, the total batch stays")
        if dist.size > 1 and not self.sharded:
            # After its first step with communication, DDP rebuilds its buckets, and with them the order in which
            # gradients are summed. Do that step here, so that all steps of a run, resumed or not, use the same order.
            problem, message = self.probe(B, compiled, communicate=True)
            if problem:
                raise UserError(f"the first communication failed: {message}; try a smaller --micro_batch_size")
        # From here on self.config, and no longer the plan, has what is used.
        on = {True: "on", False: "off"}
        self.config = replace(config, micro_batch_size=B, compile=on[compiled], recompute=on[recompute])

    def wrap_model(self, raw_model: GPT, compiled: bool) -> nn.Module:
        """Return the model to train: compiled inside DDP, which then communicates while the graph's parts compute."""
        model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
        if self.dist.size > 1 and not self.sharded:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model

    def probe(self, B: int, compiled: bool, communicate: bool = False) -> tuple[str | None, str]:
        """Run an evaluation and a training pass with B sequences. Return what failed (memory, cudnn, compiler; None if
        nothing did) and its message."""
        problem, message = None, ""
        try:
            self.use_memory_of_a_step(B, compiled, communicate)
        except Exception as e:  # not kept: its traceback holds that function's frame, and all that was made there
            problem, message = classify_error(e), first_line(e)
            if problem is None:
                raise
        self.raw_model.zero_grad(set_to_none=True)
        gc.collect()  # FSDP2's models contain reference cycles
        torch.cuda.empty_cache()  # does nothing without CUDA
        if problem and self.dist.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # no step uses what has failed
        return problem, message

    def use_memory_of_a_step(self, B: int, compiled: bool, communicate: bool) -> None:
        """Use a step's memory: the optimizer's moments, accumulated gradients, an evaluation and a training pass."""
        config, whole_model, model = self.config, self.raw_model, self.model
        if self.sharded:
            whole_model, sharded = sharding.models_to_probe(self.raw_model, self.dist)
            model = self.wrap_model(sharded, compiled)
        n_moments = 0 if self.optimizer.state else 2  # a resumed optimizer has its moments already
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(n_moments)]
        x, y = inputs_and_targets(torch.zeros(B, config.seq_len + 1, dtype=torch.int32), self.dist.device)
        with torch.no_grad(), self.autocast, sdpa_without_cudnn():
            whole_model.eval()(x, y)
        del whole_model
        model.train()
        accumulates, syncs = B * config.seq_len * self.dist.size < config.total_batch_size, [communicate]
        if self.sharded:
            syncs = [False, True] if accumulates else [True]  # a micro-step that accumulates, and one that averages
        elif accumulates and not communicate:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        for sync in syncs:
            self.set_gradient_sync(model, sync)
            with self.autocast:
                loss = model(x, y)
            loss.backward()
        del moments

    def set_gradient_sync(self, model: nn.Module, sync: bool) -> None:
        """Choose whether the next backward pass averages the gradients over the ranks, or adds to this rank's alone."""
        if self.sharded:
            model.set_requires_gradient_sync(sync)
        else:
            model.require_backward_grad_sync = sync  # DDP's; without DDP nothing reads it

    def start_loading(self) -> None:
        """Start to read micro-batches, from this step's first one for this rank on."""
        B, size = self.config.micro_batch_size, self.dist.size
        sequences = self.config.total_batch_size // self.config.seq_len
        self.grad_accum_steps = sequences // (B * size)
        first = self.step * sequences + self.dist.rank * B
        self.micro_batches = self.train_loader.micro_batches(first, B, stride=size * B)

    def close(self) -> None:
        """Wait for the writer, and give back what the run has taken."""
        self.model = None  # DDP must end before the process group, or its destructor may wait for ever
        if error := self.writer.close():
            print_error("train_gpt2.py", error, 4)
        self.micro_batches.close()
        self.log.close()
        self.signals.restore()


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Return the seed of a step's micro-batch, counted over all ranks. So there is no random state to save."""
    return int(np.random.SeedSequence((seed, step, micro_batch)).generate_state(1)[0])


@contextlib.contextmanager
def open_trainer(argv: list[str] | None) -> Iterator[Trainer]:
    """Set up a run with these flags, and close it at the end of the block. Raise UserError."""
    torch.set_float32_matmul_precision("high")  # TF32, for what is left in float32
    with Distributed() as dist:
        with dist.agree():
            flags = parse_options(TrainConfig, argv, __doc__, EPILOG)
            restarts = read_environment("TORCHELASTIC_MAX_RESTARTS", 0) and not flags.get("dry_run")
            if restarts and flags.get("resume") != "newest":
                raise UserError("torchrun --max-restarts: add --resume without DIR; it takes the newest checkpoint")
        draft = dist.from_main(lambda: merge_flags(flags, dist.size))
        dist.set_timeout(draft.config.dist_timeout)
        # On a CPU: compiled, its threads would else add up the embedding's gradient in any order, and slowly.
        torch.use_deterministic_algorithms(draft.config.device == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False
        with dist.agree():
            data = open_data(Path(draft.config.data), draft.tokenizer)
        plan = dist.from_main(lambda: make_plan(draft, data, dist))
        if plan.config.shard == "off":  # a sharded run would take 1.5 times the memory
            tune_malloc()
        with contextlib.closing(Trainer(plan, data, dist)) as trainer:
            yield trainer


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; return the exit status. Raise UserError."""
    with open_trainer(argv) as trainer:
        return trainer.dry_run() if trainer.config.dry_run else trainer.train()


if __name__ == "__main__":
    sys.exit(run_script(main))

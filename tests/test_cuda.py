"""What only a GPU can show: python -m pytest tests/test_cuda.py -m cuda -n 0"""

from errors import run_script
import math
import time
import warnings

import pytest
import torch

import hellaswag
import sample
import sweep
from conftest import BOOKS_TEXT, ROOT, losses, perturbed, run_in_process
from model import GPT, GPTConfig
from runtime import checkpoint, distributed
from runtime.distributed import Distributed
from scoring import Scorer
from train_gpt2 import Trainer, open_trainer

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DEVICE = "cuda"
RECORDS = ROOT / "tests/data/hellaswag_100.jsonl"
CONFIG = GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=128)
# 2 layers, 128 wide, 128 tokens, 8 sequences a step.
SMALL = (
    f"--n_layer 2 --n_head 2 --n_embd 128 --seq_len 128 --total_batch_size 1024 --max_steps 8 --max_lr 1e-3 "
    f"--device {DEVICE} --eval_every 4 --eval_tokens 1024 --sample_every 0 --save_every 4 --data {BOOKS_TEXT}"
).split()


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Full precision in float32, and whatever a test or a run changes is restored."""
    for owner, name in (GPT, "forward"), (torch, "set_float32_matmul_precision"):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def gradient(model: GPT, forward, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the gradient of all parameters as one vector."""
    model.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = forward(x[:, :-1], x[:, 1:])
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("width", ["cut", "padded"])
def test_compiled_gradients_equal_eager_ones(width):
    """With the loss over GPT-2's 50,257 tokens, and over 50,304 columns."""
    model = perturbed(CONFIG, std=0.02).to(DEVICE).train()
    x = torch.randint(50257, (4, 257), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = gradient(model, model, x, torch.float32)
    if width == "padded":
        sweep.padded_loss()
    for dtype, limit in (torch.float32, 1e-4), (torch.bfloat16, 2e-2):  # float32 is summed in another order
        found = gradient(model, torch.compile(model, dynamic=False), x, dtype)
        assert found.isfinite().all() and (found - expected).norm() <= limit * expected.norm()
        assert not model.transformer.wte.weight.grad[50257:].any()


def test_cudnn_attention_gives_the_same_gradient():
    """It is what training uses where the GPU has it."""
    model = perturbed(CONFIG, std=0.02).to(DEVICE)
    x = torch.randint(50257, (4, 257), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = {}
    for cudnn in False, True:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        with torch.profiler.profile() as profiler:
            found[cudnn] = gradient(model, model, x, torch.bfloat16)
        ran = any(e.key == "aten::_scaled_dot_product_cudnn_attention" for e in profiler.key_averages())
        assert ran == (cudnn and torch.cuda.get_device_capability()[0] == 9)
    assert (found[True] - found[False]).norm() <= 2e-2 * found[False].norm()


def test_hellaswag_counts_as_on_a_cpu():
    examples = hellaswag.read_examples(RECORDS, hellaswag.render_nanogpt)
    model, scores = perturbed(CONFIG, std=0.1), {}
    for device in "cpu", DEVICE:
        scorer = Scorer(model.to(device), 4096, Distributed())
        scorer.dist.device = torch.device(device)
        scores[device] = scorer.score(examples)
    torch.testing.assert_close(scores["cpu"].sums(), scores[DEVICE].sums(), atol=1e-2, rtol=0)  # of up to -600
    expected, found = (hellaswag.compute_accuracy(scores[device], examples)[:2] for device in ("cpu", DEVICE))
    assert expected == found


def test_scoring_a_batch_never_waits(monkeypatch):
    examples = hellaswag.read_examples(RECORDS, hellaswag.render_nanogpt)
    scorer = Scorer(GPT(CONFIG).eval().to(DEVICE), 4096, Distributed())
    score_batch, calls = Scorer.score_batch, []

    def without_waiting(*args):
        calls.append(args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return score_batch(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Scorer, "score_batch", without_waiting)
    scorer.score(examples)
    assert len(calls) > 2


def test_greedy_decoding_with_cache_equals_without():
    model = perturbed(CONFIG, std=0.1).to(DEVICE)
    idx = torch.randint(50257, (3, 200), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cached, uncached = (model.generate(idx, 80, temperature=0, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)  # 24 of them past the context


def test_step_waits_for_the_gpu_once():
    with open_trainer([*SMALL, "--dry_run", "--compile", "on", "--micro_batch_size", "2"]) as trainer:
        trainer.train_step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("where", ["on the GPU", "on the CPU"])
def test_checkpoint_holds_its_own_step(tmp_path, monkeypatch, where):
    """Training goes on while the copy is read and written."""
    save_checkpoint, expected, copies = Trainer.save_checkpoint, {}, []

    def recorded_checkpoint(trainer):
        expected[trainer.step] = {name: p.detach().cpu().clone() for name, p in trainer.raw_model.named_parameters()}
        save_checkpoint(trainer)

    def late_copy(tree, copy_to_cpu=checkpoint.copy_to_cpu):
        deadline = time.monotonic() + 60
        copies.append(next(iter(tree["weights"].values())).device.type)
        while len(expected) == 1 and "\n7 train" not in (tmp_path / "log/log.txt").read_text():
            assert time.monotonic() < deadline, "training does not go on"
            time.sleep(0.01)
        return copy_to_cpu(tree)

    if where == "on the CPU":
        monkeypatch.setattr(distributed, "free_memory_at_peak", lambda device: 0)
    monkeypatch.setattr(checkpoint, "copy_to_cpu", late_copy)
    monkeypatch.setattr(Trainer, "save_checkpoint", recorded_checkpoint)
    run_in_process(*SMALL, "--log_dir", tmp_path / "log")
    assert copies == [DEVICE if where == "on the GPU" else "cpu"] * 2 and [*expected] == [4, 8]
    for step, weights in expected.items():
        model = GPT.from_pretrained(tmp_path / f"log/step_{step:06d}")
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_run_resumes(tmp_path):
    run_in_process(*SMALL, "--log_dir", tmp_path / "log")
    expected = losses(tmp_path / "log")
    done = run_in_process(*SMALL, "--log_dir", tmp_path / "log", "--resume", tmp_path / "log/step_000004")
    assert "at step 4" in done.stdout
    found = losses(tmp_path / "log")
    assert [*found] == [*expected] and all(abs(found[step] - expected[step]) < 1e-2 for step in found)


def test_out_of_memory_halves_the_micro_batch(tmp_path):
    """The head's logits of 64 sequences of 1,024 tokens take over 30 GB; the limit is 10 GB."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 10e9 / total))
    try:
        flags = "--seq_len", 1024, "--total_batch_size", 65536, "--max_steps", 1, "--micro_batch_size", 64
        done = run_in_process(*SMALL, *flags, "--compile", "off", "--log_dir", tmp_path / "log")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("out of memory: micro-batch 64 → ")]
    assert int(line.split("→ ")[1].split(",")[0]) in (2, 4, 8, 16)


def test_float16_trains_with_its_scaler(tmp_path):
    flags = "--dtype", "float16", "--max_steps", 40, "--compile", "off"
    run_in_process(*SMALL, *flags, "--log_dir", tmp_path / "log")
    found = losses(tmp_path / "log")
    assert all(map(math.isfinite, found.values())) and found[39] < found[0] - 1


def test_scripts_run_on_the_gpu(tmp_path, capsys):
    GPT(CONFIG).save_pretrained(tmp_path / "model")
    for main, flags in (hellaswag.main, ["--data", str(RECORDS)]), (sample.main, ["--prompt", "A"]):
        assert run_script(main, ["--model", str(tmp_path / "model"), "--device", DEVICE, *flags]) == 0
    assert "decided by less than 1e-5" in capsys.readouterr().out

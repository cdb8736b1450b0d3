"""muon.py compared with torch.optim.Muon and torch.optim.AdamW, and runs that use it."""

import copy
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

import tokens
from conftest import SMALL, assert_close, losses, read_log, run_in_process, run_ranks, weights
from model import GPT, GPTConfig
from muon import orthogonalize
from runtime import checkpoint
from train_gpt2 import Trainer

MUON = *SMALL, "--optimizer", "muon", "--muon_lr_scale", 2, "--schedule", "wsd"
RUN = *MUON, "--max_steps", 24, "--max_lr", 2e-3, "--total_batch_size", 192, "--eval_every", 12, "--save_every", 0


@pytest.fixture
def torch_muon_in_float32(monkeypatch):
    """torch.optim.Muon without its rounding to bfloat16, which would hide all but gross differences."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)


@pytest.mark.parametrize("bias", [True, False])
def test_updates_equal_those_of_torch_muon_and_adamw(torch_muon_in_float32, bias):
    """Five steps at changing learning rates, from the same gradients: what AdamW updates is equal bit for bit, the
    matrices to 1e-6."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=3, n_head=2, n_embd=32, bias=bias))
    theirs = copy.deepcopy(model)
    optimizer = model.configure_optimizers(weight_decay=0.3, learning_rate=1e-3, muon_lr_scale=4.0)

    def by_hand(name: str, t: torch.Tensor) -> list[torch.Tensor]:
        """Views of query, key and value."""
        C = t.size(-1)
        return [t[:C], t[C : 2 * C], t[2 * C :]] if name.endswith("c_attn.weight") else [t]

    matrices = {n: p for n, p in theirs.named_parameters() if p.dim() == 2 and ".h." in n}
    parts = {n: [nn.Parameter(part) for part in by_hand(n, p.data)] for n, p in matrices.items()}
    assert len(matrices) == 3 * 4 and sum(map(len, parts.values())) == 3 * 6
    rest = {n: p for n, p in theirs.named_parameters() if n not in matrices}
    groups = [
        dict(params=[p for p in rest.values() if p.dim() == 2], weight_decay=0.3),
        dict(params=[p for p in rest.values() if p.dim() == 1], weight_decay=0.0),
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    all_parts = [part for some in parts.values() for part in some]
    muon = torch.optim.Muon(all_parts, momentum=0.95, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for lr in 1e-3, 3e-3, 2e-3, 1e-3, 5e-4:
        for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p) * torch.rand(p.size(-1)) ** 3
            q.grad = p.grad.clone()
            for part, grad in zip(parts.get(name, ()), by_hand(name, q.grad), strict=False):
                part.grad = grad.clone()
        for group in optimizer.param_groups + adamw.param_groups:
            group["lr"] = lr
        muon.param_groups[0]["lr"] = 4 * lr
        for o in optimizer, adamw, muon:
            o.step()
        for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
            if name in rest:
                assert torch.equal(p, q), name
            else:  # an entry is changed by about 0.2·4·lr, a thousand times as much
                torch.testing.assert_close(p, q, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("rows, columns", [(48, 48), (48, 192)])
def test_singular_values_are_those_of_the_polynomial(rows, columns):
    """Between 0.68 and 1.21 for all above 0.002; the singular vectors stay, and matrices of a batch do not mix."""
    generator = torch.Generator().manual_seed(0)
    s = torch.stack([torch.logspace(-low, 0, rows, dtype=torch.float64) for low in (0.5, 2.0, 2.3)])
    s /= s.norm(dim=1, keepdim=True)  # what is above 0.002 of the Frobenius norm
    assert s.min() > 0.002
    U, _ = torch.linalg.qr(torch.randn(3, rows, rows, dtype=torch.float64, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(3, columns, rows, dtype=torch.float64, generator=generator))
    X = U * s[:, None] @ V.mT * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert 0.68 < s.min() < 0.75 and 1.1 < s.max() < 1.21
    torch.testing.assert_close(orthogonalize(X), U * s[:, None] @ V.mT, atol=1e-9, rtol=0)
    # In float32 all but exactly so; in bfloat16, which rounds at 0.4% and takes up to ten products, within some percent.
    for dtype, tolerance in (torch.float32, 1e-4), (torch.bfloat16, 0.1):
        error = (orthogonalize(X.to(dtype)) - orthogonalize(X)).norm(dim=(1, 2)) / orthogonalize(X).norm(dim=(1, 2))
        assert error.max() < tolerance, (dtype, error)


def test_matrix_of_zeros_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def test_step_skipped_by_the_float16_scaler_changes_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=16))
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-2, muon_lr_scale=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x = torch.arange(8)[None]
    for bad in False, True, False:
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        scaler.scale(model(x, x)).backward()
        if bad:
            model.transformer.wpe.weight.grad[0, 0] = torch.inf  # in AdamW's part
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = model.state_dict(), optimizer.state_dict()["state"]
        same = [torch.equal(before[0][name], p) for name, p in after[0].items()]
        assert all(same) if bad else not any(same)
        if bad:
            torch.testing.assert_close(after[1], before[1], atol=0, rtol=0)
    assert scaler.get_scale() == 2.0


# Runs


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, text):
    """The log directory of 24 steps of six sequences, on one rank."""
    log = tmp_path_factory.mktemp("one")
    run_in_process(*RUN, "--data", text, "--log_dir", log)
    return log


def test_three_ranks_share_the_work_and_equal_one(tmp_path, text, one_rank):
    """Of two layers, eight square matrices and four wide ones, of which the third rank has fewer than the others."""
    run_ranks("train_gpt2.py", *RUN, "--data", text, "--log_dir", tmp_path, ranks=3)
    assert_close(losses(tmp_path), losses(one_rank))
    assert_close(losses(tmp_path, "val"), losses(one_rank, "val"))
    assert losses(tmp_path)[23] < losses(tmp_path)[0] - 0.5
    a, b = (checkpoint.load(log / "step_000024") for log in (tmp_path, one_rank))
    for (name, p), q in zip(a[0].named_parameters(), b[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_muon_resume_is_bitwise_and_continues_on_two_ranks(tmp_path, text, one_rank, monkeypatch):
    """The state of the matrices is their momentum alone."""
    train_step = Trainer.train_step

    def stopped_train_step(trainer):
        if trainer.step == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer)

    flags = *RUN, "--data", text, "--log_dir", tmp_path / "log"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped_train_step)
        run_in_process(*flags, status=143)
    model, state = checkpoint.load(tmp_path / "log/step_000017")
    shapes = sorted(len(entry) for entry in state["optimizer"]["state"].values())
    assert shapes == [1] * 8 + [3] * (len(list(model.parameters())) - 8)
    elsewhere = "--log_dir", tmp_path / "two", "--resume", tmp_path / "log/step_000017"
    run_ranks("train_gpt2.py", *RUN, "--data", text, *elsewhere, "--micro_batch_size", 3)
    assert "at step 17: nothing changed" in run_in_process(*flags, "--resume").stdout
    for kind in "train", "val":
        assert read_log(tmp_path / "log", kind) == read_log(one_rank, kind)
    assert weights(tmp_path / "log") == weights(one_rank)
    assert_close(losses(tmp_path / "two"), losses(one_rank))


def test_model_trained_with_muon_is_gpt2(text, one_rank):
    """`transformers` computes the same logits, and the validation loss that was logged."""
    theirs = GPT2LMHeadModel.from_pretrained(one_rank / "step_000024").eval()
    ours = GPT.from_pretrained(one_rank / "step_000024").eval()
    content = text.read_text()
    ids = torch.tensor(tokens.gpt2_tokenizer().encoding.encode_ordinary(content[len(content) * 9 // 10 :]))[
        : 8 * 32 + 1
    ]
    x = ids[:-1].view(8, 32)
    logits = theirs(x).logits
    torch.testing.assert_close(ours(x), logits, atol=1e-4, rtol=0)
    expected = F.cross_entropy(logits.flatten(0, 1), ids[1:]).item()
    assert losses(one_rank, "val")[24] == pytest.approx(expected, abs=1e-5)


def test_dry_run_counts_the_state_of_muon(tmp_path, text):
    """Four bytes a weight, eight for AdamW's moments and four for Muon's momentum; two checkpoints, the best and one
    being written."""
    flags = *MUON, "--n_embd", 256, "--total_batch_size", 32, "--data", text, "--log_dir", tmp_path / "log"
    done = run_in_process(*flags, "--dry_run")
    matrices = 2 * 12 * 256**2
    rest = (50304 + 32) * 256 + 2 * 13 * 256 + 2 * 256
    expected = 4 * (12 * rest + 8 * matrices) / 1e9
    assert f"disk     {expected:.2f} GB for 2 checkpoints" in done.stdout

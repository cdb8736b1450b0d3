"""What a GPU needs of the scripts, as far as a CPU can show it."""

from errors import UserError, run_script

import numpy as np
import pytest
import torch

import hellaswag
import sample
from conftest import ROOT, SMALL, run_in_process, run_ranks, with_fault
from model import GPT, GPTConfig
from runtime import device, distributed
from runtime.distributed import Distributed
from scoring import Example, Scorer, ScoringOptions, make_rows

RECORDS = ROOT / "tests/data/hellaswag_100.jsonl"
CUDNN_FAILURE = "cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built."


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The directory of a small model."""
    directory = tmp_path_factory.mktemp("model")
    GPT(GPTConfig(block_size=256, n_layer=1, n_head=2, n_embd=16)).save_pretrained(directory)
    return directory


@pytest.fixture
def cudnn():
    """A process where cuDNN's attention is enabled; it is afterwards, whatever a run has decided."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch._functorch.config.enable_autograd_cache = True


@pytest.fixture
def passes(cudnn, monkeypatch) -> dict[bool, set[bool]]:
    """Whether cuDNN's attention was enabled in passes for training (True) and for evaluation (False)."""
    hidden, found = GPT.hidden, {True: set(), False: set()}

    def recorded(model, *args, **kwargs):
        found[model.training].add(torch.backends.cuda.cudnn_sdp_enabled())
        return hidden(model, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", recorded)
    return found


def test_only_training_uses_cudnn(passes, tmp_path, text, monkeypatch):
    """cuDNN makes a plan for each shape, and all shapes but those of training vary."""
    monkeypatch.setattr("hellaswag.find_file", lambda: RECORDS)
    flags = "--data", text, "--log_dir", tmp_path / "log", "--seq_len", 128, "--total_batch_size", 512
    done = run_in_process(*SMALL, *flags, "--max_steps", 2, "--hellaswag_every", 1, "--sample_every", 1)
    assert "HellaSwag accuracy" in done.stdout and "  | Hello, I'm" in done.stdout
    assert passes == {True: {True}, False: {False}}


def test_scripts_do_not_use_cudnn(passes, model_dir, capsys):
    flags = "--model", model_dir, "--data", RECORDS, "--limit", 3, "--device", "cpu"
    assert run_script(hellaswag.main, [*map(str, flags)]) == 0
    flags = "--model", model_dir, "--prompt", "A", "--max_new_tokens", 2, "--device", "cpu"
    assert run_script(sample.main, [*map(str, flags)]) == 0
    assert passes == {True: set(), False: {False}}


def test_evaluation_in_float32_does_not_use_tf32(model_dir):
    torch.set_float32_matmul_precision("high")  # as train_gpt2.py does
    ScoringOptions(model=str(model_dir), device="cpu").load_scorer(Distributed())
    assert torch.get_float32_matmul_precision() == "highest"


def test_cudnn_failure_on_one_of_two_ranks_is_one_line(tmp_path, text):
    fault = f"""
if rank == 1 and torch.backends.cuda.cudnn_sdp_enabled() and model.training:
    raise RuntimeError({CUDNN_FAILURE!r})
if trainer is not None and torch.backends.cuda.cudnn_sdp_enabled():
    raise RuntimeError("still enabled")
"""
    script = with_fault(tmp_path, fault)
    done = run_ranks(script, *SMALL, "--data", text, "--log_dir", tmp_path / "log", "--max_steps", 2)
    assert [line for line in done.stdout.splitlines() if "cuDNN" in line] == [
        "cuDNN attention is disabled, it failed: on another rank"
    ]


def test_cudnn_failure_names_its_reason(cudnn, tmp_path, text, monkeypatch):
    forward = GPT.forward

    def failing(model, *args):
        if torch.backends.cuda.cudnn_sdp_enabled():
            raise RuntimeError(CUDNN_FAILURE)
        return forward(model, *args)

    monkeypatch.setattr(GPT, "forward", failing)
    done = run_in_process(*SMALL, "--data", text, "--log_dir", tmp_path / "log", "--max_steps", 1)
    assert done.stdout.count(f"cuDNN attention is disabled, it failed: {CUDNN_FAILURE}\n") == 1
    assert not torch._functorch.config.enable_autograd_cache  # it may hold graphs with cuDNN's attention


def test_compiled_kernel_that_fails_at_run_time_is_one_line(tmp_path, text):
    fault = """
from torch._inductor.runtime.triton_heuristics import NoTritonConfigsError
if rank == 1 and calls == 1 and model.training:
    raise NoTritonConfigsError("No valid triton configs. OutOfResources: out of resource: shared memory")
"""
    script = with_fault(tmp_path, fault)
    done = run_ranks(script, *SMALL, "--data", text, "--log_dir", tmp_path / "log", "--max_steps", 2)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("not compiled, torch.compile failed")]
    assert line == "not compiled, torch.compile failed: on another rank"


def test_other_errors_of_the_probe_are_not_hidden():
    assert device.classify_error(RuntimeError("expected scalar type Float")) is None
    assert device.classify_error(torch.OutOfMemoryError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")) == "memory"


def test_scoring_never_waits_for_its_device():
    """On the device meta nothing can be read: a wait for the device would be an error."""
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)).eval()
    examples = [Example(np.arange(9), [[1, 2], [3]]), Example([5] * 4, [[6, 7, 8]])]
    rows, _ = make_rows(examples, 65)
    indices, found = Scorer(model, 64, Distributed()).score_batch(
        rows, torch.empty(1, dtype=torch.int64, device="meta")
    )
    assert indices.shape == (6,) and found.shape == (3, 6) and found.is_meta


def test_peaks_are_found_by_the_whole_name(monkeypatch):
    """Names contain each other, and a laptop's GPU is slower than a desktop's."""
    expected = {
        "NVIDIA H200": 989e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "Tesla T4": 65e12,
        "NVIDIA GeForce RTX 4070": 58.3e12,
        "NVIDIA GeForce RTX 4070 Ti": 80.2e12,
        "NVIDIA GeForce RTX 4070 Ti SUPER": 88.2e12,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 3080": None,  # the cards with 10 and with 12 GB have other peaks and the same name
    }
    for name, peak in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device.peak_flops(torch.device("cuda"), "bfloat16") == peak, name


def test_peaks_of_geforce_cards_follow_from_their_clocks():
    """512 operations a clock and streaming multiprocessor, whose number and boost clock the white papers state."""
    cards = {"RTX 5090": (170, 2.407), "RTX 4090": (128, 2.52), "RTX 4080": (76, 2.505), "RTX 4070": (46, 2.475)}
    cards |= {"RTX 4060": (24, 2.46), "RTX 3090": (82, 1.695), "RTX 3080 Ti": (80, 1.665), "RTX 3060": (28, 1.777)}
    for name, (processors, clock) in cards.items():
        assert device.PEAK_FLOPS[f"{name}$"] == pytest.approx(512e9 * processors * clock, rel=0.002)


@pytest.mark.parametrize("room, out_of_memory", [(10**9, False), (10**9, True), (30_000, False)])
def test_checkpoint_is_copied_on_a_gpu_where_it_fits(monkeypatch, room, out_of_memory):
    """The state takes 20,000 bytes. In place of a GPU's tensors there are those of a CPU."""
    cloned, clone = [], torch.Tensor.clone

    def recorded_clone(tensor):
        cloned.append(tensor)
        if out_of_memory and len(cloned) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", recorded_clone)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(distributed, "free_memory_at_peak", lambda device: room)
    ranks = Distributed()
    ranks.device = torch.device("cuda")
    tree = {name: torch.arange(2500.0) for name in ("weights", "state")}
    copies = ranks.gather_tree(tree)
    assert len(cloned) == (2 if room > 40_000 else 0)
    for name, tensor in tree.items():
        tensor += 1
        assert torch.equal(copies[name], torch.arange(2500.0))


def test_xpu_is_chosen_and_asked_for_its_memory(monkeypatch):
    """With PyTorch's calls for Intel's GPUs, on none: as `cuda` is, where there is no CUDA."""
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda: (7e9, 8e9))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.choose_device("auto") == "xpu" and device.free_memory("xpu", 1) == 7e9
    assert device.choose_dtype("auto", "xpu") == "float32" and device.choose_dtype("bfloat16", "xpu") == "bfloat16"
    assert device.eager_reason("auto", "xpu", 1e17) is None and device.eager_reason("auto", "xpu", 1e15)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # ROCm is this one, too
    assert device.choose_device("auto") == "cuda"
    ranks = Distributed()
    ranks.size = 2
    with pytest.raises(UserError, match="--device xpu: one rank only, not 2"):
        ranks.set_device("xpu")

"""model.py compared with `transformers`, in float32, with every parameter away from its initial value."""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from conftest import perturbed
from model import GPT, SIZES, VOCAB_SIZE, GPTConfig, KVCache, sample

transformers.logging.set_verbosity_error()


def reference(model: GPT, directory) -> "transformers.GPT2LMHeadModel":
    """The same weights in `transformers`, by way of save_pretrained."""
    model.save_pretrained(directory)
    return transformers.GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager").eval()


def tokens_for(config: GPTConfig, B: int, T: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def compare(model: GPT, theirs, B: int, T: int) -> None:
    """Logits to 1e-4, loss to 1e-5, each gradient to 1e-4 of its norm: float32 rounds at 6e-8, and a sum over some
    hundred layers and thousands of channels, taken in another order, loses two to three digits of that."""
    x = tokens_for(model.config, B, T + 1)
    inputs, targets = x[:, :-1], x[:, 1:]
    logits = model(inputs)
    assert logits.dtype == torch.float32 and logits.shape == (B, T, model.config.vocab_size)
    torch.testing.assert_close(logits, theirs(inputs).logits, atol=1e-4, rtol=0)
    loss = model(inputs, targets)
    their_logits = theirs(inputs).logits
    their_loss = F.cross_entropy(their_logits.view(-1, their_logits.size(-1)), targets.reshape(-1))
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-6)
    loss.backward()
    their_loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        their_grad = theirs_by_name[name].grad
        grad = p.grad.t() if p.dim() == 2 and ".h." in name else p.grad[: len(their_grad)]
        # The gradient of a key's bias is zero but for rounding, hence the absolute part.
        error = (grad - their_grad).norm() / (their_grad.norm() + 1e-5)
        assert error <= 1e-4, f"{name}: {error:.2e}"
    assert model.transformer.wte.weight.grad[model.config.vocab_size :].count_nonzero() == 0


@settings(max_examples=12, deadline=None)
@given(
    n_head=st.integers(1, 4), head_size=st.sampled_from([4, 8, 16]), n_layer=st.integers(1, 4),
    vocab_size=st.sampled_from([100, 128, 301]), T=st.integers(1, 24), B=st.integers(1, 3), bias=st.booleans(),
)  # fmt: skip
def test_model_equals_transformers_for_any_shape(tmp_path_factory, n_head, head_size, n_layer, vocab_size, T, B, bias):
    config = GPTConfig(24, vocab_size, n_layer, n_head, n_head * head_size, bias=bias)
    model = perturbed(config, std=0.2)
    theirs = reference(model, tmp_path_factory.mktemp("model"))
    if not bias:  # theirs has zero biases where ours has none: compare the outputs
        x = tokens_for(config, B, T)
        torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-4, rtol=0)
    else:
        compare(model, theirs, B, T)


def test_model_equals_transformers_at_124M(tmp_path):
    model = perturbed(GPTConfig(), std=0.01)
    compare(model, reference(model, tmp_path), B=1, T=64)


def test_save_pretrained_is_read_back_bitwise(tmp_path):
    for bias in True, False:
        config = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1, bias=bias)
        model = perturbed(config)
        model.save_pretrained(tmp_path / str(bias))
        again = GPT.from_pretrained(tmp_path / str(bias))
        assert again.config == config
        assert model.state_dict().keys() == again.state_dict().keys()
        for name, p in model.state_dict().items():
            assert torch.equal(p, again.state_dict()[name]), name


def test_transformers_reads_model_and_tokenizer(tmp_path):
    model = perturbed(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=16))
    theirs = reference(model, tmp_path)
    assert theirs.transformer.wte.weight.shape[0] == VOCAB_SIZE  # 50,257 rows leave
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("Hello, I'm a language model,")["input_ids"]
    assert ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.model_max_length == 32 and tokenizer.eos_token_id == 50256
    x = torch.tensor([ids])
    torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["safetensors", "float16", "bare names", "sharded", "bin"])
def test_from_pretrained_reads_all_layouts_of_the_hub(tmp_path, layout):
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=2, n_head=2, n_inner=64)
    ).eval()
    theirs = theirs.half().float() if layout == "float16" else theirs
    if layout == "sharded":
        theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    elif layout == "float16":
        theirs.half().save_pretrained(tmp_path)
        theirs.float()
    else:
        theirs.save_pretrained(tmp_path)
    if layout == "bin":
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    if layout == "bare names":  # as OpenAI's own are on the hub: no prefix, and the causal masks among them
        from safetensors.torch import load_file, save_file

        state = load_file(tmp_path / "model.safetensors")
        state = {name.removeprefix("transformer."): t for name, t in state.items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        save_file(state, tmp_path / "model.safetensors")
    model = GPT.from_pretrained(tmp_path).eval()
    x = tokens_for(model.config, 2, 16)
    torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="llama"), "not a GPT-2: its config.json has model_type 'llama'"),
        (dict(activation_function="relu"), "activation_function 'relu'"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True"),
        (dict(n_layer=3), "h.2.ln_1.weight: expected a tensor of shape .16,., found nothing"),
        (dict(n_layer=1), "h.1.* a tensor that GPT-2 does not have"),
        (dict(n_embd=32), r"wte.weight: expected a tensor of shape \(300, 32\), found \(300, 16\)"),
    ],
)
def test_from_pretrained_refuses_other_models(tmp_path, change, message):
    import json

    GPT(GPTConfig(16, 300, 2, 2, 16)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_parameter_counts_are_the_published_ones():
    counts = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, shape in SIZES.items():
        with torch.device("meta"):
            assert GPT(GPTConfig(**shape)).num_parameters() == counts[name]
    with torch.device("meta"):
        assert GPT(GPTConfig()).flops_per_token() == 854_654_976


def test_padded_rows_stay_zero_without_probability():
    config = GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=32)
    assert config.padded_vocab_size == 50304
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = model.configure_optimizers(weight_decay=0.5, learning_rate=0.1)
    for step in range(5):
        x = tokens_for(config, 2, 17, seed=step)
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.transformer.wte.weight[config.vocab_size :].abs().max() == 0
    assert model(x[:, :-1]).shape[-1] == 50257


def test_vocabulary_of_50304_never_samples_its_last_ids():
    config = GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)
    model = GPT(config).eval()
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape[-1] == 50304
    logits = torch.zeros(4, 50304)
    logits[:, VOCAB_SIZE:] = 100.0
    for temperature in 0, 1.0:
        assert sample(logits, temperature).max() < VOCAB_SIZE


def test_initial_weights_follow_the_paper():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.count_nonzero() == 0, name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            rows = p[:VOCAB_SIZE]
            assert abs(rows.std().item() / std - 1) < 0.05 and abs(rows.mean().item()) < std / 20, name


def test_weight_decay_is_for_matrices_and_embeddings_only():
    model = GPT(GPTConfig(block_size=8, vocab_size=100, n_layer=1, n_head=1, n_embd=8))
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if ".ln_" in name or name.endswith("bias") else 0.1), name
    assert all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 and g["fused"] for g in optimizer.param_groups)


def test_dropout_acts_in_embedding_attention_and_residual():
    config = GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=2, n_embd=32, dropout=0.5)
    model = perturbed(config, std=0.2)
    x = tokens_for(config, 2, 16)
    still = model(x)
    assert torch.equal(model(x), still)
    model.train()
    dropouts = [model.transformer.drop, model.transformer.h[0].attn.attn_dropout]
    dropouts += [model.transformer.h[0].attn.resid_dropout, model.transformer.h[0].mlp.dropout]
    for dropout in dropouts:  # each by itself
        model.set_dropout(0.0)
        assert torch.allclose(model(x), still, atol=1e-5)
        dropout.p = 0.5
        assert not torch.allclose(model(x), still, atol=1e-2)


def test_cropped_context_keeps_its_first_positions():
    config = GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=2, n_embd=32)
    model = perturbed(config)
    x = tokens_for(config, 2, 8)
    expected = model(x)
    model.crop_block_size(8)
    assert model.config.block_size == 8 and torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="9 tokens do not fit into a context of 8"):
        model(tokens_for(config, 1, 9))


# Generation


def greedy_loop(theirs, idx: torch.Tensor, n: int, block_size: int) -> torch.Tensor:
    """The oracle past the context, where `transformers` stops: each token from the last block_size."""
    for _ in range(n):
        token = theirs(idx[:, -block_size:]).logits[:, -1].argmax(-1)
        idx = torch.cat((idx, token[:, None]), dim=1)
    return idx


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_transformers(tmp_path, use_cache):
    config = GPTConfig(block_size=48, vocab_size=500, n_layer=3, n_head=4, n_embd=64)
    model = perturbed(config, std=0.3)
    theirs = reference(model, tmp_path)
    idx = tokens_for(config, 3, 7)
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=41, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert len(expected[0].unique()) > 10  # it does not just repeat itself
    ours = model.generate(idx, 41, temperature=0, use_cache=use_cache)
    assert torch.equal(ours, expected)
    beyond = model.generate(idx, 80, temperature=0, use_cache=use_cache)
    assert torch.equal(beyond, greedy_loop(theirs, idx, 80, 48))
    long_prompt = tokens_for(config, 2, 60)
    expected = greedy_loop(theirs, long_prompt, 5, 48)
    assert torch.equal(model.generate(long_prompt, 5, temperature=0, use_cache=use_cache), expected)


def test_sampling_with_cache_equals_sampling_without():
    config = GPTConfig(block_size=24, vocab_size=500, n_layer=2, n_head=2, n_embd=32)
    model = perturbed(config, std=0.2)
    idx = tokens_for(config, 4, 5)
    options = dict(temperature=0.8, top_k=50, top_p=0.9)
    runs = [
        model.generate(idx, 30, generator=torch.Generator().manual_seed(3), use_cache=use_cache, **options)
        for use_cache in (True, False, True)
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_cache_in_bfloat16_costs_no_accuracy():
    """Beside float32, at the end of a context: token by token from the cache, and all at once."""
    model = perturbed(GPTConfig(block_size=64, vocab_size=500, n_layer=3, n_head=4, n_embd=64), std=0.3).eval()
    idx = tokens_for(model.config, 4, 64)
    with torch.no_grad():
        exact = model.hidden(idx)[:, -1]
        model.bfloat16()
        at_once = model.hidden(idx)[:, -1]
        caches = [KVCache(64) for _ in model.transformer.h]
        for t in range(64):
            cached = model.hidden(idx[:, t : t + 1], caches=caches)[:, -1]
    errors = [((y.float() - exact).norm() / exact.norm()).item() for y in (cached, at_once)]
    # bfloat16 has 8 bits: a dozen roundings one after the other leave a few times 2^-9.
    assert 2**-9 < errors[1] < 2**-5 and errors[0] < 1.25 * errors[1]


def test_stop_token_ends_each_row():
    config = GPTConfig(block_size=128, vocab_size=8, n_layer=1, n_head=1, n_embd=8)
    model = perturbed(config)
    idx = tokens_for(config, 8, 3)
    out = model.generate(idx, 120, stop_token=7, generator=torch.Generator().manual_seed(0))
    assert out.size(1) < 123  # it ended before the limit
    for row in out[:, 3:].tolist():
        assert 7 in row and set(row[row.index(7) :]) == {7}


def test_sample_draws_from_the_requested_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    n = 200_000
    many = logits.expand(n, -1)

    def frequencies(**options) -> torch.Tensor:
        drawn = sample(many, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(drawn, minlength=5) / n

    def expected(kept: int, temperature: float = 1.0) -> torch.Tensor:
        p = (logits / temperature).softmax(-1)
        p[kept:] = 0
        return p / p.sum()

    tolerance = dict(atol=0.005, rtol=0)  # four standard errors of a frequency from 200,000 draws
    torch.testing.assert_close(frequencies(), expected(5), **tolerance)
    torch.testing.assert_close(frequencies(temperature=0.5), expected(5, 0.5), **tolerance)
    torch.testing.assert_close(frequencies(top_k=2), expected(2), **tolerance)
    torch.testing.assert_close(frequencies(top_k=99), expected(5), **tolerance)
    # softmax: 0.636, 0.234, 0.086, 0.032, 0.012; the fewest that hold 0.8 are two, 0.9 three
    torch.testing.assert_close(frequencies(top_p=0.8), expected(2), **tolerance)
    torch.testing.assert_close(frequencies(top_p=0.9), expected(3), **tolerance)
    torch.testing.assert_close(frequencies(top_p=0.01), expected(1), **tolerance)
    assert sample(many, temperature=0).unique().tolist() == [0]


def test_sequence_longer_than_the_context_is_an_error():
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ValueError, match="9 tokens do not fit into a context of 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))

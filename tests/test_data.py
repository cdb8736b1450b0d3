"""The batches: every row once an epoch, the same rows at the same step for any micro-batch and number of ranks."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokens
from conftest import BOOKS_TEXT
from data import DataLoaderLite, inputs_and_targets, open_data, permutation
from recipe import TrainConfig, learning_rate
from runtime.shards import ShardError
from train_gpt2 import dropout_seed


def make_files(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(f"shard {i}", rng.integers(0, 50257, n).astype(np.uint16)) for i, n in enumerate(lengths)]


# Shards of many lengths, some shorter than a row, with at least one row in all.
shapes = st.tuples(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 16)).filter(
    lambda shape: sum(shape[0]) > shape[1]
)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, shuffle_first=st.booleans(), seed=st.integers(0, 5))
def test_epoch_has_every_row_once_and_targets_one_further_on(shape, shuffle_first, seed):
    lengths, T = shape
    files = make_files(lengths)
    stream = np.concatenate([ids for _, ids in files])
    n = (len(stream) - 1) // T
    loader = DataLoaderLite(files, T, seed, shuffle_first)
    assert loader.n_rows == n
    in_order = [(stream[i : i + T].tolist(), stream[i + 1 : i + T + 1].tolist()) for i in range(0, n * T, T)]
    epochs = []
    for epoch in range(3):
        x, y = inputs_and_targets(loader.rows(epoch * n, n), torch.device("cpu"))
        assert x.shape == y.shape == (n, T) and x.dtype == y.dtype == torch.int64
        epochs.append(list(zip(x.tolist(), y.tolist(), strict=True)))
        assert sorted(epochs[-1]) == sorted(in_order)
    assert shuffle_first or epochs[0] == in_order
    if n > 8:
        assert epochs[1] != epochs[2]  # another order each epoch
        epoch = loader.rows(n, n)
        assert torch.equal(epoch, DataLoaderLite(files, T, seed, shuffle_first).rows(n, n))
        assert not torch.equal(epoch, DataLoaderLite(files, T, seed + 1, shuffle_first).rows(n, n))


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes,
    R=st.sampled_from([4, 8, 12]),
    split=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]),
    first_step=st.integers(0, 7),
)
def test_step_has_same_rows_for_any_micro_batch_and_ranks(shape, R, split, first_step):
    lengths, T = shape
    W, B = split
    loader = DataLoaderLite(make_files(lengths), T, seed=1)
    expected = loader.rows(first_step * R, 3 * R)  # three steps, at times over several epochs
    ranks = [loader.micro_batches(first_step * R + r * B, B, stride=W * B) for r in range(W)]
    rows = [row for _ in range(3 * R // (W * B)) for rank in ranks for row in next(rank).tolist()]
    assert rows == expected.tolist()
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize(
    "n, seed, epoch, sha256",
    [
        (10, 0, 0, "4da903d35fe1d86d"),
        (10, 0, 1, "6d6766770fd8e7b7"),
        (2359, 1337, 0, "9f76c8f6cf7e2f00"),
        (1_000_000, 1337, 1, "c7c49839bb38e367"),
    ],
)
def test_order_of_an_epoch_is_pinned(n, seed, epoch, sha256):
    """With another order, from a newer numpy perhaps, a resumed run would see some rows twice and others never."""
    order = permutation(n, seed, epoch)
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == sha256


def test_bad_token_id_is_named_with_shard_and_position():
    files = make_files([10, 20])
    files[1][1][7] = 50257
    loader = DataLoaderLite(files, 4)
    loader.rows(0, 2)
    with pytest.raises(ShardError, match="shard 1: token 7 is 50257, but its vocabulary ends at 50256"):
        loader.rows(4, 1)


def test_text_keeps_its_last_tenth_for_validation(text):
    data = open_data(text)
    (_, train), (_, val) = data.train[0], data.val[0]
    decode = tokens.gpt2_tokenizer().encoding.decode
    content = text.read_text()
    assert decode(train.tolist()) == content[:36000] and decode(val.tolist()) == content[36000:]


def test_tiny_shakespeare_has_the_published_token_counts():
    data = open_data(BOOKS_TEXT)  # nanoGPT's data/shakespeare/prepare.py prints these
    assert (len(data.train[0][1]), len(data.val[0][1])) == (301_966, 36_059)


def test_cosine_schedule_has_warm_up_and_reaches_min_lr():
    config = TrainConfig(max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    constant = TrainConfig(max_lr=3e-5, min_lr=3e-5, warmup_steps=0, max_steps=10)
    assert {learning_rate(step, constant) for step in range(10)} == {3e-5}


@pytest.mark.parametrize(
    "fraction, rates",
    [
        (0.0, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.2]),
        (1 / 3, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (2 / 3, [0.25, 0.5, 0.75, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        (1.0, [0.25, 0.5, 0.75, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),  # from the end of warm-up on
    ],
)
def test_wsd_schedule_decays_over_the_last_fraction(fraction, rates):
    config = TrainConfig(max_lr=1.0, min_lr=0.2, warmup_steps=4, max_steps=12, schedule="wsd", decay_fraction=fraction)
    assert [learning_rate(step, config) for step in range(13)] == pytest.approx(rates)


def test_dropout_seed_differs_for_each_step_and_micro_batch():
    seeds = {dropout_seed(1337, step, m) for step in range(50) for m in range(50)}
    assert len(seeds) == 2500 and max(seeds) < 2**32
    assert dropout_seed(1338, 0, 0) != dropout_seed(1337, 0, 0)

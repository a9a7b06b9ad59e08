"""Keyed random numbers: known answers, slices, independence; and the dropout made of them."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from klray.networks.dropout import KeyedDropout, use_keyed_dropout
from klray.parallel.random import Purpose, dropout_keys, normal, permutation, philox, random_words, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_a_slice_of_the_positions_draws_the_same_numbers() -> None:
    everything = normal(3, 5, Purpose.NOISE, torch.arange(64), (3, 5, 5))
    assert torch.equal(normal(3, 5, Purpose.NOISE, torch.arange(20, 30), (3, 5, 5)), everything[20:30])
    assert torch.equal(normal(3, 5, Purpose.NOISE, torch.tensor([41, 7]), (3, 5, 5)), everything[[41, 7]])


def test_streams_are_different_and_uncorrelated() -> None:
    where = torch.arange(16)
    streams = [
        normal(seed, step, purpose, where, (1000,)).flatten()
        for seed, step, purpose in [
            (0, 0, Purpose.NOISE),
            (1, 0, Purpose.NOISE),
            (0, 1, Purpose.NOISE),
            (0, 0, Purpose.SAMPLE),
        ]
    ]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(4)
    assert float(correlation.abs().max()) < 5 / 16000**0.5
    assert not torch.equal(uniform(2**40, 0, Purpose.TIME, where), uniform(0, 0, Purpose.TIME, where))  # 64-bit seeds


def test_the_distributions() -> None:
    where = torch.arange(2000)
    assert stats.kstest(normal(0, 0, Purpose.NOISE, where, (51,)).flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(uniform(0, 0, Purpose.TIME, where).numpy(), "uniform").pvalue > 1e-3
    words = random_words(0, 0, Purpose.NOISE, where, 7)
    assert int(words.min()) >= 0
    assert int(words.max()) < 2**32


def test_permutations() -> None:
    orders = [permutation(0, step, Purpose.SHUFFLE, 1000) for step in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(orders[0], orders[1])
    # Every term is equally likely to be among the first K.
    first = torch.bincount(torch.cat([permutation(0, s, Purpose.TERMS, 5)[:2] for s in range(3000)]), minlength=5)
    assert stats.chisquare(first.numpy()).pvalue > 1e-3


def dropout(p: float = 0.25) -> tuple[KeyedDropout, nn.Module]:
    holder = nn.Sequential(nn.Dropout(p), nn.Identity(), nn.Dropout(p), nn.Dropout(0.0))
    keys = use_keyed_dropout(holder)
    holder[0].keys = keys
    return holder[0], holder


def test_dropout_keeps_its_share_and_its_scale() -> None:
    layer, _ = dropout()
    layer.keys.rows = dropout_keys(0, 0, torch.arange(100), torch.arange(4))
    y = layer(torch.ones(400, 8, 5, 5))
    assert float((y == 0).double().mean()) == pytest.approx(0.25, abs=0.006)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]


def test_dropout_masks_follow_the_key_alone() -> None:
    layer, holder = dropout()
    positions, terms = torch.arange(6), torch.tensor([2, 0])
    layer.keys.rows = dropout_keys(0, 9, positions, terms)  # image-major rows
    mask = layer(torch.ones(12, 50)) != 0
    layer.keys.rows = dropout_keys(0, 9, positions[4:], terms[1:])
    assert torch.equal(layer(torch.ones(2, 50)) != 0, mask[[9, 11]])
    assert len({tuple(row) for row in mask.tolist()}) == 12  # every position and term has its own
    layer.keys.rows = dropout_keys(0, 10, positions, terms)
    assert not torch.equal(layer(torch.ones(12, 50)) != 0, mask)  # so has every step
    layer.keys.rows = dropout_keys(0, 9, positions, terms)
    assert not torch.equal(holder[2](torch.ones(12, 50)) != 0, mask)  # and every layer


def test_dropout_needs_keys_in_training_only() -> None:
    layer, holder = dropout()
    assert isinstance(holder[3], nn.Dropout)
    with pytest.raises(RuntimeError, match="without one key for each row"):
        layer(torch.ones(2, 4))
    layer.eval()
    assert torch.equal(layer(torch.ones(2, 4)), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        (0, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_of_seven_rounds_gives_the_published_answers(word: int, key: int, expected: tuple) -> None:
    words = philox((torch.tensor([word]),) * 4, (key, key), rounds=7)
    assert tuple(int(w) for w in words) == expected


def test_seeds_and_positions_beyond_32_bits_have_their_own_numbers() -> None:
    where = torch.tensor([3, 3 + 2**32, 3 + 2**50])
    words = random_words(0, 0, Purpose.SAMPLE, where, 40)
    assert len({tuple(row) for row in words.tolist()}) == 3
    assert int(words.min()) >= 0
    assert int(words.max()) < 2**32

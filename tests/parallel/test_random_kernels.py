"""The Triton kernels of the keyed random numbers against the plain-torch ones, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

CODE = """
import torch
from klray.networks.dropout import keyed_dropout
from klray.parallel import random, random_kernels as kernels
from klray.parallel.random import Purpose

where = torch.cat([torch.arange(3), torch.tensor([2**32 + 1, 2**50])])
for seed in (0, 1, 2**40 + 5, 2**63 + 9):
    for step in (0, 1, 70000):
        now = torch.tensor(step)
        for count in (1, 4, 11):
            words = kernels.words(where, now, random._signed(seed), int(Purpose.TIME), count)
            assert torch.equal(words, random.random_words(seed, step, Purpose.TIME, where, count)), (seed, step, count)
        terms = torch.tensor([4, 0, 7])
        keys = kernels.keys(where, terms, now, random._signed(seed), int(Purpose.DROPOUT))
        assert torch.equal(keys, random.dropout_keys(seed, step, where, terms)), (seed, step)

many = torch.arange(2500)
drawn = kernels.normal(many, torch.tensor(3), 7, int(Purpose.NOISE), 401, torch.float32)
expected = random.normal(7, 3, Purpose.NOISE, many, (401,), torch.float32)
steps = (drawn.view(torch.int32) - expected.view(torch.int32)).abs()
assert int(steps.max()) <= 1, int(steps.max())
assert int((steps > 0).sum()) <= 1, int((steps > 0).sum())  # of a million
double = kernels.normal(where, torch.tensor(3), 7, int(Purpose.NOISE), 6, torch.float64)
torch.testing.assert_close(double, random.normal(7, 3, Purpose.NOISE, where, (6,)), rtol=0, atol=4e-15)

keys = random.dropout_keys(1, 2, torch.arange(3), torch.arange(2))
generator = torch.Generator().manual_seed(0)
for shape in ((6, 3, 4, 4), (6, 5, 2, 3), (6, 37), (6, 24, 8, 8), (6, 300, 4, 4)):
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(shape, generator=generator).to(dtype)
        x.view(-1)[5] = float("inf")
        for last in (False, True) if len(shape) == 4 else (False,):
            given = x.contiguous(memory_format=torch.channels_last) if last else x
            for threshold in (6554, 1, 65535):
                y = kernels.dropout(given, keys, 3, threshold)
                plain = keyed_dropout(x, keys, 3, threshold)
                assert torch.equal(y == 0, plain == 0)  # the same mask
                torch.testing.assert_close(y, plain, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
print("as the plain ones")
"""


@pytest.mark.slow
@pytest.mark.essential
def test_the_kernels_draw_the_same_bits() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "as the plain ones", done.stderr[-2000:]

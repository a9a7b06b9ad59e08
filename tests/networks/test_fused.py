"""The fused operators against float64 formulas, by the plain path and, in Triton's interpreter, by the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import klray.networks
from klray.networks import fused
from klray.networks.fused import add_bias, channel_sum, group_norm_silu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# B, C, H, W, groups: groups of 3, 12, 1 to 64 channels; images of one tile and of several; part tiles.
SHAPES: list[tuple[int, ...]] = [(2, 24, 3, 3, 8), (3, 32, 1, 1, 8), (2, 96, 4, 4, 32), (1, 384, 8, 8, 32)]
SHAPES += [(1, 6, 5, 2, 1), (1, 128, 4, 4, 2), (1, 16, 48, 40, 4), (2, 32, 8, 8, 32)]


def formula(x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Tensor | None, silu: bool) -> Tensor:
    x = x if shift is None else x + shift[:, :, None, None]
    y = F.group_norm(x, groups, weight, bias, 1e-6)
    return F.silu(y) if silu else y


def apart(value: Tensor, expected: Tensor) -> float:
    """The largest error against the largest value; a gradient that is 0 in exact numbers counts as one of 0.1."""
    value, expected = value.detach().double(), expected.detach()
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=0.1))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and shift, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width, _ = shape
    wide = torch.promote_types(dtype, torch.float32)
    x = (mean + torch.randn(batch, channels, height, width, generator=generator)).to(dtype)
    weight, bias = 0.5 + torch.rand(channels, generator=generator), torch.randn(channels, generator=generator)
    shift = torch.randn(batch, channels, generator=generator).to(dtype)
    made = x, weight.to(wide), bias.to(wide), shift
    return tuple(t.requires_grad_() for t in made)  # type: ignore[return-value]


def compare_norm(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float, shifted: bool, silu: bool, last: bool
) -> None:
    x, weight, bias, shift = inputs(shape, dtype, mean)
    if last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    given = [x, weight, bias, shift] if shifted else [x, weight, bias]
    doubles = [t.detach().double().requires_grad_() for t in given]
    y = group_norm_silu(x, weight, bias, shape[-1], 1e-6, shift if shifted else None, silu)
    expected = formula(doubles[0], doubles[1], doubles[2], shape[-1], doubles[3] if shifted else None, silu)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(y, given, dy)
    assert y.dtype == dtype and [g.dtype for g in gradients] == [t.dtype for t in given]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, gradients[0]))
    allowed = max(ROUNDING[dtype], 5e-7 * mean)  # a large mean leaves float32 fewer digits, in torch too
    correct = expected, *torch.autograd.grad(expected, doubles, dy.double())
    for value, exact in zip((y, *gradients), correct, strict=True):
        assert apart(value, exact) < allowed


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_of_the_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    turn = SHAPES.index(shape) + list(ROUNDING).index(dtype)
    compare_norm(shape, dtype, 0.0, shifted=turn % 2 == 0, silu=turn % 3 > 0, last=turn % 4 < 2)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_numbers_of_each_form_of_the_norm(shifted: bool, silu: bool) -> None:
    compare_norm((2, 24, 3, 3, 8), torch.float32, 0.0, shifted, silu, last=True)


@pytest.mark.parametrize("shape", [(1, 16, 8, 8, 4), (1, 16, 48, 40, 4)], ids=str)
def test_numbers_of_the_norm_around_a_large_mean(shape: tuple[int, ...]) -> None:
    compare_norm(shape, torch.float32, 1e3, shifted=True, silu=False, last=True)


def test_numbers_of_a_shift_that_all_images_share() -> None:
    x, weight, bias, shift = inputs((3, 8, 2, 2, 4), torch.float32)
    row = shift.detach()[:1].requires_grad_()
    y = group_norm_silu(x, weight, bias, 4, 1e-6, row.expand(3, -1))
    expected = formula(x, weight, bias, 4, row.expand(3, -1), True)
    torch.testing.assert_close(y, expected, rtol=0, atol=3e-6)
    ours, theirs = (torch.autograd.grad(out.square().sum(), row)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_numbers_of_the_sums(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # so that a program has several tiles to add, without large tensors
        monkeypatch.setattr(fused._kernels(), "_PROGRAMS", 2)
    for shape in ((2, 24, 5, 5), (3, 300, 3, 2), (3, 5, 40, 40)):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2))
        bias = torch.randn(shape[1], generator=generator).requires_grad_()
        for given in (None, bias):
            y = add_bias(a, b, given)
            expected = a.double() + b.double() + (0 if given is None else given.double()[:, None, None])
            assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            assert apart(y, expected) < ROUNDING[dtype]
        dy = torch.randn(shape, generator=generator).to(dtype)
        da, db, dbias = torch.autograd.grad(y, (a, b, bias), dy)
        assert torch.equal(da, dy) and torch.equal(db, dy)
        for total in (dbias, channel_sum(dy)):
            assert total.dtype == torch.float32
            torch.testing.assert_close(total.double(), dy.double().sum((0, 2, 3)), rtol=0, atol=1e-3)


def test_numbers_are_the_same_bits_twice() -> None:
    x, weight, bias, shift = inputs((2, 24, 8, 8, 8), torch.bfloat16)

    def once() -> list[Tensor]:
        y = add_bias(group_norm_silu(x, weight, bias, 8, 1e-6, shift), x, bias)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, weight, bias, shift))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.slow
@pytest.mark.essential
def test_the_kernels_pass_the_tests_of_numbers() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "numbers_", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "failed" not in done.stdout and "skipped" not in done.stdout


def test_numbers_come_from_the_kernels_where_interpreted() -> None:
    assert (fused._kernels_for(torch.zeros(1)) is not None) == INTERPRETED
    assert fused._kernels_for(torch.zeros(1).double()) is None


def test_without_triton_the_plain_path_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "klray.networks.fused_kernels", raising=False)
    monkeypatch.delattr(klray.networks, "fused_kernels", raising=False)
    assert fused._kernels.__wrapped__() is None


def doubles() -> tuple[Tensor, ...]:
    return inputs((2, 6, 3, 2, 3), torch.float64)


CALLS: dict[str, Callable[..., Any]] = {
    "norm": lambda x, weight, bias, shift: group_norm_silu(x, weight, bias, 3, 1e-5, shift),
    "norm alone": lambda x, weight, bias, shift: group_norm_silu(x, weight, bias, 2, 1e-5, None, False),
    "sum": lambda x, weight, bias, shift: add_bias(x, 2 * x, bias),
    "sum without bias": lambda x, weight, bias, shift: add_bias(x, 2 * x, None),
    "channels": lambda x, weight, bias, shift: channel_sum(x),
}


@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_those_of_finite_differences(call: str) -> None:
    assert torch.autograd.gradcheck(CALLS[call], doubles())


@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_a_break_in_the_graph(call: str) -> None:
    given = doubles()
    y, traced = CALLS[call](*given), torch.compile(CALLS[call], fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(y, traced)
    ours, theirs = (torch.autograd.grad(out.square().sum(), given, allow_unused=True) for out in (traced, y))
    assert all(torch.equal(a, b) if b is not None else a is None for a, b in zip(ours, theirs, strict=True))


def test_operators_keep_the_rules_of_torch_library() -> None:
    x, weight, bias, shift = inputs((2, 6, 3, 2, 3), torch.bfloat16)
    for given in ((x, weight, bias, 3, 1e-5, shift, True), (x, weight, bias, 2, 1e-5, None, False)):
        torch.library.opcheck(fused._group_norm_silu, given)
    for bias_or_none in (bias, None):
        torch.library.opcheck(add_bias, (x, shift[:, :, None, None].expand_as(x), bias_or_none))
    torch.library.opcheck(channel_sum, (x,))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_norm_is_one_operator_forward_and_one_backward() -> None:
    x, weight, bias, shift = inputs((2, 24, 4, 4, 8), torch.bfloat16)
    dy = torch.randn(x.shape).bfloat16()
    with Operations() as seen:
        torch.autograd.grad(group_norm_silu(x, weight, bias, 8, 1e-6, shift), (x, weight, bias, shift), dy)
    assert [name for name in seen.names if name.startswith("klray")] == [
        "klray.group_norm_silu.default", "klray.group_norm_silu_backward.default"
    ]  # fmt: skip
    assert len(seen.names) <= 4, seen.names  # the others take dweight and dbias apart


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_kernels_compile_for_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch, as the launchers make it, down to the machine code of an H100, which takes no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from klray.networks import fused_kernels as kernels

    kinds = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    assembly: list[str] = []

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {"num_warps": named.pop("num_warps")}
        signature, constants, aligned = {}, {}, {}
        for i, (name, value) in enumerate((dict(zip(self.arg_names, args, strict=False)) | named).items()):
            if i in self.constexprs or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], aligned[(i,)] = kinds[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(self, signature, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.asm["cubin"]
        assembly.append(made.asm["ptx"])

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_launch)
    shapes = [(128, 128, 32, 32), (1, 24, 3, 8), (3, 96, 64, 32)]
    for batch, channels, size, groups in shapes if dtype == torch.bfloat16 else shapes[:1]:
        x = torch.empty((batch, channels, size, size), dtype=dtype, memory_format=torch.channels_last)
        weight, shift = torch.empty(channels), torch.empty(batch, channels, dtype=dtype)
        given, silu = (None, False) if size == 3 else (shift, True)
        y, mean, rstd = kernels.norm_forward(x, weight, weight, groups, 1e-6, given, silu)
        kernels.norm_backward(y, x, given, weight, weight, mean, rstd, silu)
        kernels.add_bias(x, y, weight if silu else None)
        kernels.channel_sum(x)
    assert not any("atom." in text or "\tred." in text for text in assembly)
    assert all("ld.global.v4" in text for text in assembly[:4])  # 16 bytes at once

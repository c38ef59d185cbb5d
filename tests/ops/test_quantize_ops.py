"""The quantising ops behind torch.library, on bad input, and next to what they are measured against."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import Size
from benchmarks.cases.quantize import cases as quantize_cases
from flowgrpo_fast.ops import (
    Fp8Rows,
    Nvfp4,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    merge_lora_quantize_,
    quantize_fp8_rows,
    quantize_nvfp4,
)

OPS = torch.ops.flowgrpo_fast
FP8, FP4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2


def matrix(rows=4, columns=32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def lora(rows=4, columns=32, rank=3):
    return matrix(rows, columns), matrix(rank, columns), matrix(rows, rank)


def as_bytes(*tensors):
    return [t.view(torch.uint8) if t.dtype in (FP8, FP4) else t for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "lora"])
def test_opcheck(with_lora, dtype):
    weight, lora_a, lora_b = (tensor.to(dtype) for tensor in lora())
    flat = (weight, lora_a, lora_b, 0.5) if with_lora else (weight, None, None, 0.0)
    torch.library.opcheck(OPS.quantize_fp8_rows, (*flat, *as_bytes(*quantize_fp8_rows(weight))))
    outputs = as_bytes(*quantize_nvfp4(weight))
    torch.library.opcheck(OPS.quantize_nvfp4, (*flat, *outputs, None, True))
    torch.library.opcheck(OPS.quantize_nvfp4, (*flat, *outputs[:2], None, torch.tensor(0.1), True))


def test_opcheck_of_the_way_back():
    fp8, nvfp4 = as_bytes(*quantize_fp8_rows(matrix())), as_bytes(*quantize_nvfp4(matrix()))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.library.opcheck(OPS.dequantize_fp8_rows, (*fp8, dtype))
        torch.library.opcheck(OPS.dequantize_nvfp4, (*nvfp4, dtype, True))


@pytest.mark.slow
def test_compiled_fp8_equals_eager():
    weight, lora_a, lora_b = lora(8, 64)

    def refresh(x, lora_a, lora_b, codes, scale):
        merge_lora_quantize_(Fp8Rows(codes, scale), x * 2, lora_a, lora_b, 0.5)
        fresh = quantize_fp8_rows(x + 1)
        return dequantize_fp8_rows(codes, scale), dequantize_fp8_rows(*fresh) * 2

    results = []
    for function in (refresh, torch.compile(refresh, fullgraph=True)):
        out = quantize_fp8_rows(weight)
        results.append((*function(weight, lora_a, lora_b, *out), out.codes.float(), out.scale))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_traced_nvfp4_equals_eager():
    """The backend is not inductor: that knows no float4 on a CPU."""

    def there_and_back(x):
        return dequantize_nvfp4(*quantize_nvfp4(x * 2))

    x = matrix(8, 64)
    assert torch.equal(
        torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x), there_and_back(x)
    )


def test_fake_tensors_give_shapes():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(matrix(130, 80))
        fp8, nvfp4 = quantize_fp8_rows(x), quantize_nvfp4(x)
        back = dequantize_nvfp4(*nvfp4)
    assert [(t.shape, t.dtype) for t in fp8] == [((130, 80), FP8), ((130, 1), torch.float32)]
    shapes = [((130, 40), FP4), ((256, 8), FP8), ((), torch.float32)]
    assert [(t.shape, t.dtype) for t in nvfp4] == shapes
    assert (back.shape, back.dtype) == ((130, 80), torch.bfloat16)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_sync_and_no_pass_beside_the_ops():
    weight, lora_a, lora_b = lora()
    with Recorder() as recorder:
        fp8, nvfp4 = quantize_fp8_rows(weight), quantize_nvfp4(weight)
        merge_lora_quantize_(fp8, weight, lora_a, lora_b)
        merge_lora_quantize_(nvfp4, weight, lora_a, lora_b)
        dequantize_fp8_rows(*fp8)
        dequantize_nvfp4(*nvfp4)
    ours = [name for name in recorder.seen if name.startswith("flowgrpo_fast.")]
    assert len(ours) == 6
    views = ("aten.view.dtype", "aten.detach.default", "aten.empty.memory_format")
    assert set(recorder.seen) - set(ours) <= set(views)


def one_line(op, message):
    return rf"\A{op}: [^\n]*{re.escape(message)}[^\n]*\Z"


BAD_MATRICES = [
    ([1.0], "x is a list, must be a torch.Tensor"),
    (torch.tensor(1.0), "x has 0 dimensions, must be [..., columns]"),
    (torch.zeros(0, 16), "x is empty: shape [0, 16], must have at least one element"),
    (torch.zeros(4, 0), "x is empty: shape [4, 0], must have at least one element"),
    (torch.zeros(4, 16).double(), "x has dtype torch.float64, must have float32, bfloat16 or float16"),
    (torch.zeros(4, 16).int(), "x has dtype torch.int32, must have float32, bfloat16 or float16"),
    (torch.zeros(4, 16, device="meta"), "x is on meta with layout torch.strided, must be a dense tensor"),
]


@pytest.mark.parametrize(("x", "message"), BAD_MATRICES, ids=[m for _, m in BAD_MATRICES])
def test_bad_matrices(x, message):
    for op in (quantize_fp8_rows, quantize_nvfp4):
        with pytest.raises(ValueError, match=one_line(op.__name__, message)):
            op(x)


def fp4(*shape):
    return torch.zeros(shape, dtype=torch.uint8).view(FP4)


NVFP4 = quantize_nvfp4(matrix())

BAD_CALLS = [
    (lambda: quantize_nvfp4(matrix(4, 24)), "quantize_nvfp4", "x has 24 columns, must have a multiple of 16"),
    (
        lambda: quantize_nvfp4(matrix(), torch.ones(1)),
        "quantize_nvfp4",
        "global_scale has shape [1], must have []",
    ),
    (
        lambda: quantize_nvfp4(matrix(), torch.ones((), dtype=torch.float64)),
        "quantize_nvfp4",
        "global_scale has dtype torch.float64, must have torch.float32",
    ),
    (
        lambda: quantize_nvfp4(matrix(), 0.5),
        "quantize_nvfp4",
        "global_scale is a float, must be a torch.Tensor",
    ),
    (
        lambda: quantize_fp8_rows(matrix(), (1, 2)),
        "quantize_fp8_rows",
        "out is a tuple, must be Fp8Rows",
    ),
    (
        lambda: quantize_fp8_rows(matrix(), Fp8Rows(torch.zeros(4, 32), torch.zeros(4, 1))),
        "quantize_fp8_rows",
        "out.codes has dtype torch.float32, must have torch.float8_e4m3fn",
    ),
    (
        lambda: quantize_fp8_rows(matrix(), quantize_fp8_rows(matrix(3))),
        "quantize_fp8_rows",
        "codes has shape [3, 32], must have [4, 32]",
    ),
    (
        lambda: quantize_fp8_rows(matrix(), quantize_fp8_rows(matrix())._replace(scale=torch.zeros(4))),
        "quantize_fp8_rows",
        "scale has shape [4], must have [4, 1]",
    ),
    (
        lambda: quantize_nvfp4(matrix(), out=quantize_nvfp4(matrix(), swizzle=False)),
        "quantize_nvfp4",
        "scales has shape [4, 2], must have [128, 4]",
    ),
    (
        lambda: dequantize_fp8_rows(torch.zeros(4, 32), torch.zeros(4, 1)),
        "dequantize_fp8_rows",
        "codes has dtype torch.float32, must have torch.float8_e4m3fn",
    ),
    (
        lambda: dequantize_fp8_rows(torch.zeros(4, 32).to(FP8), torch.zeros(4, 2)),
        "dequantize_fp8_rows",
        "scale has shape [4, 2], must have [4, 1]",
    ),
    (
        lambda: dequantize_fp8_rows(*quantize_fp8_rows(matrix()), torch.float64),
        "dequantize_fp8_rows",
        "dtype is torch.float64, must be one of torch.float32, torch.bfloat16, torch.float16",
    ),
    (
        lambda: dequantize_nvfp4(*quantize_nvfp4(matrix()), swizzle=False),
        "dequantize_nvfp4",
        "scales has shape [128, 4], must have [4, 2]",
    ),
    (
        lambda: quantize_nvfp4(matrix(), out=NVFP4._replace(codes=torch.zeros(4, 16))),
        "quantize_nvfp4",
        "out.codes has dtype torch.float32, must have torch.float4_e2m1fn_x2",
    ),
    (
        lambda: quantize_nvfp4(matrix(), out=NVFP4._replace(codes=fp4(4, 24))),
        "quantize_nvfp4",
        "codes has shape [4, 24], must have [4, 16]",
    ),
    (
        lambda: quantize_nvfp4(matrix(), out=NVFP4._replace(scales=torch.zeros(128, 4))),
        "quantize_nvfp4",
        "out.scales has dtype torch.float32, must have torch.float8_e4m3fn",
    ),
    (
        lambda: quantize_nvfp4(matrix(), out=NVFP4._replace(global_scale=None)),
        "quantize_nvfp4",
        "global_scale is a NoneType, must be a torch.Tensor",
    ),
    (
        lambda: quantize_nvfp4(matrix(), out=NVFP4._replace(global_scale=torch.zeros(1))),
        "quantize_nvfp4",
        "global_scale has shape [1], must have []",
    ),
    (
        lambda: quantize_nvfp4(matrix(), out=NVFP4._replace(global_scale=torch.zeros(()).half())),
        "quantize_nvfp4",
        "global_scale has dtype torch.float16, must have torch.float32",
    ),
    (
        lambda: dequantize_nvfp4(torch.zeros(4, 16), *NVFP4[1:]),
        "dequantize_nvfp4",
        "codes has dtype torch.float32, must have torch.float4_e2m1fn_x2",
    ),
    (
        lambda: dequantize_nvfp4(fp4(4, 12), *NVFP4[1:]),
        "dequantize_nvfp4",
        "codes has 12 columns, must have a multiple of 8",
    ),
    (lambda: dequantize_nvfp4(fp4(0, 16), *NVFP4[1:]), "dequantize_nvfp4", "codes is empty: shape [0, 16]"),
    (
        lambda: dequantize_nvfp4(fp4(16), *NVFP4[1:]),
        "dequantize_nvfp4",
        "codes has shape [16], must have [1, 16]",
    ),
    (
        lambda: dequantize_nvfp4(*NVFP4[:2], 0.5),
        "dequantize_nvfp4",
        "global_scale is a float, must be a torch.Tensor",
    ),
    (
        lambda: dequantize_nvfp4(*NVFP4[:2], torch.ones(1)),
        "dequantize_nvfp4",
        "global_scale has shape [1], must have []",
    ),
    (
        lambda: dequantize_nvfp4(*NVFP4[:2], torch.ones(()).double()),
        "dequantize_nvfp4",
        "global_scale has dtype torch.float64, must have torch.float32",
    ),
    (
        lambda: dequantize_nvfp4(*NVFP4, torch.float64),
        "dequantize_nvfp4",
        "dtype is torch.float64, must be one of torch.float32, torch.bfloat16, torch.float16",
    ),
    (
        lambda: dequantize_nvfp4(*NVFP4, "float32"),
        "dequantize_nvfp4",
        "dtype is a str, must be one of torch.float32, torch.bfloat16, torch.float16",
    ),
]


@pytest.mark.parametrize(("call", "op", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls(call, op, message):
    with pytest.raises(ValueError, match=one_line(op, message)):
        call()


BAD_MERGES = [
    ({"weight": matrix()[0]}, "weight has 1 dimension(s), must be [rows, columns]"),
    ({"weight": matrix(4, 32).double()}, "weight has dtype torch.float64, must have float32"),
    ({"lora_a": None}, "lora_a is a NoneType, must be a torch.Tensor"),
    ({"lora_a": matrix(3, 31)}, "lora_a has shape [3, 31], must have [3, 32]"),
    ({"lora_a": torch.tensor(1.0)}, "lora_a has 0 dimension(s), must be [rank, columns]"),
    ({"lora_a": matrix(257, 32)}, "lora_a has rank 257, must have a rank of 256 at most"),
    ({"lora_b": matrix(5, 3)}, "lora_b has shape [5, 3], must have [4, 3]"),
    ({"lora_b": matrix(4, 2)}, "lora_b has shape [4, 2], must have [4, 3]"),
    ({"lora_b": matrix(4, 3).int()}, "lora_b has dtype torch.int32, must have float32"),
    ({"out": None}, "out is a NoneType, must be Fp8Rows or Nvfp4"),
    ({"global_scale": torch.tensor(1.0)}, "global_scale is given, must be None for out of Fp8Rows"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_MERGES, ids=[m for _, m in BAD_MERGES])
def test_bad_merges(bad, message):
    weight, lora_a, lora_b = lora()
    arguments = {"out": quantize_fp8_rows(weight), "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    with pytest.raises(ValueError, match=one_line("merge_lora_quantize_", message)):
        merge_lora_quantize_(**{**arguments, **bad})


BAD_NVFP4_MERGES = [
    ({"weight": matrix(4, 24), "lora_a": matrix(3, 24)}, "weight has 24 columns, must have a multiple of 16"),
    ({"global_scale": 0.5}, "global_scale is a float, must be a torch.Tensor"),
    ({"global_scale": torch.ones(1)}, "global_scale has shape [1], must have []"),
    (
        {"global_scale": torch.ones(()).double()},
        "global_scale has dtype torch.float64, must have torch.float32",
    ),
    ({"swizzle": False}, "scales has shape [128, 4], must have [4, 2]"),
    ({"out": quantize_nvfp4(matrix(), swizzle=False)}, "scales has shape [4, 2], must have [128, 4]"),
    ({"out": NVFP4._replace(global_scale=None)}, "global_scale is a NoneType, must be a torch.Tensor"),
    (
        {"out": NVFP4._replace(codes=matrix())},
        "out.codes has dtype torch.float32, must have torch.float4_e2m1fn_x2",
    ),
    ({"out": tuple(NVFP4)}, "out is a tuple, must be Fp8Rows or Nvfp4"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_NVFP4_MERGES, ids=[m for _, m in BAD_NVFP4_MERGES])
def test_bad_merges_into_nvfp4(bad, message):
    weight, lora_a, lora_b = lora()
    arguments = {"out": quantize_nvfp4(weight), "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    with pytest.raises(ValueError, match=one_line("merge_lora_quantize_", message)):
        merge_lora_quantize_(**{**arguments, **bad})


def test_bad_output_of_a_merge():
    weight, lora_a, lora_b = lora()
    short = quantize_nvfp4(weight)._replace(codes=torch.zeros(4, 8, dtype=torch.uint8).view(FP4))
    assert isinstance(short, Nvfp4)
    with pytest.raises(
        ValueError, match=one_line("merge_lora_quantize_", "codes has shape [4, 8], must have [4, 16]")
    ):
        merge_lora_quantize_(short, weight, lora_a, lora_b)


def test_autograd_knows_what_was_written():
    """A backward that needs the old codes or scales raises instead of reading the new ones."""
    weight, lora_a, lora_b = lora()
    fp8, nvfp4 = quantize_fp8_rows(weight), quantize_nvfp4(weight)
    given = torch.tensor(0.5)
    before = [t._version for t in (*fp8, *nvfp4)]
    quantize_fp8_rows(weight, out=fp8)
    merge_lora_quantize_(fp8, weight, lora_a, lora_b)
    quantize_nvfp4(weight, out=nvfp4)
    merge_lora_quantize_(nvfp4, weight, lora_a, lora_b, global_scale=given)
    after = [t._version for t in (*fp8, *nvfp4)]
    assert [new - old for new, old in zip(after, before, strict=True)] == [2, 2, 2, 2, 1]
    assert given._version == 0


@pytest.mark.slow
def test_contenders_compute_the_same():
    for case in quantize_cases(Size("toy", 64, (64,)), torch.bfloat16, torch.device("cpu")):
        results = {name: as_bytes(*run()) for name, run in case.contenders.items()}
        for contender in results.values():
            for ours, theirs in zip(results["ours"], contender, strict=True):
                assert torch.equal(ours.flatten(), theirs.flatten()), case.operation

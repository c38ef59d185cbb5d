"""Products in low precision against dequantise-then-multiply, written out with the reference ops and ml_dtypes."""

from __future__ import annotations

import copy
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from flowgrpo_fast.ops import reference
from flowgrpo_fast.ops.reference.quantize import merged_weight
from flowgrpo_fast.precision import FORMATS, Lora, QuantizedLinear
from flowgrpo_fast.precision import formats as formats_room

NAMES = sorted(FORMATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_rows(x: torch.Tensor) -> torch.Tensor:
    return reference.dequantize_fp8_rows(*reference.quantize_fp8_rows(x))


def by_blocks(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Block by block, in numpy, rounded to E4M3 by ml_dtypes."""
    values, out = x.float().numpy(), np.empty(x.shape, np.float32)
    for i, j in product(range(0, x.shape[0], rows), range(0, x.shape[1], 128)):
        block = values[i : i + rows, j : j + 128]
        scale = np.float32(np.abs(block).max()) / np.float32(448)
        codes = (block / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        out[i : i + rows, j : j + 128] = codes.astype(np.float32) * scale
    return torch.from_numpy(out)


def by_sixteens(x: torch.Tensor) -> torch.Tensor:
    return reference.dequantize_nvfp4(*reference.quantize_nvfp4(x))


WEIGHT = {
    "fp8_rows": by_rows,
    "fp8_tensor": lambda w: by_rows(w.reshape(1, -1)).view(w.shape),
    "fp8_blocks": lambda w: by_blocks(w, 128),
    "nvfp4": by_sixteens,
}
ACTIVATION = WEIGHT | {"fp8_blocks": lambda x: by_blocks(x, 1)}


def layer(
    name: str, rows: int = 256, columns: int = 384, bias: bool = True
) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    source = nn.Linear(columns, rows, bias=bias)
    quantized = QuantizedLinear(source, FORMATS[name])
    quantized.write_(source.weight)
    return source, quantized


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stored_weight_is_the_quantised_one(name, dtype) -> None:
    source, quantized = layer(name)
    weight = source.weight.detach().to(dtype)
    quantized.write_(weight)
    assert torch.equal(quantized.dequantized(), WEIGHT[name](weight))
    assert torch.equal(quantized.dequantized(dtype), WEIGHT[name](weight).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("num_rows", [1, 3, 64])
@pytest.mark.parametrize("name", ["fp8_rows", "fp8_tensor"])
def test_scaled_mm_is_dequantise_then_multiply_to_the_bit(name, num_rows, bias, dtype) -> None:
    """The CPU's own scaled_mm: fp32 products of dequantised operands, the bias in the result's dtype."""
    assert FORMATS[name].is_native(torch.device("cpu"))
    source, quantized = layer(name, bias=bias)
    x = torch.randn(num_rows, 384).to(dtype)
    expected = ACTIVATION[name](x) @ WEIGHT[name](source.weight.detach()).t().contiguous()
    if bias:
        expected = expected + source.bias.detach().to(dtype).float()
    assert torch.equal(quantized(x), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fp8_blocks", "nvfp4"])
def test_an_emulated_product_is_dequantise_then_multiply(name, dtype) -> None:
    assert not FORMATS[name].is_native(torch.device("cpu"))
    source, quantized = layer(name)
    x = torch.randn(7, 384).to(dtype)
    operands = ACTIVATION[name](x).to(dtype), WEIGHT[name](source.weight.detach()).to(dtype)
    assert torch.equal(quantized(x), nn.functional.linear(*operands, source.bias.detach().to(dtype)))


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_that_of_the_format(name) -> None:
    source, quantized = layer(name)
    x = torch.randn(64, 384)
    error = float(((quantized(x) - source(x)).norm() / source(x).norm()).detach())
    low, high = (0.08, 0.16) if name == "nvfp4" else (0.02, 0.045)
    assert low < error < high


@pytest.mark.parametrize("name", NAMES)
def test_merging_is_quantising_the_merged_weight(name) -> None:
    source, quantized = layer(name)
    lora = Lora(torch.randn(5, 384), 0.01 * torch.randn(256, 5), 0.7)
    quantized.write_(source.weight, lora)
    if name in ("fp8_rows", "nvfp4"):
        weight = merged_weight(source.weight.detach(), lora.a, lora.b, lora.scale)
    else:
        weight = torch.addmm(source.weight.detach(), lora.b, lora.a, alpha=lora.scale)
    assert torch.equal(quantized.dequantized(), WEIGHT[name](weight))
    exact = source.weight.detach().double() + lora.scale * lora.b.double() @ lora.a.double()
    error = (quantized.dequantized().double() - exact).norm() / exact.norm()
    assert error < (0.11 if name == "nvfp4" else 0.03)


@pytest.mark.parametrize("name", NAMES)
def test_writing_keeps_the_memory(name) -> None:
    source, quantized = layer(name)
    before = [t.data_ptr() for t in quantized.stored]
    first = quantized.dequantized()
    quantized.write_(2 * source.weight, Lora(torch.randn(2, 384), torch.randn(256, 2), 1.0))
    assert [t.data_ptr() for t in quantized.stored] == before
    assert not torch.equal(first, quantized.dequantized())
    quantized.write_(source.weight)
    assert torch.equal(first, quantized.dequantized())


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_passes_to_the_input_through_the_dequantised_weight(name) -> None:
    _, quantized = layer(name)
    x = torch.randn(2, 9, 384, requires_grad=True)
    out = quantized(x)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, grad)
    expected = grad.double() @ quantized.dequantized().double()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(out, quantized(x)), "with and without gradient the bits are the same"


@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_its_dtype_and_changes_no_operand(name) -> None:
    """Autocast would reach into the CPU's scaled_mm, and round the dequantised operands to bf16."""
    _, quantized = layer(name)
    x = torch.randn(5, 384)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = quantized(x)
    assert low.dtype is torch.bfloat16
    if FORMATS[name].is_native(x.device):
        operands = ACTIVATION[name](x), quantized.dequantized()
        bias = quantized.bias.detach().bfloat16().float()
        assert torch.equal(low, (operands[0] @ operands[1].t().contiguous() + bias).bfloat16())
    else:
        torch.testing.assert_close(low.float(), quantized(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_casts_and_copies_of_the_module_leave_the_weight_alone(name) -> None:
    _, quantized = layer(name)
    expected = quantized.dequantized()
    twin = copy.deepcopy(quantized).to(torch.bfloat16).float().half()
    assert torch.equal(twin.dequantized(), expected)
    assert all(t.dtype is torch.uint8 for t in twin.stored)
    assert list(quantized.state_dict()) == ["bias"], "what is derived is not saved"


@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole_it_gives_the_same_bits(name) -> None:
    torch._dynamo.reset()
    _, quantized = layer(name)
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 384, requires_grad=True)
    out = compiled(x)
    assert torch.equal(out, quantized(x))
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, quantized)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("capability", "cuda", "native"),
    [
        ((8, 0), "13.0", set()),
        ((8, 9), "13.0", {"fp8_rows", "fp8_tensor"}),
        ((9, 0), "13.0", {"fp8_rows", "fp8_tensor", "fp8_blocks"}),
        ((9, 0), "12.6", {"fp8_rows", "fp8_tensor"}),
        ((10, 0), "13.0", {"fp8_rows", "fp8_tensor", "nvfp4"}),
        ((12, 0), "13.0", {"fp8_rows", "fp8_tensor", "nvfp4"}),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),  # sets have no order
)
def test_what_each_device_has(capability, cuda, native, monkeypatch) -> None:
    monkeypatch.setattr(formats_room, "capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert {name for name in NAMES if FORMATS[name].is_promised(torch.device("cuda"))} == native


@pytest.mark.parametrize("name", NAMES)
def test_the_compiler_lowers_only_the_products_it_can(name) -> None:
    """Its own lowering of `scaled_mm` refuses swizzled scales, and on CUDA scales padded to a multiple of four."""
    _, quantized = layer(name, columns=640)
    quantized.native = True
    with torch.no_grad():
        graph = make_fx(quantized, tracing_mode="fake", _allow_non_fake_inputs=True)(
            torch.randn(8, 640)
        ).graph
    seen = {str(node.target) for node in graph.nodes}
    assert ("aten._scaled_mm_v2.default" in seen) == (name in ("fp8_rows", "fp8_tensor"))
    assert ("flowgrpo_fast.scaled_mm.default" in seen) == (name in ("fp8_blocks", "nvfp4"))


@pytest.mark.parametrize("name", ["fp8_blocks", "nvfp4"])
def test_the_product_the_compiler_does_not_see_is_the_native_one(name, monkeypatch) -> None:
    form = FORMATS[name]

    def product(self, x, stored, bias, dtype):
        return nn.functional.linear(self.rounded(x, dtype), self.values(stored, dtype), bias)

    monkeypatch.setattr(type(form), "scaled_mm", product)
    _, quantized = layer(name)
    x = torch.randn(5, 384, dtype=torch.bfloat16)
    emulated = quantized(x)
    quantized.native = True
    assert torch.equal(quantized(x), emulated)
    assert torch.equal(torch.compile(quantized, backend="aot_eager", fullgraph=True)(x), emulated)
    torch.library.opcheck(
        formats_room.SCALED_MM,
        (x, *quantized.stored, None, torch.bfloat16, name),
        test_utils=("test_schema", "test_faketensor"),
    )

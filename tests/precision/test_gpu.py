"""Real low-precision products on a GPU. Skipped, saying so, where there is none or it lacks the format."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowgrpo_fast.ops import build_info
from flowgrpo_fast.precision import FORMATS, Lora, QuantizedLinear
from flowgrpo_fast.precision.formats import capability
from flowgrpo_fast.recipe import LowPrecision
from flowgrpo_fast.types import Conditioning

from .conftest import flux, flux_inputs, sd3, sd3_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not build_info()["cuda_archs"], reason="built without CUDA: GPU code not run"),
]
NAMES = sorted(FORMATS)
CUDA = torch.device("cuda")


def on_gpu(name: str, rows: int, columns: int, bias: bool = True) -> QuantizedLinear:
    """A quantised layer on the GPU, or a visible skip."""
    if not FORMATS[name].is_native(CUDA):
        major, minor = capability(CUDA)
        pytest.skip(f"{name} is not native on compute capability {major}.{minor}: product not run")
    torch.manual_seed(0)
    source = nn.Linear(columns, rows, bias=bias, device=CUDA)
    quantized = QuantizedLinear(source, FORMATS[name])
    quantized.write_(source.weight)
    return quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize(
    ("num_rows", "rows", "columns"),
    [(1, 128, 128), (77, 256, 384), (205, 1536, 640), (4096, 1536, 1536), (333, 6144, 1536)],
)
@pytest.mark.parametrize("name", NAMES)
def test_scaled_mm_is_the_product_of_the_dequantised_operands(
    name, num_rows, rows, columns, bias, dtype
) -> None:
    """Against fp64; what is left is the tensor core's short accumulator and the rounding of the result."""
    quantized = on_gpu(name, rows, columns, bias)
    x = torch.randn(num_rows, columns, device=CUDA).to(dtype)
    exact = quantized.form.rounded(x, torch.float32).double() @ quantized.dequantized().double().t()
    if quantized.bias is not None:
        exact = exact + quantized.bias.double()
    with torch.no_grad():
        got = quantized(x)
    assert got.dtype is dtype
    error = (got.double() - exact).norm() / exact.norm()
    assert error < 1e-2, f"relative error {float(error):.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_stored_bytes_and_activations_are_those_of_the_cpu(name) -> None:
    """Also where the product is emulated."""
    torch.manual_seed(0)
    source = nn.Linear(640, 256)
    host = QuantizedLinear(source, FORMATS[name])
    device = QuantizedLinear(nn.Linear(640, 256, device=CUDA), FORMATS[name])
    lora = Lora(torch.randn(4, 640), 0.01 * torch.randn(256, 4), 0.5)
    moved = Lora(lora.a.cuda(), lora.b.cuda(), lora.scale)
    for update, theirs in ((None, None), (lora, moved)):
        host.write_(source.weight, update)
        device.write_(source.weight.cuda(), theirs)
        if update and name in ("fp8_tensor", "fp8_blocks"):
            # These merge by the device's own matrix product: an ulp in a scale moves every byte of it.
            scales = [each.scale.view(torch.float32).cpu() for each in (device.stored, host.stored)]
            torch.testing.assert_close(*scales, rtol=1e-5, atol=0)
            torch.testing.assert_close(
                device.dequantized().cpu(), host.dequantized(), rtol=2**-3, atol=float(scales[1].max())
            )
            continue
        for a, b in zip(device.stored, host.stored, strict=True):
            assert torch.equal(a.cpu(), b)
    x = torch.randn(9, 640)
    assert torch.equal(
        FORMATS[name].rounded(x.cuda(), torch.float32).cpu(), FORMATS[name].rounded(x, torch.float32)
    )


@pytest.mark.filterwarnings("ignore:.* is emulated on:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["merged", "bare_layers", "branch", "shared_base"])
@pytest.mark.parametrize("make", [sd3, flux], ids=["sd3", "flux"])
def test_velocity_with_and_without_gradient_is_the_same_and_near_the_cpu_s(make, mode, name) -> None:
    part = LowPrecision(mode=mode, format=name)
    host = make()
    inputs = sd3_inputs(host) if make is sd3 else flux_inputs()
    with torch.no_grad():
        exact = host.velocity(*inputs)
    device = make()
    device.module.to(CUDA)
    latents, sigma, conditioning = inputs
    names = ("prompt_embeds", "pooled_prompt_embeds")
    moved = Conditioning(*(getattr(conditioning, name).to(CUDA) for name in names))
    with torch.device(CUDA), torch.autocast("cuda", dtype=torch.bfloat16):
        model = part.build(device).model
        with_grad = model.velocity(latents.to(CUDA), sigma.to(CUDA), moved).detach()
        with torch.no_grad():
            without = model.velocity(latents.to(CUDA), sigma.to(CUDA), moved)
    assert torch.equal(with_grad, without)
    assert (without.cpu().float() - exact).norm() < (0.5 if name == "nvfp4" else 0.2) * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_product_follows_a_refresh(name) -> None:
    quantized = on_gpu(name, 256, 384)
    x = torch.randn(64, 384, device=CUDA, dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        quantized(x)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = quantized(x)
    for seed in range(2):
        quantized.write_(
            torch.randn(256, 384, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed))
        )
        graph.replay()
        with torch.no_grad():
            assert torch.equal(captured, quantized(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_dequantised_weight(name) -> None:
    quantized = on_gpu(name, 256, 384)
    x = torch.randn(64, 384, device=CUDA, requires_grad=True)
    grad = torch.randn(64, 256, device=CUDA)
    (got,) = torch.autograd.grad(quantized(x), x, grad)
    torch.testing.assert_close(
        got.double(), grad.double() @ quantized.dequantized().double(), rtol=1e-3, atol=1e-2
    )

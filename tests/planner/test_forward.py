"""One forward: against the counted table of the performance notes, and against a formula written out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import nn

from flowgrpo_fast.planner.architectures import architecture, count, vit_h_14
from flowgrpo_fast.planner.counting import adapted_layers, adapters, count_activations, count_work
from flowgrpo_fast.planner.devices import GPUS, named_gpu, recognised_gpu
from flowgrpo_fast.planner.published import PUBLISHED
from flowgrpo_fast.recipe import FullFineTuning, LoRA, Network

# model, height, width, frames; parameters in B; TFLOP: forward, linear, attention; bf16 GB; ms at 800 and with FP8
# linears at 1400; TFLOP of the backward with adapters, and of all weights. Counted independently, meta device,
# diffusers 0.42.1, torch 2.13.
TABLE = """
sd3.5-medium    512  512  1   2.24   2.22   1.92   0.31   4.5   2.8   1.8    2.68   4.60
sd3-medium      512  512  1   2.03   1.89   1.67   0.22   4.1   2.4   1.5    2.22   3.89
sd3.5-medium   1024 1024  1   2.24  10.91   6.85   4.07   4.5  13.6  10.0   17.02  23.86
sd3.5-large     512  512  1   8.06   7.18   6.62   0.56  16.1   9.0   5.4    8.01  14.63
sd3.5-large    1024 1024  1   8.06  30.03  23.19   6.84  16.1  37.5  25.1   40.29  63.48
flux.1-dev      512  512  1  11.90  21.50  19.85   1.65  23.8  26.9  16.2   23.98  43.83
flux.1-dev      720  720  1  11.90  37.28  32.77   4.51  23.8  46.6  29.0   44.04  76.82
flux.1-dev     1024 1024  1  11.90  74.39  59.51  14.87  23.8  93.0  61.1   96.69 156.21
wan2.1-1.3b     512  512  1   1.42   3.00   2.71   0.29   2.8   3.8   2.3    3.44   6.15
wan2.1-1.3b     240  416 33   1.42  11.54   8.93   2.60   2.8  14.4   9.6   15.44  24.37
wan2.1-1.3b     480  832 81   1.42  283.0   82.1  200.9   2.8   354   310     584    666
hunyuan-video   480  480 53  12.82  296.7  174.8  121.9  25.6   371   277     480    654
qwen-image      512  512  1  20.43  16.65  15.67   0.98  40.9  20.8  12.4   18.12  33.79
qwen-image      720  720  1  20.43  32.69  29.28   3.42  40.9  40.9  25.2   37.82  67.10
qwen-image     1024 1024  1  20.43  70.58  57.42  13.15  40.9  88.2  57.5   90.31 147.73
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
CPU = torch.device("cpu")


def counts(model: str, height: int = 512, width: int = 512, num_frames: int = 1, **more):
    return count(architecture(model), Network(height=height, width=width, num_frames=num_frames, **more))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[:4]))
def test_a_forward_is_that_of_the_table_within_2_percent(row) -> None:
    model, (height, width, frames), numbers = row[0], map(int, row[1:4]), [float(x) for x in row[4:]]
    c = counts(model, height, width, frames)
    work = c.forward
    ms_bf16 = work.forward / 800e12 * 1e3
    ms_fp8 = (work.linear / 1400e12 + (work.forward - work.linear) / 800e12) * 1e3
    got = [
        c.parameters / 1e9,
        work.forward / 1e12,
        work.linear / 1e12,
        work.attention / 1e12,
        2 * c.parameters / 1e9,
    ]
    assert got == [pytest.approx(x, rel=0.02) for x in numbers[:5]]
    # Times have two digits in the table: half a unit of the last comes on top.
    assert ms_bf16 == pytest.approx(numbers[5], rel=0.02, abs=0.05)
    assert ms_fp8 == pytest.approx(numbers[6], rel=0.02, abs=0.05)
    assert work.backward(0.0) / 1e12 == pytest.approx(numbers[7], rel=0.02)
    assert work.backward(1.0) / 1e12 == pytest.approx(numbers[8], rel=0.02)


@pytest.mark.slow
def test_decoders_text_and_reward_of_the_notes() -> None:
    for size, tflop in ((512, 2.51), (720, 5.04), (1024, 10.47)):
        for model in ("sd3.5-medium", "flux.1-dev"):
            assert counts(model, size, size).decode / 1e12 == pytest.approx(tflop, rel=0.02)
    clip = 77 * 2 * (85e6 + 680e6) / 1e12  # CLIP-L and CLIP-G by their published sizes without embeddings
    assert counts("sd3.5-medium").text / 1e12 - clip == pytest.approx(1.19, rel=0.02)
    assert counts("flux.1-dev").text / 1e12 == pytest.approx(4.84, rel=0.02)
    assert counts("flux.1-dev").text_parameters / 1e9 == pytest.approx(4.76 + 0.123, rel=0.02)
    assert vit_h_14() / 1e12 == pytest.approx(0.33, rel=0.02)


def test_the_other_published_networks_have_their_published_sizes() -> None:
    for model, billions in (
        ("flux.2-klein-4b", 3.9),
        ("z-image", 6.15),
        ("sana-1.6b", 1.6),
        ("wan2.1-14b", 14.3),
    ):
        assert counts(model).parameters / 1e9 == pytest.approx(billions, rel=0.01), model
    assert (
        counts("sana-1.6b").forward.products > 0
    )  # linear attention: no softmax, still activations by activations


def tiny_sd3(device: str = "meta", **changes):
    config = {
        "sample_size": 8,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "caption_projection_dim": 64,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 40,
        "in_channels": 4,
        "out_channels": 4,
        "pos_embed_max_size": 16,
        **changes,
    }
    with torch.device(device):
        return diffusers.SD3Transformer2DModel(**config)


def tiny_call(module, device: str = "meta"):
    inputs = {
        "hidden_states": torch.zeros(1, 4, 16, 16, device=device),
        "encoder_hidden_states": torch.zeros(1, 10, 48, device=device),
        "pooled_projections": torch.zeros(1, 40, device=device),
        "timestep": torch.zeros(1, device=device),
    }
    return lambda: module(**inputs, return_dict=False)[0]


def test_a_forward_is_the_formula_by_hand() -> None:
    d, layers, image, text = 64, 3, 64, 10
    block = 2 * (image + text) * (3 + 1 + 8) * d**2 + 2 * 2 * 6 * d * d  # qkv, out, MLP; both modulations
    last = 2 * image * 12 * d**2 + 2 * text * 3 * d**2 + 2 * (6 + 2) * d * d  # the text ends in the attention
    ends = 2 * image * 4 * 4 * d + 2 * text * 48 * d + 2 * (256 * d + d * d) + 2 * (40 * d + d * d)
    head = 2 * 2 * d * d + 2 * image * d * 16
    work = count_work(tiny_call(tiny_sd3()))
    assert work.linear == (layers - 1) * block + last + ends + head
    assert work.attention == layers * 4 * (image + text) ** 2 * d
    assert work.products == 0
    assert work.backward(0) == work.linear + 2.5 * work.attention
    assert work.backward(1) == 2 * work.linear + 2.5 * work.attention


def test_the_meta_device_counts_what_the_cpu_runs() -> None:
    layers = adapted_layers(module := tiny_sd3("cpu"), ("to_q", "to_out.0"))
    assert {name.split(".", 2)[2] for name in layers} == {"attn.to_q", "attn.to_out.0"}
    expected = count_work(tiny_call(meta := tiny_sd3()), adapted_layers(meta, ("to_q", "to_out.0")))
    assert count_work(tiny_call(module, "cpu"), layers) == expected
    assert expected.adapted == 3 * 2 * 2 * 64 * 64 * 64


def saved_bytes(module: nn.Module, call) -> float:
    """What autograd really keeps, distinct storages, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}], ids=str)
def test_activations_are_those_autograd_keeps(changes) -> None:
    meta, real = tiny_sd3(**changes), tiny_sd3("cpu", **changes)
    planned = count_activations(meta, tiny_call(meta), list(meta.transformer_blocks))
    assert planned.all == pytest.approx(saved_bytes(real, tiny_call(real, "cpu")), rel=0.03)
    real.enable_gradient_checkpointing()
    real.train()
    assert planned.full == pytest.approx(saved_bytes(real, tiny_call(real, "cpu")), rel=0.06)
    assert planned.full < planned.selective < planned.all
    assert planned.block < planned.all / 2


def test_activations_beside_adapters_are_those_of_peft() -> None:
    targets = ("attn.to_q", "attn.to_out.0")
    meta, real = tiny_sd3(), tiny_sd3("cpu")
    meta.requires_grad_(False)
    real.requires_grad_(False)
    real.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))
    with adapters(adapted_layers(meta, targets), 4):
        planned = count_activations(meta, tiny_call(meta), list(meta.transformer_blocks))
    assert planned.all == pytest.approx(saved_bytes(real, tiny_call(real, "cpu")), rel=0.03)


def test_adapters_keep_less_than_full_fine_tuning_and_cost_their_parameters() -> None:
    lora, full = counts("sd3.5-medium"), counts("sd3.5-medium", train=FullFineTuning())
    assert lora.activations.all < 0.8 * full.activations.all
    # 24 blocks of joint attention, 1536 wide; the last block's text has no output.
    assert lora.trained == 32 * 2 * 1536 * (24 * 8 - 1)
    assert full.trained == full.parameters
    assert counts("sd3.5-medium", train=LoRA(rank=8)).trained == lora.trained / 4


def test_a_folder_is_read_like_a_published_name(tmp_path) -> None:
    entry = PUBLISHED["sd3-medium"]
    parts = {
        "transformer": entry["transformer"],
        "vae": entry["vae"],
        "text_encoder": entry["text_encoders"][0],
    }
    index: dict[str, object] = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "X"],
        "feature": [None, None],
    }
    for name, (kind, config) in parts.items():
        index[name] = ["diffusers", kind]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    network = Network(height=256, width=256)
    ours, published = count(architecture(str(tmp_path)), network), count(architecture("sd3-medium"), network)
    differing = {k for k, v in asdict(ours).items() if v != asdict(published)[k]}
    assert differing == {"name", "text", "text_parameters"}  # one encoder of three was written
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*vae/config.json"):
        architecture(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "UNetPipeline"}))
    with pytest.raises(ValueError, match="holds a UNetPipeline; the planner knows StableDiffusion3Pipeline"):
        architecture(str(tmp_path))


def test_a_configuration_that_nothing_can_be_built_from_is_one_line() -> None:
    pipeline = architecture("sd3-medium")
    kind, config = pipeline.networks["transformer"]
    for changes in ({"num_layers": "many"}, {"qk_norm": "unheard of"}, {"dual_attention_layers": None}):
        broken = replace(
            pipeline, networks={**pipeline.networks, "transformer": (kind, {**config, **changes})}
        )
        with pytest.raises(ValueError, match=r".") as caught:
            count(broken, Network(height=64, width=64))
        assert "\n" not in str(caught.value)
    broken = replace(pipeline, text_encoders=(("NoSuchModel", {}),))
    with pytest.raises(ValueError, match=r"sd3-medium cannot be counted: AttributeError: .*NoSuchModel"):
        count(broken, Network(height=64, width=64))


def test_an_autoencoder_that_shrinks_less_leaves_more_tokens() -> None:
    shallow = dict(PUBLISHED["sd3-medium"]["vae"][1], block_out_channels=[128, 256, 512])
    for key in ("down_block_types", "up_block_types"):
        shallow[key] = shallow[key][:3]
    medium = architecture("sd3-medium")
    pipeline = replace(medium, networks={**medium.networks, "vae": ("AutoencoderKL", shallow)})
    assert pipeline.on_meta(Network(height=248, width=248)).image_seq_len == 31 * 31
    ours, usual = count(pipeline, Network(height=256, width=256)), counts("sd3-medium")
    assert ours.forward == usual.forward  # 256 pixels at a stride of 4 are 512 at 8
    assert ours.latent_elements == usual.latent_elements


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: architecture("sd3.5-medum"), "did you mean 'sd3.5-medium'"),
        (lambda: architecture("/nowhere"), "unknown model '/nowhere'"),
        (
            lambda: counts("sd3.5-medium", 500),
            "Network.height is 500; sd3 needs a multiple of 16, such as 496",
        ),
        (lambda: counts("sana-1.6b", 512, 528), "Network.width is 528; .* multiple of 32"),
        (lambda: counts("wan2.1-1.3b", num_frames=32), "num_frames is 32; .* a multiple of 4 plus 1"),
        (lambda: counts("flux.1-dev", num_frames=5), "num_frames is 5; flux makes images: set 1"),
        (
            lambda: counts("sd3-medium", train=LoRA(targets=("query",))),
            "match no linear layer of SD3Transformer2D",
        ),
        (lambda: named_gpu("h10"), "unknown GPU 'h10'; did you mean 'h100'"),
    ],
)
def test_a_mistake_is_one_line(call, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_names_on_the_hub_and_of_devices() -> None:
    assert architecture("stabilityai/stable-diffusion-3.5-medium") == architecture("sd3.5-medium")
    assert recognised_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert recognised_gpu("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert recognised_gpu("NVIDIA GeForce RTX 4090") is named_gpu("RTX 4090") is GPUS["4090"]
    assert recognised_gpu("NVIDIA L4") is None


def test_the_rates_behind_a_floor() -> None:
    assert GPUS["h100"].rate() == pytest.approx(800e12)
    assert GPUS["h100"].rate("fp8") == pytest.approx(1400e12)
    assert GPUS["h100"].rate("fp4") == GPUS["h100"].rate("fp8")  # no FP4 there: nothing is gained over FP8
    assert GPUS["a100"].rate("fp8") == GPUS["a100"].rate()
    assert GPUS["b200"].rate("fp4") > GPUS["b200"].rate("fp8") > GPUS["b200"].rate()

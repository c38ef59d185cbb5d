"""From a published name or a pipeline's folder to counts: one forward's work, and what memory holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from flowgrpo_fast.names import nearest
from flowgrpo_fast.planner.counting import (
    Activations,
    Work,
    adapted_layers,
    adapters,
    count_activations,
    count_work,
)
from flowgrpo_fast.planner.published import PUBLISHED, Part
from flowgrpo_fast.planner.shapes import CALLS, FP32_VAES, Size, vae_latents, vae_stride
from flowgrpo_fast.recipe import LoRA, Network

# What is adapted where a recipe names nothing: the projections of attention, in some families the MLPs too.
_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
_PLAIN = ("to_q", "to_k", "to_v", "to_out.0")
_TARGETS = {
    "SD3Transformer2DModel": _ATTENTION,
    "FluxTransformer2DModel": (
        *_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    "QwenImageTransformer2DModel": (
        *_ATTENTION,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    "Flux2Transformer2DModel": (*_ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out"),
    "HunyuanVideoTransformer3DModel": _ATTENTION,
}
_CLIP_TOKENS = 77
_SD3 = "SD3Transformer2DModel"


@dataclass(frozen=True, slots=True)
class Architecture:
    """The networks of a pipeline, as their configurations say."""

    name: str
    transformer: Part
    vae: Part | None
    text_encoders: tuple[Part, ...]
    tokens: int  # text tokens at the usual prompt length
    experts: tuple[Part, ...] = ()  # further transformers, of which a forward runs one
    sources: int = 0  # images a prompt comes with
    token_times: bool = False  # each token is told its timestep

    def size(self, network: Network) -> Size:
        """One row of this pipeline at a network's size.

        Raises:
            ValueError: a size the patches of this family do not divide.
        """
        calling = CALLS[self.transformer[0]]
        stride = vae_stride(*self.vae) if self.vae else 8
        multiple = stride * calling.patch
        for name in ("height", "width"):
            value = getattr(network, name)
            if value % multiple:
                raise ValueError(
                    f"Network.{name} is {value}; {self.name} needs a multiple of {multiple}, "
                    f"such as {max(multiple, value // multiple * multiple)}"
                )
        if (network.num_frames - 1) % calling.frame_stride or (
            calling.frame_stride == 1 and network.num_frames > 1
        ):
            wanted = f"1 more than a multiple of {calling.frame_stride}" if calling.frame_stride > 1 else "1"
            raise ValueError(f"Network.num_frames is {network.num_frames}; {self.name} needs {wanted}")
        tokens = network.max_sequence_length or self.tokens
        if network.max_sequence_length and self.transformer[0] == _SD3:
            tokens += _CLIP_TOKENS
        return Size(
            network.height,
            network.width,
            network.num_frames,
            tokens,
            stride,
            self.sources,
            self.token_times,
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """What one row costs. FLOPs of a forward, and of the parts around it; numbers of parameters; bytes."""

    name: str
    size: str
    forward: Work
    trained_share: float  # of the weights behind `forward.linear`; 0: adapters
    decode: float  # FLOPs of one sample
    text: float  # FLOPs of one prompt
    reward: float  # FLOPs of one image under one ViT-H/14 tower
    parameters: int  # of the transformers, without adapters
    linear_parameters: int  # of them in linear layers, which low precision shrinks
    trained: int  # parameters the optimiser moves
    latent_elements: int
    prompt_elements: int = 0  # what the transformer reads of a prompt: embeddings, source images
    pixels: int = 0  # of a sample, all frames
    activations: Activations | None = None
    vae_parameters: int = 0
    vae_in_fp32: bool = False  # whatever the run's precision is
    text_parameters: int = 0
    decode_bytes: float = 0.0  # at most at once, one sample in fp32
    sequence: int | None = None  # image tokens, which a dynamic shift asks for


def architecture(model: str) -> Architecture:
    """The architecture of a published name, of a name on the hub that the table knows, or of a pipeline's folder.

    Raises:
        ValueError: none of them; names the nearest.
    """
    if (Path(model) / "model_index.json").is_file():
        return _from_folder(Path(model))
    by_name = {name.lower(): key for key, entry in PUBLISHED.items() for name in (key, *entry["names"])}
    key = by_name.get(model.lower())
    if key is None:
        raise ValueError(
            f"unknown model {model!r}, and no folder with a model_index.json; "
            f"{nearest(model.lower().rpartition('/')[2], PUBLISHED)}"
        )
    entry = PUBLISHED[key]
    fields = ("transformer", "vae", "text_encoders", "tokens", "experts", "sources", "token_times")
    return Architecture(name=key, **{name: entry[name] for name in fields if name in entry})


def _from_folder(folder: Path) -> Architecture:
    index = _read_json(folder / "model_index.json")
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[1]}
    transformer = parts.get("transformer")
    if transformer not in CALLS:
        raise ValueError(
            f"{str(folder)!r} holds a {transformer or 'pipeline without a transformer'}; "
            f"the planner knows {', '.join(CALLS)}"
        )

    def part(name: str) -> Part:
        return parts[name], _read_json(folder / name / "config.json")

    encoders = tuple(part(name) for name in sorted(parts) if name.startswith("text_encoder"))
    tokens = next(e["tokens"] for e in PUBLISHED.values() if e["transformer"][0] == transformer)
    return Architecture(
        name=str(folder),
        transformer=part("transformer"),
        vae=part("vae") if "vae" in parts else None,
        text_encoders=encoders,
        tokens=tokens,
        experts=(part("transformer_2"),) if "transformer_2" in parts else (),
        sources=1 if index.get("_class_name") == "FluxKontextPipeline" else 0,
        token_times=bool(index.get("expand_timesteps")),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is not a configuration")
    return content


# ------------------------------------------------------------------------------------------- counting


def count(pipeline: Architecture, network: Network) -> Counts:
    """Everything a plan needs of this pipeline at this size, trained this way; counted once per process.

    Raises:
        ValueError: a size the family does not run at, LoRA targets that match no layer, or a configuration that
            diffusers or transformers cannot build from.
    """
    try:
        return _counted(pipeline, network)
    except ValueError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{pipeline.name} cannot be counted: {reason}") from error


def _counted(pipeline: Architecture, network: Network) -> Counts:
    size = pipeline.size(network)
    parts = [pipeline.transformer, pipeline.experts, pipeline.vae, pipeline.text_encoders]
    key = json.dumps(parts, sort_keys=True)
    rank = 0
    targets: tuple[str, ...] = ()
    if isinstance(network.train, LoRA):
        rank, targets = (
            network.train.rank,
            network.train.targets or _TARGETS.get(pipeline.transformer[0], _PLAIN),
        )
    return replace(_count(key, size, rank, targets), name=pipeline.name)


@lru_cache(maxsize=64)
def _count(key: str, size: Size, rank: int, targets: tuple[str, ...]) -> Counts:
    first, others, vae, encoders = json.loads(key)
    experts = [_on_meta(getattr(diffusers, name).from_config, part) for name, part in (first, *others)]
    transformer, (kind, _) = experts[0], first
    inputs = CALLS[kind].inputs(transformer.config, size)
    adapted = [adapted_layers(part, targets) if rank else {} for part in experts]
    if rank and not all(adapted):
        raise ValueError(f"LoRA.targets {targets} match no linear layer of {kind}")
    layers = adapted[0]

    def call() -> Any:
        return transformer(**inputs)

    transformer.requires_grad_(not rank)
    work = count_work(call, layers)
    blocks = [b for child in transformer.children() if isinstance(child, nn.ModuleList) for b in child]
    with adapters(layers, rank):
        activations = count_activations(transformer, call, blocks)
    modules = nn.ModuleList(experts)
    parameters = sum(p.numel() for p in modules.parameters())
    in_linear = sum(layer.weight.numel() for layer in modules.modules() if isinstance(layer, nn.Linear))
    adapter = sum(rank * (x.in_features + x.out_features) for part in adapted for x in part.values())
    latents = _latent_elements(inputs) // (1 + size.sources)
    counts = Counts(
        name="",
        size=str(size),
        forward=work,
        trained_share=0.0 if rank else 1.0,
        decode=0.0,
        text=0.0,
        reward=vit_h_14(),
        parameters=parameters,
        linear_parameters=in_linear,
        trained=adapter or parameters,
        latent_elements=latents,
        prompt_elements=_prompt_elements(inputs) + size.sources * latents,
        pixels=size.height * size.width * size.num_frames,
        activations=activations,
        sequence=CALLS[kind].tokens(size),
    )
    return _with_text(_with_vae(counts, vae, size), encoders, kind, size)


def _latent_elements(inputs: Mapping[str, Any]) -> int:
    latents = inputs["x"][0] if "x" in inputs else inputs["hidden_states"]
    return math.prod(latents.shape)


def _prompt_elements(inputs: Mapping[str, Any]) -> int:
    embeddings = inputs["cap_feats"][0] if "cap_feats" in inputs else inputs["encoder_hidden_states"]
    pooled = inputs.get("pooled_projections")
    return math.prod(embeddings.shape) + (0 if pooled is None else math.prod(pooled.shape))


def _on_meta(make: Callable[..., nn.Module], config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        module = make(config)
    return nn.Module.to(module, dtype)


def _with_vae(counts: Counts, vae: Part | None, size: Size) -> Counts:
    if vae is None:
        return counts
    module = _on_meta(getattr(diffusers, vae[0]).from_config, vae[1], torch.float32)
    largest = [0]

    def look(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            largest[0] = max(largest[0], output.numel())

    for layer in module.modules():
        layer.register_forward_hook(look)
    latents = vae_latents(vae[0], module.config, size)
    work = count_work(lambda: module.decode(latents))
    return replace(
        counts,
        decode=work.forward,
        vae_parameters=sum(p.numel() for p in module.parameters()),
        vae_in_fp32=vae[0] in FP32_VAES,
        decode_bytes=3 * 4.0 * largest[0],  # a layer's input, output and residual
    )


def _with_text(counts: Counts, encoders: list[Part], kind: str, size: Size) -> Counts:
    flops, parameters = 0.0, 0
    for name, config in encoders:
        part_flops, part_parameters = _text_encoder(name, json.dumps(config), kind, size.tokens)
        flops, parameters = flops + part_flops, parameters + part_parameters
    return replace(counts, text=flops, text_parameters=parameters)


@lru_cache(maxsize=64)
def _text_encoder(name: str, config: str, kind: str, tokens: int) -> tuple[float, int]:
    """FLOPs of one prompt, by the number of weights and tokens; parameters."""
    model_class = getattr(transformers, name)
    module = _on_meta(model_class, model_class.config_class.from_dict(json.loads(config)))
    if "CLIP" in name:
        tokens = _CLIP_TOKENS
    elif kind == _SD3:
        tokens -= _CLIP_TOKENS
    linears = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "visual" not in path and "lm_head" not in path
    }
    queries = sum(layer.out_features for path, layer in linears.items() if path.endswith((".q", ".q_proj")))
    weights = sum(layer.weight.numel() for layer in linears.values())
    return transformer_flops(weights, queries, tokens), sum(p.numel() for p in module.parameters())


def transformer_flops(weights: float, query_width: float, tokens: int) -> float:
    """One forward of a plain transformer: its linear weights, the queries' width over all layers, its tokens."""
    return 2.0 * weights * tokens + 4.0 * tokens**2 * query_width


def vit_h_14() -> float:
    """One image under a ViT-H/14 tower, which CLIP scores and PickScore have: 32 layers of 1280 on 257 tokens."""
    layers, width, tokens = 32, 1280, 257
    return transformer_flops(layers * 12 * width**2, layers * width, tokens)

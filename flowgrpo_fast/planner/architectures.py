"""From a published name or a pipeline's folder to counts: one forward's work, and what memory holds.

The family that trains a pipeline is built over it on the meta device and asked as in a run: how the transformer is
called, what latents look like, which sizes divide and which layers are adapted is said in one place, `models`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from flowgrpo_fast.models.network import ModelSetup, Network
from flowgrpo_fast.models.pipeline import PipelineModel
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
from flowgrpo_fast.precision import QuantizedLinear
from flowgrpo_fast.types import Conditioning, FlowModel, PromptRows

_META = torch.device("meta")
_CLIP_TOKENS = 77
_SD3 = (
    "StableDiffusion3Pipeline"  # whose tokens are those of a CLIP, and of a T5 whose number a recipe may set
)
# In the configurations of transformers: how wide an embedding of the text is.
_TEXT_WIDTHS = ("joint_attention_dim", "text_dim", "caption_channels", "cap_feat_dim", "text_embed_dim")


def families() -> dict[str, type[PipelineModel]]:
    """The families that can be planned, by the class of their pipeline."""
    # Each takes its part of diffusers with it, which a run of one family has no use for.
    from flowgrpo_fast.models.flux import Flux
    from flowgrpo_fast.models.flux2_klein import Flux2Klein
    from flowgrpo_fast.models.flux_kontext import FluxKontext
    from flowgrpo_fast.models.qwen_image import QwenImage
    from flowgrpo_fast.models.sana import Sana
    from flowgrpo_fast.models.sd3 import SD3
    from flowgrpo_fast.models.wan import Wan
    from flowgrpo_fast.models.z_image import ZImage
    from flowgrpo_fast.planner.hunyuan_video import HunyuanVideo

    known = (SD3, Flux, FluxKontext, Flux2Klein, QwenImage, ZImage, Sana, Wan, HunyuanVideo)
    return {family.pipeline_class.__name__: family for family in known}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A pipeline's networks, as their configurations say."""

    name: str
    pipeline: str  # its class in diffusers
    networks: Mapping[str, Part]  # its transformers and the autoencoder, by the names of their folders
    text_encoders: tuple[Part, ...]
    tokens: int  # text tokens at the usual prompt length
    options: Mapping[str, Any] = field(default_factory=dict)  # what else the pipeline is made with

    def on_meta(self, network: Network) -> PipelineModel:
        """The model of this pipeline at a network's size, without weights or text encoders.

        Raises:
            ValueError: a size that this family does not run at.
        """
        family = families()[self.pipeline]
        parts = {
            name: _on_meta(
                getattr(diffusers, kind).from_config,
                config,
                torch.float32 if name == "vae" else torch.bfloat16,
            )
            for name, (kind, config) in self.networks.items()
        }
        pipe = family.pipeline_class(
            scheduler=None, **dict.fromkeys(family.text_parts), **parts, **self.options
        )
        sized = replace(network, max_sequence_length=self.num_tokens(network))
        model = family(Path(), pipe, ModelSetup(network=sized, precision="bf16", seed=0))
        model.device = _META
        model.lay_out(sized)
        return model

    def num_tokens(self, network: Network) -> int:
        """Text tokens of a prompt."""
        own = network.max_sequence_length
        return own + _CLIP_TOKENS if own and self.pipeline == _SD3 else own or self.tokens

    def tokens_read_by(self, text_encoder: str, network: Network) -> int:
        """Of a prompt, by an encoder of that class: SD3's T5 reads what its CLIPs do not."""
        if "CLIP" in text_encoder:
            return _CLIP_TOKENS
        return self.num_tokens(network) - _CLIP_TOKENS * (self.pipeline == _SD3)


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
    experts: int = 1  # transformers, of which one serves a step


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
    names = [name for name in ("transformer", "transformer_2", "vae") if name in entry]
    return Architecture(
        name=key,
        pipeline=entry["pipeline"],
        networks={name: entry[name] for name in names},
        text_encoders=entry["text_encoders"],
        tokens=entry["tokens"],
        options=entry.get("options", {}),
    )


def _from_folder(folder: Path) -> Architecture:
    index = _read_json(folder / "model_index.json")
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[1]}
    pipeline, known = index.get("_class_name"), families()
    if pipeline not in known:
        raise ValueError(f"{str(folder)!r} holds a {pipeline}; the planner knows {', '.join(known)}")
    family = known[pipeline]
    missing = [name for name in ("transformer", "vae") if name not in parts]
    if missing:
        raise ValueError(f"{str(folder)!r} holds a {pipeline} without {' and '.join(missing)}")

    def read(name: str) -> Part:
        return parts[name], _read_json(folder / name / "config.json")

    usual = (entry["tokens"] for entry in PUBLISHED.values() if entry["pipeline"] == pipeline)
    return Architecture(
        name=str(folder),
        pipeline=pipeline,
        networks={name: read(name) for name in (*family.transformer_parts, "vae") if name in parts},
        text_encoders=tuple(read(name) for name in sorted(parts) if name.startswith("text_encoder")),
        tokens=next(usual),
        options={
            name: value
            for name, value in index.items()
            if not name.startswith("_") and not isinstance(value, list)
        },
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
    # How the network is run changes nothing of what is counted here.
    same = replace(network, path="", checkpointing="none", attention="", compile=False, text_cache="")
    content = {name: getattr(pipeline, name) for name in Architecture.__dataclass_fields__ if name != "name"}
    try:
        return replace(_count(json.dumps(content, sort_keys=True), same), name=pipeline.name)
    except ValueError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{pipeline.name} cannot be counted: {reason}") from error


@lru_cache(maxsize=64)
def _count(content: str, network: Network) -> Counts:
    pipeline = Architecture(name="", **json.loads(content))
    model, rank = pipeline.on_meta(network), network.train.adapter_rank
    targets = network.train.adapted(model.lora_targets)
    adapted = [adapted_layers(part, targets) if rank else {} for part in model.transformers.values()]
    if rank and not all(adapted):
        kind = type(next(iter(model.transformers.values()))).__name__
        raise ValueError(f"LoRA.targets {targets} match no linear layer of {kind}")
    model.module.requires_grad_(not rank)
    row = _one_prompt(model, pipeline.num_tokens(network))
    largest = [0]

    def look(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            largest[0] = max(largest[0], output.numel())

    for layer in model.pipe.vae.modules():
        layer.register_forward_hook(look)
    counts = count_model(model, row, _META, model.image_seq_len, torch.bfloat16, adapted[0])
    expert = model.expert(torch.ones(()))
    latents = torch.empty(1, *model.latent_shape, device=_META, dtype=torch.bfloat16)
    sigma = torch.ones(1, device=_META)
    with adapters(adapted[0], rank):
        transformer = next(iter(model.transformers.values()))
        blocks = [block for block in transformer.modules() if type(block).__name__ in model.blocks]
        activations = count_activations(transformer, lambda: expert.velocity(latents, sigma, row), blocks)
    frames = f"x{network.num_frames}" if network.num_frames > 1 else ""
    held = (row.prompt_embeds, row.pooled_prompt_embeds, *row.extra.values())
    text_flops, text_parameters = 0.0, 0
    for kind, config in pipeline.text_encoders:
        weights, queries, size = _text_encoder(kind, json.dumps(config))
        text_flops += transformer_flops(weights, queries, pipeline.tokens_read_by(kind, network))
        text_parameters += size
    adapter = sum(rank * (x.in_features + x.out_features) for part in adapted for x in part.values())
    return replace(
        counts,
        size=f"{network.height}x{network.width}{frames}",
        text=text_flops,
        reward=vit_h_14(),
        trained=adapter or counts.parameters,
        prompt_elements=sum(value.numel() for value in held if value is not None),
        pixels=network.height * network.width * network.num_frames,
        activations=activations,
        vae_parameters=sum(p.numel() for p in model.pipe.vae.parameters()),
        vae_in_fp32=model.vae_in_fp32,
        text_parameters=text_parameters,
        decode_bytes=3 * 4.0 * largest[0],  # a layer's input, output and residual
        experts=len(model.transformers),
    )


def count_model(
    model: FlowModel,
    conditioning: PromptRows,
    device: torch.device,
    sequence: int | None = None,
    dtype: torch.dtype = torch.float32,
    adapted: Mapping[str, nn.Linear] | None = None,
) -> Counts:
    """Counts one velocity call and one decode of a model, on one row; rewards count as nothing."""
    latents = torch.zeros(1, *model.latent_shape, device=device, dtype=dtype)
    sigma = torch.ones(1, device=device)
    row = conditioning.rows(torch.zeros(1, dtype=torch.int64, device=device))
    with torch.compiler.set_stance("force_eager"):
        forward = count_work(lambda: model.expert(torch.ones(())).velocity(latents, sigma, row), adapted)
        decode = count_work(lambda: model.decode(latents))
    layers = list(model.module.modules())
    linear = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    others = [layer.weight for layer in layers if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    frozen = sum(q.in_features * q.out_features for q in layers if isinstance(q, QuantizedLinear))
    multiplied = sum(weight.numel() for weight in (*linear, *others)) + frozen
    moved = sum(weight.numel() for weight in (*linear, *others) if weight.requires_grad)
    parameters = list(model.module.parameters())
    return Counts(
        name=type(model).__name__,
        size="x".join(map(str, model.latent_shape)),
        forward=forward,
        trained_share=moved / max(1, multiplied),
        decode=decode.forward,
        text=0.0,
        reward=0.0,
        parameters=sum(p.numel() for p in parameters),
        linear_parameters=sum(weight.numel() for weight in linear) + frozen,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        latent_elements=latents.numel(),
        sequence=sequence,
    )


def _one_prompt(model: PipelineModel, tokens: int) -> Conditioning:
    """What a family's `encode` makes of one prompt, as wide as its transformer takes it."""
    config = model.pipe.transformer.config

    def empty(*shape: int) -> Tensor:
        return torch.empty(1, *shape, device=_META, dtype=torch.bfloat16)

    width = next(config[name] for name in _TEXT_WIDTHS if name in config)
    pooled = config.get("pooled_projection_dim")
    extra = {"image_latents": empty(*model.latent_shape)} if model.takes_images else {}
    return Conditioning(empty(tokens, width), None if pooled is None else empty(pooled), extra=extra)


def _on_meta(make: Callable[..., nn.Module], config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        module = make(config)
    return nn.Module.to(module, dtype)


@lru_cache(maxsize=64)
def _text_encoder(kind: str, config: str) -> tuple[int, int, int]:
    """Weights of the linear layers of a text encoder, width of its queries over all layers, and all parameters."""
    model_class = getattr(transformers, kind)
    module = _on_meta(model_class, model_class.config_class.from_dict(json.loads(config)))
    linears = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "visual" not in path and "lm_head" not in path
    }
    queries = sum(layer.out_features for path, layer in linears.items() if path.endswith((".q", ".q_proj")))
    weights = sum(layer.weight.numel() for layer in linears.values())
    return weights, queries, sum(p.numel() for p in module.parameters())


def transformer_flops(weights: float, query_width: float, tokens: int) -> float:
    """One forward of a plain transformer: its linear weights, the queries' width over all layers, its tokens."""
    return 2.0 * weights * tokens + 4.0 * tokens**2 * query_width


def vit_h_14() -> float:
    """One image under a ViT-H/14 tower, which CLIP scores and PickScore have: 32 layers of 1280 on 257 tokens."""
    layers, width, tokens = 32, 1280, 257
    return transformer_flops(layers * 12 * width**2, layers * width, tokens)

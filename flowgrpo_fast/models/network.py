"""Which checkpoint a run takes, at which size, what of it is trained, and what a model's loader is told of all this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from flowgrpo_fast.checks import one_of, positive, require


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Low-rank adapters beside frozen weights, fp32 masters. arXiv 2106.09685."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()  # ends of layer names, as peft takes them; empty = the family's own
    path: str = ""  # an adapter to start from; empty = a fresh one, which changes nothing at first

    trains_every_weight = False  # no field, as nothing without an annotation is

    def __post_init__(self) -> None:
        """A rank and a scale above 0."""
        positive(self, rank=self.rank, alpha=self.alpha)

    @property
    def starts_from_base(self) -> bool:
        """Whether a run's start is the transformer with its adapters off: a fresh adapter changes nothing."""
        return not self.path

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapters; 0 = there are none."""
        return self.rank

    def adapted(self, family_targets: Sequence[str]) -> tuple[str, ...]:
        """Ends of the names of the layers that carry an adapter."""
        return self.targets or tuple(family_targets)

    def held_dtype(self, base: torch.dtype) -> torch.dtype:
        """The dtype a transformer's own weights are held in, where what is frozen has the dtype `base`."""
        return base

    def prepare(self, transformer: Any, family_targets: Sequence[str], seed: int, prefix: str) -> None:
        """Freezes a transformer and puts the adapters beside its layers; `adapters.add_lora` says how."""
        # peft takes seconds to import, and a recipe is read where no model is: by the planner, by reward processes.
        from flowgrpo_fast.models.adapters import add_lora

        add_lora(transformer, self, family_targets, seed, prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullFineTuning:
    """Every weight of the transformer, fp32 masters."""

    # As of `LoRA`; no fields.
    trains_every_weight = True
    starts_from_base = False
    adapter_rank = 0

    def adapted(self, family_targets: Sequence[str]) -> tuple[str, ...]:
        """No layer carries an adapter."""
        return ()

    def held_dtype(self, base: torch.dtype) -> torch.dtype:
        """The masters' own: updates of 1e-5 would round away in bf16."""
        return torch.float32

    def prepare(self, transformer: Any, family_targets: Sequence[str], seed: int, prefix: str) -> None:
        """Lets every weight learn."""
        transformer.requires_grad_(True)


Train: TypeAlias = LoRA | FullFineTuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The pipeline of a family, and how it runs. The digits bring their own and read none of it."""

    path: str = ""  # a diffusers pipeline: a folder, or a name on the hub
    height: int = 512  # pixels
    width: int = 512
    num_frames: int = 1
    max_sequence_length: int = 0  # text tokens; 0 = the family's own
    negative_prompt: str = ""  # of the unconditional half, where the recipe guides
    embedded_guidance: float = 3.5  # the scale that a guidance-distilled network is told; others ignore it
    train: Train = field(default_factory=LoRA)
    checkpointing: Literal["none", "selective", "full"] = "none"  # of activations, in the update
    attention: str = ""  # a backend's name in diffusers, e.g. "flash", "_native_cudnn"; empty = its default
    compile: bool = False  # the repeated block, once, for rollout and replay alike
    text_cache: str = ""  # folder of prompt embeddings; empty = none is kept on disk

    def __post_init__(self) -> None:
        """Sizes are positive; what a family's patches divide is checked where the family is known."""
        positive(self, height=self.height, width=self.width, num_frames=self.num_frames)
        positive(self, embedded_guidance=self.embedded_guidance)
        one_of(self, ("none", "selective", "full"), checkpointing=self.checkpointing)
        require(
            self.max_sequence_length >= 0,
            f"Network.max_sequence_length is {self.max_sequence_length}; it must be at least 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSetup:
    """What of a recipe a model's loader reads: `load(device, setup) -> FlowModel`."""

    network: Network
    precision: str  # "fp32" or "bf16", of matrix products
    seed: int  # of fresh adapters
    # Told how many prompts are encoded, and of how many; a loader may leave it alone.
    progress: Callable[[int, int], None] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of what is frozen."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

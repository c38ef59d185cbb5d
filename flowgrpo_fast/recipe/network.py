"""Parts of a recipe: which checkpoint, at which size, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from flowgrpo_fast.checks import one_of, positive, require


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Low-rank adapters beside frozen weights, fp32 masters. arXiv 2106.09685."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()  # ends of layer names, as peft takes them; empty = the family's own
    path: str = ""  # an adapter to start from; empty = a fresh one, which changes nothing at first

    def __post_init__(self) -> None:
        """A rank and a scale above 0."""
        positive(self, rank=self.rank, alpha=self.alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullFineTuning:
    """Every weight of the transformer, fp32 masters."""


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

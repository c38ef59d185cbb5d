"""What a GPU holds while a recipe trains, part by part, and the largest micro-batch that still fits.

Every GPU holds all weights: this engine replicates, it does not shard. Activations are those of eager mode; of compiled
blocks, which compute element-wise steps again in the backward, those of selective checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.step import Execution
from flowgrpo_fast.recipe import ClippedRatio, FullFineTuning, LowPrecision, Recipe, Scouts
from flowgrpo_fast.recipe.rollout import RolloutPrecision
from flowgrpo_fast.sampling.windows import window_steps

_CONTEXT = 1.5e9  # CUDA's own, with the libraries' workspaces
_USABLE = 0.95  # of what is left: the allocator's blocks do not pack without gaps
_FP32 = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of contents, and the setting that shrinks it."""

    name: str
    bytes: float
    remedy: str


@dataclass(frozen=True, slots=True)
class Memory:
    """At the update, where a step needs most; `rows` samples in one forward."""

    fixed: tuple[Part, ...]
    each_row: tuple[Part, ...]  # bytes of one row
    rows: int

    @property
    def parts(self) -> list[Part]:
        """All parts at `rows`, the largest first."""
        grown = [Part(part.name, part.bytes * self.rows, part.remedy) for part in self.each_row]
        return sorted((*self.fixed, *grown), key=lambda part: -part.bytes)

    @property
    def total(self) -> float:
        """Bytes at `rows`."""
        return sum(part.bytes for part in self.parts)

    def largest_rows(self, capacity: float, most: int) -> int:
        """The largest micro-batch in `capacity` bytes that divides `most`, the samples of one update; 0 if none."""
        left = usable(capacity) - sum(part.bytes for part in self.fixed)
        fits = int(left // sum(part.bytes for part in self.each_row)) if left > 0 else 0
        return max((rows for rows in range(1, min(fits, most) + 1) if most % rows == 0), default=0)

    def refusal(self, capacity: float, device: str, most: int) -> str | None:
        """One line that says what does not fit and what shrinks it; None where it fits."""
        room = usable(capacity)
        if self.total <= room:
            return None
        largest = self.parts[0]
        rows = self.largest_rows(capacity, most)
        fits = f"rows_per_forward={rows} fits" if rows else "even rows_per_forward=1 does not fit"
        return (
            f"out of memory before the start: a step needs {self.total / 1e9:.1f} GB and {device} has "
            f"{room / 1e9:.1f} GB for it; the largest part is {largest.name}, {largest.bytes / 1e9:.1f} GB: "
            f"{largest.remedy} ({fits})"
        )


def usable(capacity: float) -> float:
    """Bytes a step may take of a device's memory."""
    return (capacity - _CONTEXT) * _USABLE


def plan_memory(
    counts: Counts, recipe: Recipe, execution: Execution | None = None, num_gpus: int = 1
) -> Memory:
    """Memory of one GPU of `num_gpus`, at the recipe's rows per forward."""
    execution = execution or Execution()
    if counts.activations is None:
        raise ValueError(f"the activations of {counts.name} were not counted; memory cannot be planned")
    rows = (recipe.replay_rows or recipe.rows_per_forward) or max(1, recipe.rows_per_update // num_gpus)
    network = recipe.network
    halves = 2 if execution.uncond_gradient and recipe.guidance_scale != 1.0 else 1
    kept = counts.activations.kept(network.checkpointing) * halves
    if network.compile and network.checkpointing == "none":  # the compiler computes element-wise steps again
        kept = min(kept, counts.activations.kept("selective") * halves)
    transient = counts.activations.block  # of the block that runs: forward, and gradients on the way back
    lighter = {"none": "selective", "selective": "full"}.get(network.checkpointing)
    remedy = (
        f"set network.checkpointing={lighter}, or lower rows_per_forward"
        if lighter
        else "lower rows_per_forward"
    )
    samples = recipe.num_prompts * recipe.group_size / num_gpus
    latents = samples * (2 * _kept_steps(recipe) + 2) * counts.latent_elements * _FP32
    fixed = [
        *_weights(counts, recipe),
        Part(
            "latents kept for the update", latents, "lower num_prompts or group_size, or use a smaller window"
        ),
        Part("autoencoder", counts.vae_parameters * _FP32, "choose a smaller network.height or width"),
    ]
    each_row = (
        Part("activations", kept, remedy),
        Part("working buffers", transient, "lower rows_per_forward"),
    )
    return Memory(tuple(part for part in fixed if part.bytes), each_row, rows)


def _kept_steps(recipe: Recipe) -> int:
    """States of a sample that wait for the update; a loss without log-probs needs none but the finished sample."""
    if not isinstance(recipe.loss, ClippedRatio):
        return 0
    return len(window_steps(recipe.window, recipe.sigmas.num_inference_steps, 0, recipe.seed).stochastic)


def _weights(counts: Counts, recipe: Recipe) -> list[Part]:
    """The transformer, what is trained of it, and its copies."""
    full = isinstance(recipe.network.train, FullFineTuning)
    width = 2 if recipe.precision == "bf16" else _FP32
    lora = "set network.train=LoRA"
    smaller = "set precision=bf16" if width == _FP32 else "choose a smaller model or a GPU with more memory"
    trained = counts.trained * _FP32
    base = counts.parameters * _FP32 if full else counts.parameters * width
    shared_base = any(part.mode == "shared_base" for part in _low_precisions(recipe).values())
    if shared_base and not full:
        base -= counts.linear_parameters * width  # only its low-precision form is kept
    parts = [Part("transformer weights", base, lora if full else smaller)]
    if full and width == 2:
        parts.append(Part("bf16 weights of the forward", counts.parameters * 2, lora))
    if not full:
        parts.append(Part("adapters", trained, "lower network.train.rank"))
    less = lora if full else "lower network.train.rank"
    parts += [
        Part("gradients", trained, less),
        Part("optimiser state", 2 * trained, less),
    ]
    if recipe.optimizer.ema_decay > 0:
        parts.append(Part("moving average", trained, "set optimizer.ema_decay=0"))
    if not isinstance(recipe.loss, ClippedRatio):  # it samples from a slower policy than it trains
        parts.append(Part("policy that samples", trained, less))
    if full and getattr(recipe.loss, "kl_beta", 0.0) > 0:
        parts.append(Part("reference weights", counts.parameters * width, "set loss.kl_beta=0"))
    for setting, precision in _low_precisions(recipe).items():
        size = 0.5625 if precision.format == "nvfp4" else 1.0  # codes, and a scale for 16 of them
        linear = counts.linear_parameters
        if precision.mode == "bare_layers":
            linear = int(linear * (1 - counts.forward.adapted / max(counts.forward.linear, 1)))
        name = f"low-precision copy ({precision.format})"
        parts.append(Part(name, linear * size, f"set {setting}=TrainingPrecision"))
    return parts


def _low_precisions(recipe: Recipe) -> dict[str, LowPrecision]:
    """Distinct low precisions, by the setting that asks for them."""
    asked: dict[str, RolloutPrecision] = {"rollout_precision": recipe.rollout_precision}
    if isinstance(recipe.explore, Scouts) and recipe.explore.precision != recipe.rollout_precision:
        asked["explore.precision"] = recipe.explore.precision
    return {name: part for name, part in asked.items() if isinstance(part, LowPrecision)}

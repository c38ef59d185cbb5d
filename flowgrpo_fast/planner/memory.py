"""What a GPU holds while a recipe trains, part by part, and the largest micro-batch that still fits.

Weights are always there; the rest comes and goes with the phases of a step, of which the heaviest decides. Every GPU
holds all weights: this engine replicates, it does not shard. Activations are those of eager mode; of compiled blocks,
which compute element-wise steps again in the backward, those of selective checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.step import Execution
from flowgrpo_fast.precision import RolloutPrecision
from flowgrpo_fast.recipe import ClippedRatio, Prune, Recipe, Scouts
from flowgrpo_fast.sampling.windows import window_steps

_CONTEXT = 1.5e9  # CUDA's own, with the libraries' workspaces
_USABLE = 0.95  # of what is left: the allocator's blocks do not pack without gaps
DECODED_PIXELS = 1 << 22  # that a pipeline's autoencoder makes at once
MOST_EMBEDDINGS = 1 << 31  # bytes of a run's prompts beyond which a text cache stays on disk
_FP32 = 4
_LORA = "set network.train=LoRA"
_RANK = "lower network.train.rank"
_LARGER_GPU = "choose a smaller model or a GPU with more memory"


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of contents, and the setting that shrinks it."""

    name: str
    bytes: float
    remedy: str


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of a step holds, beside what is always there."""

    name: str
    fixed: tuple[Part, ...]
    each_row: tuple[Part, ...] = ()  # bytes of one row

    def at(self, rows: int) -> list[Part]:
        """Its parts with `rows` samples in one forward."""
        return [*self.fixed, *(Part(part.name, part.bytes * rows, part.remedy) for part in self.each_row)]


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one step, whose phases follow one another: the heaviest decides. `rows` samples in one forward."""

    fixed: tuple[Part, ...]  # at any time
    phases: tuple[Phase, ...]
    rows: int

    @property
    def heaviest(self) -> Phase:
        """The phase that needs most at `rows`."""
        return max(self.phases, key=lambda phase: _sum(phase.at(self.rows)))

    @property
    def parts(self) -> list[Part]:
        """All parts of the heaviest phase, the largest first."""
        return sorted((*self.fixed, *self.heaviest.at(self.rows)), key=lambda part: -part.bytes)

    @property
    def total(self) -> float:
        """Bytes at `rows`."""
        return _sum(self.parts)

    def largest_rows(self, capacity: float, most: int) -> int:
        """The largest micro-batch in `capacity` bytes that divides `most`, the samples of one update; 0 if none."""
        room = usable(capacity)
        divisors = (rows for rows in range(most, 0, -1) if most % rows == 0)
        return next((rows for rows in divisors if replace(self, rows=rows).total <= room), 0)

    def refusal(self, capacity: float, device: str, most: int) -> str | None:
        """One line that says what does not fit and what shrinks it; None where it fits."""
        room = usable(capacity)
        if self.total <= room:
            return None
        largest = self.parts[0]
        advice = largest.remedy
        shrinkable = next((part for part in self.parts if part.remedy != _LARGER_GPU), largest)
        if shrinkable is not largest and advice == _LARGER_GPU:
            advice += f"; then {shrinkable.name}, {shrinkable.bytes / 1e9:.1f} GB: {shrinkable.remedy}"
        rows = self.largest_rows(capacity, most)
        fits = f"rows_per_forward={rows} fits" if rows else "even rows_per_forward=1 does not fit"
        return (
            f"out of memory before the start: a step needs {self.total / 1e9:.1f} GB and {device} has "
            f"{room / 1e9:.1f} GB for it; the largest part is {largest.name}, {largest.bytes / 1e9:.1f} GB: "
            f"{advice} ({fits})"
        )


def usable(capacity: float) -> float:
    """Bytes a step may take of a device's memory."""
    return (capacity - _CONTEXT) * _USABLE


def _sum(parts: Iterable[Part]) -> float:
    return sum(part.bytes for part in parts)


def plan_memory(
    counts: Counts, recipe: Recipe, execution: Execution | None = None, num_gpus: int = 1
) -> Memory:
    """Memory of one GPU of `num_gpus`, at the recipe's rows per forward."""
    execution = execution or Execution()
    if counts.activations is None:
        raise ValueError(f"the activations of {counts.name} were not counted; memory cannot be planned")
    rows = (recipe.replay_rows or recipe.rows_per_forward) or max(1, recipe.rows_per_update // num_gpus)
    held = _Samples(counts, recipe, recipe.num_prompts / num_gpus)
    always = [
        *_weights(counts, recipe),
        Part("autoencoder", counts.vae_parameters * held.vae_width, _LARGER_GPU),
        Part(
            "prompt embeddings", held.prompts(), "set network.text_cache: those that do not fit stay on disk"
        ),
    ]
    phases = (
        _update(counts, recipe, execution, held),
        Phase("rollout", tuple(held.rollout()), (_working(counts),)),
        Phase("decoding", tuple(held.decoding())),
        Phase("evaluation", tuple(held.evaluation())),
    )
    return Memory(
        fixed=tuple(part for part in always if part.bytes),
        phases=tuple(replace(p, fixed=tuple(part for part in p.fixed if part.bytes)) for p in phases),
        rows=rows,
    )


def _working(counts: Counts) -> Part:
    """Of the block that runs: its forward, and gradients on the way back."""
    assert counts.activations is not None
    return Part("working buffers", counts.activations.block, "lower rows_per_forward")


def _update(counts: Counts, recipe: Recipe, execution: Execution, held: _Samples) -> Phase:
    assert counts.activations is not None
    network = recipe.network
    halves = 2 if execution.uncond_gradient and recipe.guidance_scale != 1.0 else 1
    kept = counts.activations.kept(network.checkpointing) * halves
    if network.compile and network.checkpointing == "none":  # the compiler computes element-wise steps again
        kept = min(kept, counts.activations.kept("selective") * halves)
    lighter = {"none": "selective", "selective": "full"}.get(network.checkpointing)
    remedy = (
        f"set network.checkpointing={lighter}, or lower rows_per_forward"
        if lighter
        else "lower rows_per_forward"
    )
    full = network.train.trains_every_weight
    return Phase(
        "update",
        (Part("gradients", counts.trained * _FP32, _LORA if full else _RANK), *held.update()),
        (Part("activations", kept, remedy), _working(counts)),
    )


@dataclass(frozen=True, slots=True)
class _Samples:
    """Latents, embeddings and images of a step, on a GPU with `num_prompts` of its prompts."""

    counts: Counts
    recipe: Recipe
    num_prompts: float

    @property
    def vae_width(self) -> int:
        """Bytes of a number of the autoencoder."""
        return _FP32 if self.counts.vae_in_fp32 else self.width

    @property
    def width(self) -> int:
        """Bytes of a number of the run's precision."""
        return 2 if self.recipe.precision == "bf16" else _FP32

    @property
    def _chunk(self) -> float:
        """Prompts that are rolled out together."""
        return min(self.num_prompts, self.recipe.prompts_per_chunk or self.num_prompts)

    @property
    def _most(self) -> int:
        """Samples of a prompt that exist together in a rollout: at most those before and after a cut."""
        recipe = self.recipe
        if not isinstance(recipe.prune, Prune):
            return recipe.group_size
        return max(before + after for before, after in pairwise((*recipe.prune.sizes, recipe.group_size)))

    @property
    def _scouts(self) -> int:
        """Scouts of a prompt."""
        explore = self.recipe.explore
        return explore.num_scouts if isinstance(explore, Scouts) else 0

    @property
    def _kept(self) -> float:
        """Latents in fp32 that a sample keeps of its walk: before and after stochastic steps, and what guides them."""
        recipe = self.recipe
        guides = recipe.guidance_scale != 1.0 and recipe.reuse_unconditional
        return (2 + guides * self.width / _FP32) * _kept_steps(recipe)

    def _latents(self, samples: float, stored: float) -> float:
        return samples * stored * self.counts.latent_elements * _FP32

    def _embeddings(self, rows: float) -> float:
        return rows * self.counts.prompt_elements * self.width

    def prompts(self) -> float:
        """All prompts of the run, while they are in memory."""
        held = self._embeddings(num_prompts(self.recipe))
        return 0.0 if self.recipe.network.text_cache and held > MOST_EMBEDDINGS else held

    def update(self) -> list[Part]:
        """What waits for the update, and the prompt of each sample."""
        samples = self.num_prompts * self.recipe.group_size
        fewer = "lower num_prompts or group_size"
        latents = self._latents(samples, self._kept + 2)
        return [
            Part("latents kept for the update", latents, f"{fewer}, or use a smaller window"),
            Part("embeddings of the samples", self._embeddings(samples), fewer),
        ]

    def rollout(self) -> list[Part]:
        """The candidates of a chunk at a cut; or the finished samples of all twice, when chunks are joined."""
        stored = self._kept + 1
        joined = 2 * self._latents(self.num_prompts * self.recipe.group_size, stored)
        scouts = self._latents(self._scouts * (self._chunk + self.num_prompts), 1)  # no transitions
        latents, embeddings = self._candidates(self._most)
        least = max(scouts, joined if self._chunk < self.num_prompts else 0.0)
        return [replace(latents, bytes=max(latents.bytes, least)), embeddings]

    def _candidates(self, of_prompt: int) -> list[Part]:
        """So many of each prompt of a chunk, beside the finished samples of other chunks."""
        stored = self._kept + 1
        others = self._latents((self.num_prompts - self._chunk) * self.recipe.group_size, stored)
        latents = self._latents(self._chunk * of_prompt, stored + 1) + others
        embeddings = self._embeddings(self._chunk * max(of_prompt, self._scouts))
        fewer = "lower num_prompts, prune.sizes or explore.num_scouts, or set prompts_per_chunk"
        return [
            Part("latents of the candidates", latents, fewer),
            Part("embeddings of the candidates", embeddings, fewer),
        ]

    def decoding(self) -> list[Part]:
        """The images of a chunk, or of all where rewards run elsewhere; candidates wait while previews are judged."""
        recipe, group = self.recipe, max(self.recipe.group_size, self._scouts)
        waiting = [self.update()[0]]
        if isinstance(recipe.prune, Prune) and recipe.prune.score == "reward":
            waiting = self._candidates(recipe.num_candidates)
            group = max(group, recipe.num_candidates)
        elsewhere = any(term.where != "here" for term in recipe.task.rewards)
        samples = (self.num_prompts if elsewhere else self._chunk) * group
        fewer = "lower num_prompts or group_size" if elsewhere else "set prompts_per_chunk, or lower it"
        return [*waiting, *self._images(samples, fewer)]

    def evaluation(self) -> list[Part]:
        """Its samples go all at once."""
        samples, fewer = self.recipe.task.num_eval_samples, "lower task.num_eval_samples"
        return [
            Part("latents of the evaluation", self._latents(samples, 2), fewer),
            Part("embeddings of the evaluation", self._embeddings(samples), fewer),
            *self._images(samples, fewer),
        ]

    def _images(self, samples: float, fewer: str) -> list[Part]:
        """As the autoencoder gives them, in fp32, and joined; and what it needs for those it makes at once."""
        counts = self.counts
        at_once = max(1, DECODED_PIXELS // max(1, counts.pixels))
        working = min(samples, at_once) * counts.decode_bytes * self.vae_width / _FP32
        smaller = "choose a smaller network.height, width or num_frames"
        remedy = smaller if at_once == 1 else fewer if samples <= at_once else _LARGER_GPU
        images = samples * 3 * counts.pixels * (self.vae_width + 2 * _FP32)
        return [Part("decoding", working, remedy), Part("decoded images", images, fewer)]


def num_prompts(recipe: Recipe) -> int:
    """Prompts of the run's file; those of one step where it cannot be read."""
    try:
        lines = Path(recipe.task.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return recipe.num_prompts
    return sum(1 for line in lines if line.strip())


def _kept_steps(recipe: Recipe) -> int:
    """States of a sample that wait for the update; a loss without log-probs needs none but the finished sample."""
    if not isinstance(recipe.loss, ClippedRatio):
        return 0
    return len(window_steps(recipe.window, recipe.sigmas.num_inference_steps, 0, recipe.seed).stochastic)


def _weights(counts: Counts, recipe: Recipe) -> list[Part]:
    """The transformer, what is trained of it, and its copies."""
    full = recipe.network.train.trains_every_weight
    width = 2 if recipe.precision == "bf16" else _FP32
    smaller = "set precision=bf16" if width == _FP32 else _LARGER_GPU
    trained = counts.trained * _FP32
    base = counts.parameters * _FP32 if full else counts.parameters * width
    shared_base = any(precision.shares_base for precision in _precisions(recipe).values())
    if shared_base and not full:
        base -= counts.linear_parameters * width  # only its low-precision form is kept
    parts = [Part("transformer weights", base, _LORA if full else smaller)]
    if full and width == 2:
        parts.append(Part("bf16 weights of the forward", counts.parameters * 2, _LORA))
    if not full:
        parts.append(Part("adapters", trained, _RANK))
    less = _LORA if full else _RANK
    parts.append(Part("optimiser state", 2 * trained, less))
    if recipe.optimizer.ema_decay > 0:
        parts.append(Part("moving average", trained, "set optimizer.ema_decay=0"))
    if not isinstance(recipe.loss, ClippedRatio):  # it samples from a slower policy than it trains
        parts.append(Part("policy that samples", trained, less))
    if full and getattr(recipe.loss, "kl_beta", 0.0) > 0:
        parts.append(Part("reference weights", counts.parameters * width, "set loss.kl_beta=0"))
    for setting, precision in _precisions(recipe).items():
        share = precision.low_share(counts.forward.linear, counts.forward.adapted)
        size = int(counts.linear_parameters * share) * precision.bytes_per_weight
        name = f"low-precision copy ({precision.format})"
        parts.append(Part(name, size, f"set {setting}=TrainingPrecision"))
    return parts


def _precisions(recipe: Recipe) -> dict[str, RolloutPrecision]:
    """Distinct precisions of steps without a log-prob, by the setting that asks for them."""
    asked: dict[str, RolloutPrecision] = {"rollout_precision": recipe.rollout_precision}
    if isinstance(recipe.explore, Scouts) and recipe.explore.precision != recipe.rollout_precision:
        asked["explore.precision"] = recipe.explore.precision
    return asked

"""What a GPU holds while a recipe trains, part by part, and the largest micro-batch that still fits.

Weights are always there; the rest comes and goes with the phases of a step, of which the heaviest decides. Every GPU
holds all weights: this engine replicates, it does not shard. Activations are those of eager mode; of compiled blocks,
which compute element-wise steps again in the backward, those of selective checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import FlowModel

_CONTEXT = 1.5e9  # CUDA's own, with the libraries' workspaces
_USABLE = 0.95  # of what is left: the allocator's blocks do not pack without gaps
DECODED_PIXELS = 1 << 22  # that a pipeline's autoencoder makes at once
MOST_EMBEDDINGS = 1 << 31  # bytes of a run's prompts beyond which a text cache stays on disk
_FP32 = 4
_LORA = "set network.train=LoRA"
_RANK = "lower network.train.rank"
_LARGER_GPU = "choose a smaller model or a GPU with more memory"
_ROWS = "lower machine.rows_per_forward"
_CHUNKS = "set machine.prompts_per_chunk"
_FEWER = "lower num_prompts or group_size"


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
        fits = (
            f"machine.rows_per_forward={rows} fits"
            if rows
            else "even machine.rows_per_forward=1 does not fit"
        )
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


def plan_memory(counts: Counts, recipe: Recipe, num_gpus: int = 1) -> Memory:
    """Memory of one GPU of `num_gpus`, at the recipe's rows per forward."""
    if counts.activations is None:
        raise ValueError(f"the activations of {counts.name} were not counted; memory cannot be planned")
    machine = recipe.machine
    held = _Held(counts, recipe, recipe.plan(0, counts.sequence), recipe.num_prompts / num_gpus)
    phases = (
        _update(counts, recipe, held),
        # Of the block that runs: its forward, and gradients on the way back.
        Phase("rollout", held.rollout(), (Part("working buffers", counts.activations.block, _ROWS),)),
        Phase("decoding", held.decoding()),
        Phase("evaluation", held.evaluation()),
    )
    always = (
        *_weights(counts, recipe),
        Part("autoencoder", counts.vae_parameters * held.vae_width, _LARGER_GPU),
        Part(
            "prompt embeddings", held.prompts(), "set network.text_cache: those that do not fit stay on disk"
        ),
    )
    return Memory(
        fixed=tuple(part for part in always if part.bytes),
        phases=tuple(replace(p, fixed=tuple(part for part in p.fixed if part.bytes)) for p in phases),
        rows=(machine.replay_rows or machine.rows_per_forward) or max(1, recipe.rollout_rows // num_gpus),
    )


def _width(recipe: Recipe) -> int:
    """Bytes of a number of the run's precision."""
    return 2 if recipe.machine.precision == "bf16" else _FP32


def _halves(recipe: Recipe) -> int:
    """Forwards of a velocity."""
    return Policy(FlowModel(), recipe.guidance_scale).halves


def _weights(counts: Counts, recipe: Recipe) -> list[Part]:
    """The transformer, what is trained of it, and its copies."""
    full, width = recipe.network.train.trains_every_weight, _width(recipe)
    precisions = {"machine.rollout_precision": recipe.machine.rollout_precision}
    ranking = recipe.experience.scout_precision
    if ranking is not None and ranking != recipe.machine.rollout_precision:
        precisions["experience.precision"] = ranking
    trained, less = counts.trained * _FP32, _LORA if full else _RANK
    base = counts.parameters * (_FP32 if full else width)
    if any(precision.shares_base for precision in precisions.values()) and not full:
        base -= counts.linear_parameters * width  # only its low-precision form is kept
    smaller = "set machine.precision=bf16" if width == _FP32 else _LARGER_GPU
    parts = [Part("transformer weights", base, _LORA if full else smaller)]
    if full and width == 2:
        parts.append(Part("bf16 weights of the forward", counts.parameters * 2, _LORA))
    if not full:
        parts.append(Part("adapters", trained, _RANK))
    parts.append(Part("optimiser state", 2 * trained, less))
    names = {"start": "reference weights", recipe.requires.sampled_by: "policy that samples"}
    names["average"] = "moving average"
    for name in recipe.snapshots:
        if name == "start" and recipe.network.train.starts_from_base:
            continue  # the base with its adapters off
        remedy = "set optimizer.ema_decay=0" if name == "average" else less
        parts.append(Part(names.get(name, f"snapshot {name}"), trained, remedy))
    for setting, precision in precisions.items():
        share = precision.low_share(counts.forward.linear, counts.forward.adapted)
        size = int(counts.linear_parameters * share) * precision.bytes_per_weight
        remedy = f"set {setting}=TrainingPrecision"
        parts.append(Part(f"low-precision copy ({precision.format})", size, remedy))
    return parts


def _update(counts: Counts, recipe: Recipe, held: _Held) -> Phase:
    assert counts.activations is not None
    network, steps = recipe.network, recipe.machine.steps_per_forward
    # Several velocities of a row may have to be there when its loss goes back.
    graphs = recipe.objective.costs(held.plan, recipe.num_prompts).trained
    halves = _halves(recipe) if recipe.unconditional_gradient else 1
    kept = counts.activations.kept(network.checkpointing)
    if network.compile and network.checkpointing == "none":  # the compiler computes element-wise steps again
        kept = min(kept, counts.activations.kept("selective"))
    lighter = {"none": "selective", "selective": "full"}.get(network.checkpointing)
    remedy = f"set network.checkpointing={lighter}, or {_ROWS}" if lighter else _ROWS
    each_row = [
        Part("activations", kept * graphs * halves, remedy),
        Part("working buffers", counts.activations.block, _ROWS),
    ]
    copied = (2 + held.unconditional) * counts.latent_elements * _FP32 + held.embeddings(1)
    if not recipe.splits_contiguously:
        each_row.append(Part("rows gathered of the samples", copied, "set optimizer.partition=groups"))
    if steps > 1:  # what a forward takes of several steps is set side by side, a row as large as ever
        each_row.append(Part("steps side by side", copied, "lower machine.steps_per_forward"))
    gradients = Part(
        "gradients", counts.trained * _FP32, _LORA if network.train.trains_every_weight else _RANK
    )
    return Phase("update", (gradients, *held.update()), tuple(each_row))


def stored(plan: Plan, shared: bool = True) -> tuple[float, float]:
    """Latents that a sample's transitions are made of, and how many of them are rows before a kept step.

    Each kept step has its rows and the edges after them, each a part of a latent where samples have it in common.
    `shared`: the state between two kept steps is one tensor, as a walk and its cuts leave it; else both have their own,
    as chunks are joined.
    """
    states, heads = 0.0, 0.0
    all_kept = False  # at the step before
    for step, num_samples in zip(plan.steps, plan.candidates(), strict=True):
        num_prompts = max(len(step.row), len(step.kept))
        rows, edges = (count / num_prompts / num_samples for count in step.kept_of(num_prompts))
        passed_on = shared and all_kept and len(step.kept_heads) == step.parent.max() + 1
        states += edges + (0.0 if passed_on else rows)
        heads += rows
        all_kept = bool(step.kept.all())
    return states, heads


@dataclass(frozen=True, slots=True)
class _Held:
    """Latents, embeddings and images of a step, on a GPU with `num_prompts` of its prompts."""

    counts: Counts
    recipe: Recipe
    plan: Plan
    num_prompts: float

    @property
    def vae_width(self) -> int:
        """Bytes of a number of the autoencoder."""
        return _FP32 if self.counts.vae_in_fp32 else _width(self.recipe)

    @property
    def unconditional(self) -> float:
        """Of a latent in fp32: what is kept of the unconditional half of guidance at a row before a kept step."""
        recipe = self.recipe
        return recipe.reuses_unconditional * (_halves(recipe) - 1) * _width(recipe) / _FP32

    @property
    def chunk(self) -> float:
        """Prompts that are rolled out together."""
        return min(self.num_prompts, self.recipe.machine.prompts_per_chunk or self.num_prompts)

    def kept(self, joined: bool = False) -> float:
        """Latents in fp32 that a sample keeps of its walk; what is `joined` of chunks are copies."""
        states, heads = stored(self.plan, shared=not joined)
        if not self.recipe.requires.log_probs:
            return heads  # states alone, see `Sampler.keeps_next`
        return states + self.unconditional * heads

    def latents(self, samples: float, stored: float) -> float:
        """Bytes of `stored` latents in fp32 of each sample."""
        return samples * stored * self.counts.latent_elements * _FP32

    def embeddings(self, rows: float) -> float:
        """Bytes of what the transformer reads of so many prompts."""
        return rows * self.counts.prompt_elements * _width(self.recipe)

    def prompts(self) -> float:
        """All prompts of the run, while they are in memory."""
        held = self.embeddings(num_prompts(self.recipe))
        return 0.0 if self.recipe.network.text_cache and held > MOST_EMBEDDINGS else held

    def update(self) -> list[Part]:
        """What waits for the update, and the prompt of each sample."""
        samples = self.num_prompts * self.recipe.group_size
        latents = self.latents(samples, self.kept(self.chunk < self.num_prompts) + 2)
        return [
            Part("latents kept for the update", latents, f"{_FEWER}, or use a smaller window"),
            Part("embeddings of the samples", self.embeddings(samples), _FEWER),
        ]

    def rollout(self) -> tuple[Part, ...]:
        """The candidates of a chunk at a cut; or the finished samples of all twice, when chunks are joined."""
        samples, joined = self.num_prompts * self.recipe.group_size, 0.0
        if self.chunk < self.num_prompts:
            joined = self.latents(samples, self.kept() + self.kept(joined=True) + 2)
        scouts = self.latents(self.recipe.experience.walks.num_scouts * (self.chunk + self.num_prompts), 1)
        # Candidates exist on both sides of a cut at once.
        sizes = (*self.recipe.topology.stages, self.recipe.group_size)
        most = max((before + after for before, after in pairwise(sizes)), default=self.recipe.group_size)
        latents, embeddings = self.candidates(most)
        return replace(latents, bytes=max(latents.bytes, scouts, joined)), embeddings

    def candidates(self, of_prompt: int) -> list[Part]:
        """So many of each prompt of a chunk, beside the finished samples of other chunks."""
        stored = self.kept() + 1
        others = self.latents((self.num_prompts - self.chunk) * self.recipe.group_size, stored)
        latents = self.latents(self.chunk * of_prompt, stored + 1) + others
        together = max(of_prompt, self.recipe.experience.walks.num_scouts)
        fewer = f"lower num_prompts, topology.sizes or experience.num_scouts, or {_CHUNKS}"
        return [
            Part("latents of the candidates", latents, fewer),
            Part("embeddings of the candidates", self.embeddings(self.chunk * together), fewer),
        ]

    def decoding(self) -> tuple[Part, ...]:
        """The images of a chunk, or of all where rewards run elsewhere; candidates wait while previews are judged."""
        recipe = self.recipe
        group, waiting = max(recipe.group_size, recipe.experience.walks.num_scouts), [self.update()[0]]
        if any(cut.score == "reward" for _, cut in self.plan.cuts):
            waiting = self.candidates(self.plan.num_candidates)
            group = max(group, self.plan.num_candidates)
        elsewhere = any(term.where != "here" for term in recipe.task.rewards)
        samples = (self.num_prompts if elsewhere else self.chunk) * group
        return *waiting, *self.images(samples, _FEWER if elsewhere else f"{_CHUNKS}, or lower it")

    def evaluation(self) -> tuple[Part, ...]:
        """Its samples go all at once."""
        samples, fewer = self.recipe.task.num_eval_samples, "lower task.num_eval_samples"
        return (
            Part("latents of the evaluation", self.latents(samples, 2), fewer),
            Part("embeddings of the evaluation", self.embeddings(samples), fewer),
            *self.images(samples, fewer),
        )

    def images(self, samples: float, fewer: str) -> list[Part]:
        """As the autoencoder gives them, in fp32, and joined; and what it needs for those it makes at once."""
        counts = self.counts
        at_once = max(1, DECODED_PIXELS // max(1, counts.pixels))
        working = min(samples, at_once) * counts.decode_bytes * self.vae_width / _FP32
        smaller = "choose a smaller network.height, width or num_frames"
        remedy = smaller if at_once == 1 else fewer if samples <= at_once else _LARGER_GPU
        images = samples * 3 * counts.pixels * (self.vae_width + 2 * _FP32)
        return [Part("decoding", working, remedy), Part("decoded images", images, fewer)]


def num_prompts(recipe: Recipe) -> int:
    """Prompts of the run; those of one step where the source cannot be read, or the model brings them."""
    try:
        return len(recipe.data.load(()))
    except ValueError:
        return recipe.num_prompts

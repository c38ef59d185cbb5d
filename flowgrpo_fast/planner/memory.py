"""What a GPU holds while a recipe trains, part by part, and the largest micro-batch that still fits.

Weights are always there; the rest comes and goes with the phases of a step, of which the heaviest decides. Every GPU
holds all weights: this engine replicates, it does not shard. Activations are those of eager mode; of compiled blocks,
which compute element-wise steps again in the backward, those of selective checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from flowgrpo_fast.models.pipeline import DECODED_PIXELS, MOST_EMBEDDINGS
from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.step import differentiated_halves, halves
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.schedule.plan import Plan

_CONTEXT = 1.5e9  # CUDA's own, with the libraries' workspaces
_USABLE = 0.95  # of what is left: the allocator's blocks do not pack without gaps
_FP32 = 4
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

    def largest_rows(self, capacity: float, choices: Sequence[int]) -> int:
        """The first of `choices`, the most rows first, that fits into `capacity` bytes; 0 if none does."""
        room = usable(capacity)
        return next((rows for rows in choices if replace(self, rows=rows).total <= room), 0)

    def refusal(self, capacity: float, device: str, choices: Sequence[int]) -> str | None:
        """One line that says what does not fit and what shrinks it; None where it fits. `choices`: as above."""
        room = usable(capacity)
        if self.total <= room:
            return None
        largest = self.parts[0]
        advice = largest.remedy
        shrinkable = next((part for part in self.parts if part.remedy != _LARGER_GPU), largest)
        if shrinkable is not largest and advice == _LARGER_GPU:
            advice += f"; then {shrinkable.name}, {shrinkable.bytes / 1e9:.1f} GB: {shrinkable.remedy}"
        rows, least = self.largest_rows(capacity, choices), min(choices, default=1)
        fits = (
            f"machine.rows_per_forward={rows} fits"
            if rows
            else f"even machine.rows_per_forward={least} does not fit"
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


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Sizes of what comes in samples."""

    counts: Counts
    width: int  # bytes of a number of the run's precision

    @property
    def vae_width(self) -> int:
        """Bytes of a number of the autoencoder."""
        return _FP32 if self.counts.vae_in_fp32 else self.width

    def latents(self, num_samples: float, each: float) -> float:
        """`each` latents of so many samples, in fp32."""
        return num_samples * each * self.counts.latent_elements * _FP32

    def embeddings(self, rows: float) -> float:
        """What the transformer reads of so many prompts."""
        return rows * self.counts.prompt_elements * self.width

    def images(self, num_samples: float, fewer: str) -> list[Part]:
        """As the autoencoder gives them, in fp32, and joined; and what it needs for those it makes at once."""
        at_once = max(1, DECODED_PIXELS // max(1, self.counts.pixels))
        working = min(num_samples, at_once) * self.counts.decode_bytes * self.vae_width / _FP32
        smaller = "choose a smaller network.height, width or num_frames"
        remedy = smaller if at_once == 1 else fewer if num_samples <= at_once else _LARGER_GPU
        each = 3 * self.counts.pixels * (self.vae_width + 2 * _FP32)
        return [Part("decoding", working, remedy), Part("decoded images", num_samples * each, fewer)]


def plan_memory(counts: Counts, recipe: Recipe, num_gpus: int = 1) -> Memory:
    """Memory of one GPU of `num_gpus`, at the recipe's rows per forward."""
    if counts.activations is None:
        raise ValueError(f"the activations of {counts.name} were not counted; memory cannot be planned")
    machine, network, walks = recipe.machine, recipe.network, recipe.experience.walks
    plan = recipe.plan(0, counts.sequence)
    width = 2 if machine.precision == "bf16" else _FP32  # bytes of a number of the run's precision
    size = _Bytes(counts, width)
    group_size, num_prompts = recipe.group_size, recipe.num_prompts / num_gpus
    samples = num_prompts * group_size
    chunk = min(num_prompts, machine.prompts_per_chunk or num_prompts)  # prompts that are rolled out together
    # Of the unconditional half of guidance, what is kept at a row before a kept step; in latents of fp32.
    unconditional = recipe.reuses_unconditional * (halves(recipe) - 1) * width / _FP32

    def kept(joined: bool = False) -> float:
        """Latents that a sample keeps of its walk; what is `joined` of chunks are copies."""
        states, heads = stored(plan, shared=not joined)
        # Without log-probs states alone, see `Sampler.keeps_next`.
        return states + unconditional * heads if recipe.requires.log_probs else heads

    def candidates(of_prompt: int) -> list[Part]:
        """So many of each prompt of a chunk, beside the finished samples of other chunks."""
        finished = size.latents((num_prompts - chunk) * group_size, kept() + 1)
        fewer = f"lower num_prompts, topology.sizes or experience.num_scouts, or {_CHUNKS}"
        together = chunk * max(of_prompt, walks.num_scouts)
        return [
            Part("latents of the candidates", size.latents(chunk * of_prompt, kept() + 2) + finished, fewer),
            Part("embeddings of the candidates", size.embeddings(together), fewer),
        ]

    # The update: what waits for it, the prompt of each sample, and the graph of a forward.
    chunked = chunk < num_prompts
    waits = size.latents(samples, kept(joined=chunked) + 2)
    waiting = Part("latents kept for the update", waits, f"{_FEWER}, or use a smaller window")
    gradients = Part("gradients", counts.trained * _FP32, _less(recipe))
    update = [gradients, waiting, Part("embeddings of the samples", size.embeddings(samples), _FEWER)]
    buffers = Part("working buffers", counts.activations.block, _ROWS)  # of the block that runs
    each_row = [_graph(counts, recipe, plan), buffers]
    copied = size.latents(1, 2 + unconditional) + size.embeddings(1)
    if not recipe.splits_contiguously:
        remedy = _ROWS if recipe.requires.equal_updates else "set optimizer.partition=groups"
        each_row.append(Part("rows gathered of the samples", copied, remedy))
    if recipe.steps_per_forward > 1:  # what a forward takes of several steps is copied side by side
        each_row.append(Part("steps side by side", copied, "lower machine.steps_per_forward"))

    # The rollout: candidates exist on both sides of a cut at once; in the end chunks are joined, beside their parts.
    sizes = (*recipe.topology.stages, group_size)
    rolled, rolled_embeddings = candidates(max((a + b for a, b in pairwise(sizes)), default=group_size))
    joined = size.latents(samples, kept() + kept(joined=True) + 2) if chunked else 0.0
    scouts = size.latents(walks.num_scouts * (chunk + num_prompts), 1)
    rolled = replace(rolled, bytes=max(rolled.bytes, scouts, joined))

    # Decoding: the images of a chunk, or of all where rewards run elsewhere; candidates wait while previews are judged.
    decoded, before = max(group_size, walks.num_scouts), [waiting]
    if any(cut.score == "reward" for _, cut in plan.cuts):
        before = candidates(plan.num_candidates)
        decoded = max(decoded, plan.num_candidates)
    elsewhere = any(term.where != "here" for term in recipe.task.rewards)
    finished = size.images(
        (num_prompts if elsewhere else chunk) * decoded, _FEWER if elsewhere else f"{_CHUNKS}, or lower it"
    )

    # The evaluation: its samples go all at once.
    looked_at, fewer = recipe.task.num_eval_samples, "lower task.num_eval_samples"
    evaluation = [
        Part("latents of the evaluation", size.latents(looked_at, 2), fewer),
        Part("embeddings of the evaluation", size.embeddings(looked_at), fewer),
        *size.images(looked_at, fewer),
    ]

    prompts = size.embeddings(num_prompts_of(recipe))
    on_disk = network.text_cache and prompts > MOST_EMBEDDINGS
    always = [
        *_weights(counts, recipe, width),
        Part("autoencoder", counts.vae_parameters * size.vae_width, _LARGER_GPU),
        Part(
            "prompt embeddings",
            0.0 if on_disk else prompts,
            "set network.text_cache: those that do not fit stay on disk",
        ),
    ]
    return Memory(
        fixed=_some(always),
        phases=(
            Phase("update", _some(update), tuple(each_row)),
            Phase("rollout", _some([rolled, rolled_embeddings]), (buffers,)),
            Phase("decoding", _some([*before, *finished])),
            Phase("evaluation", _some(evaluation)),
        ),
        rows=(machine.replay_rows or machine.rows_per_forward) or max(1, recipe.rollout_rows // num_gpus),
    )


def _graph(counts: Counts, recipe: Recipe, plan: Plan) -> Part:
    """What a row of the update keeps for its backward."""
    assert counts.activations is not None
    network = recipe.network
    activations = counts.activations.kept(network.checkpointing)
    if network.compile and network.checkpointing == "none":  # the compiler computes element-wise steps again
        activations = min(activations, counts.activations.kept("selective"))
    # Several velocities of a row may have to be there when its loss goes back.
    graphs = recipe.objective.costs(plan, recipe.num_prompts).trained
    graphs *= differentiated_halves(recipe)
    lighter = {"none": "selective", "selective": "full"}.get(network.checkpointing)
    remedy = f"set network.checkpointing={lighter}, or {_ROWS}" if lighter else _ROWS
    return Part("activations", activations * graphs, remedy)


def _some(parts: list[Part]) -> tuple[Part, ...]:
    """Those there is something of."""
    return tuple(part for part in parts if part.bytes)


def _less(recipe: Recipe) -> str:
    """What shrinks all that is as large as the trained parameters."""
    return (
        "set network.train=LoRA" if recipe.network.train.trains_every_weight else "lower network.train.rank"
    )


def _weights(counts: Counts, recipe: Recipe, width: int) -> list[Part]:
    """The transformer, what is trained of it, and its copies."""
    full, less, trained = recipe.network.train.trains_every_weight, _less(recipe), counts.trained * _FP32
    precisions = {"machine.rollout_precision": recipe.machine.rollout_precision}
    ranking = recipe.experience.scout_precision
    if ranking is not None and ranking != recipe.machine.rollout_precision:
        precisions["experience.precision"] = ranking
    base = counts.parameters * (_FP32 if full else width)
    if any(precision.shares_base for precision in precisions.values()) and not full:
        base -= counts.linear_parameters * width  # only its low-precision form is kept
    smaller = "set machine.precision=bf16" if width == _FP32 else _LARGER_GPU
    parts = [Part("transformer weights", base, less if full else smaller)]
    if full and width == 2:
        parts.append(Part("bf16 weights of the forward", counts.parameters * 2, less))
    if not full:
        parts.append(Part("adapters", trained, less))
    parts.append(Part("optimiser state", 2 * trained, less))
    names = {"start": "reference weights", "average": "moving average"}
    names[recipe.requires.sampled_by] = "policy that samples"
    for name in recipe.snapshots:
        if name == "start" and recipe.network.train.starts_from_base:
            continue  # the base with its adapters off
        remedy = "set optimizer.ema_decay=0" if name == "average" else less
        parts.append(Part(names.get(name, f"snapshot {name}"), trained, remedy))
    for setting, precision in precisions.items():
        share = precision.low_share(counts.forward.linear, counts.forward.adapted)
        size = int(counts.linear_parameters * share) * precision.bytes_per_weight
        parts.append(
            Part(f"low-precision copy ({precision.format})", size, f"set {setting}=TrainingPrecision")
        )
    return parts


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


def num_prompts_of(recipe: Recipe) -> int:
    """Prompts of the run; those of one step where the source cannot be read, or the model brings them."""
    try:
        return len(recipe.data.load(()))
    except ValueError:
        return recipe.num_prompts

"""What has a golden curve: every named recipe in small, and variants of machinery that no named recipe uses.

A case is a list of text overrides (`recipe_io.override`) on top of a named recipe which `recipes.digits` has fitted to
the default job. A new recipe gets a case by itself; if its own numbers do not fit `SMALL`, say how in `FITTED`.
"""

from __future__ import annotations

from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipe_io import override
from flowgrpo_fast.recipes import RECIPES, digits

NUM_STEPS = 6  # of training, of a named recipe
NUM_STEPS_OF_VARIANTS = 3

# Applied to all, before what `FITTED` has. The learning rate is five times that of the default job: clip ranges are
# then reached within the first steps.
SMALL = (
    *("num_prompts=2", "group_size=4", "optimizer.lr=0.0005", "task.judge=", "seed=0"),
    "sigmas.num_inference_steps=6",
)

FITTED = {
    "flow_grpo_fast": ("topology.at.high=5",),  # of six steps
    "mix_grpo": ("topology.at.size=2", "topology.at.every=2"),  # moves on within the curve
    "mix_grpo_flash": ("topology.at.size=2", "topology.at.every=2"),
    "pro_grpo": ("topology.steps=[2, 4]", "topology.sizes=[12, 8]"),
    "pro_grpo_flash": ("topology.steps=[2, 4]", "topology.sizes=[8, 6]"),
    "tree_grpo": ("topology.at.size=2", "topology.at.every=2"),
    "gcpo": ("objective.sizes=[2, 3]",),
    "op_grpo": (
        "topology.at.size=3",
        "experience.num_early_steps=3",
        "num_prompts=4",
    ),  # prompts that come again
    "awm": ("optimizer.num_updates=1", "objective.surrogate.times=3"),
    "leap_align": ("group_size=1", "num_prompts=4"),
    "flow_opd": (
        "data=tests.golden.digits_teachers:Taught",
        'objective.teachers={"even": {"is": "tests.golden.digits_teachers:Scaled", "by": 1.02},'
        ' "odd": {"is": "tests.golden.digits_teachers:Scaled", "by": 0.98}}',
    ),
    "sol_rl": ("experience.num_scouts=8", "experience.num_inference_steps=3", "optimizer.num_updates=1"),
    "naive_scaling": (
        "experience.num_scouts=8",
        "experience.num_inference_steps=6",
        "optimizer.num_updates=1",
    ),
    "naive_quantized": (
        "experience.num_scouts=8",
        "experience.num_inference_steps=6",
        "optimizer.num_updates=1",
    ),
}

LORA = ("task.model=digits_lora:load", "network.train.rank=4", "network.train.alpha=8", "optimizer.lr=0.004")
THREADS = (
    'task.rewards=[{"is": "RewardTerm", "function": "flowgrpo_fast.rewards.rules:digit_log_prob", "where": "thread"},'
    ' {"is": "RewardTerm", "function": "flowgrpo_fast.rewards.rules:ink_contrast", "weight": 0.2, "where": "thread"}]'
)


def _low(form: str, mode: str) -> tuple[str, ...]:
    name = "machine.rollout_precision"
    return f"{name}=LowPrecision", f"{name}.format={form}", f"{name}.mode={mode}"


VARIANTS = {
    # guidance: reference and both halves; the rollout's unconditional half in the update, and computed again
    "flow_grpo+guidance": ("guidance_scale=2",),
    "flow_grpo_fast+guidance": ("guidance_scale=2",),
    "flow_grpo_fast+guidance_again": ("guidance_scale=2", "machine.reuse_unconditional=false"),
    "mix_grpo+guidance": ("guidance_scale=2",),
    "pro_grpo+guidance": ("guidance_scale=2",),
    # precision
    "flow_grpo+bf16": ("machine.precision=bf16",),
    "diffusion_nft+bf16": ("machine.precision=bf16",),
    "mix_grpo+fp8_merged": _low("fp8_rows", "merged"),
    "mix_grpo+fp8_tensor_merged": _low("fp8_tensor", "merged"),
    "mix_grpo+lora_fp8_merged": (*LORA, *_low("fp8_rows", "merged")),
    "mix_grpo+lora_fp8_bare_layers": (*LORA, *_low("fp8_rows", "bare_layers")),
    "mix_grpo+lora_fp8_branch": (*LORA, *_low("fp8_rows", "branch")),
    "mix_grpo+lora_fp8_shared_base": (*LORA, *_low("fp8_rows", "shared_base")),
    "diffusion_nft+lora_fp8_branch": (*LORA, *_low("fp8_rows", "branch")),
    # what is trained
    "flow_grpo+lora": LORA,
    "diffusion_nft+lora": LORA,
    # how rows become forwards
    "flow_grpo+rows": ("machine.rows_per_forward=2",),
    "mix_grpo+rows": ("machine.rows_per_forward=2",),
    "flow_grpo+replay_rows": ("machine.replay_rows=2",),
    "flow_grpo_fast+prefix_again": ("topology.share_prefix=false",),
    "dance_grpo+prefix_again": ("topology.share_prefix=false",),
    "flow_grpo_fast+chunks_in_a_thread": (THREADS, "machine.prompts_per_chunk=1"),
    "pro_grpo+chunks": ("machine.rows_per_forward=2", "machine.prompts_per_chunk=1"),
    # windows and solvers
    "flow_grpo+frozen_window": ("topology.at=FrozenWindow", "topology.at.size=2", "topology.at.start=1"),
    "mix_grpo+decay": (
        "topology.at.every=3",
        "topology.at.pace=decay",
        "topology.at.roll_back=false",
        "topology.at.cut=false",
    ),
    "mix_grpo+exp_decay": (
        "topology.at.every=3",
        "topology.at.pace=exp_decay",
        "topology.at.decay_rate=2.0",
        "topology.at.decay_start=0",
        "topology.at.cut=false",
    ),
    "mix_grpo_flash+heun": ("solver.variant=heun", "solver.keep=1.0"),
    "flow_grpo_fast+diffusers_sigmas": (
        "sigmas.shift=3.0",
        "sigmas.spacing=diffusers",
        "sigmas.terminal=0.02",
    ),
    # who is trained
    "pro_grpo+latents": ("topology.score=latents", "topology.pool=2"),
    "pro_grpo+top_bottom": ("topology.select=top_bottom",),
    "flow_grpo+scouts": ("experience=Scouts", "experience.num_scouts=8", "experience.num_inference_steps=3"),
    "sol_rl+variance": ("experience.select=variance",),
    "sol_rl+random": ("experience.select=random",),
    # credit and losses
    "flow_grpo_fast+batch_std_per_objective": ("credit.0.std=batch", "credit.0.aggregate=per_objective"),
    "dance_grpo+summed_rewards": (
        'credit=[{"is": "Normalise", "aggregate": "sum", "eps": 0.3}, {"is": "Bound"}]',
    ),
    "flow_grpo_fast+narrow_clip": ("objective.trust.range=0.0001", "optimizer.max_grad_norm=0.1"),
    "tree_grpo+by_samples": ("credit.2.edges=by_samples",),
    "tree_grpo+paper": ("topology.at=GeometricWindow", "topology.at.size=2", "credit.2.shares=probability"),
    "gcpo+drawn_chunks": ("objective.fraction=0.5",),
    "diffusion_nft+old_decay": (
        "objective.old.start=1",
        "objective.old.rate=0.2",
        "objective.old.most=0.7",
    ),
    "diffusion_nft+fraction": ("objective.fraction=0.5", "objective.beta=0.5", "optimizer.num_updates=1"),
}

# What recipes of the first edition meant by an update: their curves are those of today's code with these fields, to the
# bit, so that nothing but fields has changed.
CONTIGUOUS = ("optimizer.partition=groups",)
CONSTANT_AVERAGE = ("optimizer.ema_warm_up=false", "optimizer.ema_calls=1")
DROPPED = ("credit.2.mode=dropped",)
POPULATION = ("credit.0.ddof=0",)
FIRST_EDITION = {
    "flow_grpo+first_edition": (*CONTIGUOUS, *CONSTANT_AVERAGE, *DROPPED),
    "flow_grpo+first_edition_guidance": (
        *CONTIGUOUS,
        *CONSTANT_AVERAGE,
        *DROPPED,
        "guidance_scale=2",
        "unconditional_gradient=false",
    ),
    "dance_grpo+first_edition": (*CONTIGUOUS, *DROPPED, *POPULATION),
    "mix_grpo+first_edition": (*CONTIGUOUS, *DROPPED, *POPULATION, "credit.0.unit_weights=false"),
    "diffusion_nft+first_edition": (*CONTIGUOUS, "optimizer.ema_warm_up=false"),
}
VARIANTS |= FIRST_EDITION

NAMES = (*RECIPES, *VARIANTS)


def overrides(name: str) -> tuple[str, ...]:
    """What a case changes in its named recipe, in order."""
    base = name.partition("+")[0]
    return (*SMALL, *FITTED.get(base, ()), *VARIANTS.get(name, ()))


def num_steps(name: str) -> int:
    """Of training. A window that slides at a pace of its own is followed as far as a named recipe's."""
    slides = any(text.startswith("topology.at.pace=") for text in VARIANTS.get(name, ()))
    first = name.endswith("+first_edition")
    return NUM_STEPS if name in RECIPES or slides or first else NUM_STEPS_OF_VARIANTS


def make(name: str) -> Recipe:
    """The recipe of a case."""
    return override(digits(RECIPES[name.partition("+")[0]].make()), overrides(name))

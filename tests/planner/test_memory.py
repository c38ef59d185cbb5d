"""Memory: part by part, the largest micro-batch, and the one line where it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.data.draws import draw
from flowgrpo_fast.planner import memory as planned
from flowgrpo_fast.planner.architectures import Counts, architecture, count
from flowgrpo_fast.planner.counting import Activations, Work
from flowgrpo_fast.planner.memory import Memory, Part, Phase, plan_memory, usable
from flowgrpo_fast.recipe import (
    EMA,
    NFT,
    Comb,
    Cuts,
    Deterministic,
    FrozenWindow,
    FullFineTuning,
    Independent,
    LeapAlign,
    LoRA,
    LowPrecision,
    Machine,
    Network,
    OneStepEach,
    Optimizer,
    PolicyGradient,
    Prompts,
    RandomPair,
    Recipe,
    RewardTerm,
    Scouts,
    SharedStart,
    Task,
    TransitionKL,
    Tree,
)
from flowgrpo_fast.training.engine import build_engine
from tests.conftest import with_changes

COUNTS = Counts(
    name="simple",
    size="",
    forward=Work(linear=8.0, attention=2.0, adapted=2.0),
    trained_share=0.0,
    decode=3.0,
    text=5.0,
    reward=7.0,
    parameters=10**9,
    linear_parameters=8 * 10**8,
    trained=10**7,
    latent_elements=10**6,
    activations=Activations(all=4e9, selective=2e9, full=0.5e9, block=0.25e9),
    vae_parameters=10**8,
    prompt_elements=10**5,
    pixels=512 * 512,
    decode_bytes=1e9,
)
RECIPE = Recipe(name="r", group_size=8, num_prompts=4, machine=Machine(precision="bf16"))


def divisors(number: int) -> list[int]:
    return [rows for rows in range(number, 0, -1) if number % rows == 0]


def parts(counts=COUNTS, recipe=RECIPE, phase="update", **more) -> dict[str, float]:
    """Of what is always there and of one phase, at one row."""
    memory = plan_memory(counts, recipe, **more)
    (here,) = (part for part in memory.phases if part.name == phase)
    return {part.name: part.bytes for part in (*memory.fixed, *here.at(1))}


def test_parts_of_a_lora_by_hand() -> None:
    assert parts() == {
        "transformer weights": 2e9,
        "adapters": 4e7,
        "gradients": 4e7,
        "optimiser state": 8e7,
        "latents kept for the update": 32 * (10 + 2) * 4e6,
        "autoencoder": 2e8,
        "prompt embeddings": 4 * 2e5,
        "embeddings of the samples": 32 * 2e5,
        "activations": 4e9,
        "working buffers": 0.25e9,
    }
    assert parts(recipe=with_changes(RECIPE, precision="fp32"))["transformer weights"] == 4e9
    assert parts(num_gpus=4)["latents kept for the update"] == 8 * 12 * 4e6
    assert parts(recipe=with_changes(RECIPE, precision="fp32"))["autoencoder"] == 4e8
    assert parts(replace(COUNTS, vae_in_fp32=True))["autoencoder"] == 4e8


def test_prompts_are_in_memory_unless_a_cache_holds_more_than_fit(tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n" * 10)
    of_file = with_changes(RECIPE, data=Prompts(path=str(prompts)))
    assert parts(recipe=of_file)["prompt embeddings"] == 10 * 2e5
    many = replace(COUNTS, prompt_elements=2 * 10**8)  # 0.4 GB each
    cached = with_changes(of_file, network=Network(text_cache="cache"))
    assert parts(recipe=cached)["prompt embeddings"] == 10 * 2e5
    assert parts(many, of_file)["prompt embeddings"] == 10 * 4e8
    assert "prompt embeddings" not in parts(many, cached)
    assert parts(many, cached)["embeddings of the samples"] == 32 * 4e8


def test_a_rollout_holds_its_candidates_and_both_sides_of_a_cut() -> None:
    """The ten states of nine kept steps; the latents under way, and what a step makes of them.

    The first edition stored both sides of each step, 2 * 9: here a step ends in the tensor that the next begins with.
    """
    name, embeddings = "latents of the candidates", "embeddings of the candidates"
    state = (10 + 2) * 4e6
    plain = parts(phase="rollout")
    assert (plain[name], plain[embeddings]) == (32 * state, 32 * 2e5)
    assert plain["working buffers"] == 0.25e9
    assert "gradients" not in plain
    pruned = parts(recipe=with_changes(RECIPE, topology=Cuts(steps=(3, 5), sizes=(24, 16))), phase="rollout")
    assert (pruned[name], pruned[embeddings]) == (4 * (24 + 16) * state, 4 * (24 + 16) * 2e5)
    once = parts(recipe=with_changes(RECIPE, topology=Cuts(steps=(3,), sizes=(24,))), phase="rollout")
    assert once[name] == 4 * (24 + 8) * state
    scouted = parts(
        recipe=with_changes(RECIPE, experience=Scouts(num_scouts=30)), phase="rollout"
    )  # no transitions
    assert (scouted[name], scouted[embeddings]) == (32 * state, 4 * 30 * 2e5)
    scouted = parts(recipe=with_changes(RECIPE, experience=Scouts(num_scouts=100)), phase="rollout")
    assert scouted[name] == 4 * 100 * 2 * 4e6
    # One prompt after another: in the end all are joined, both sides of each step, and exist beside what is joined.
    chunked = with_changes(RECIPE, prompts_per_chunk=1, rows_per_forward=8)
    apart = parts(recipe=chunked, phase="rollout")
    assert (apart[name], apart[embeddings]) == (32 * (11 + 19) * 4e6, 8 * 2e5)
    wide = with_changes(chunked, topology=Cuts(steps=(3,), sizes=(64,)))
    assert parts(recipe=wide, phase="rollout")[name] == 72 * state + 24 * 11 * 4e6


def test_decoding_takes_sixteen_small_images_at_once() -> None:
    here = parts(phase="decoding")
    assert here["decoding"] == 16 * 0.5e9  # in bf16
    assert here["decoded images"] == 32 * 3 * 512 * 512 * (2 + 4 + 4)  # as they come, in fp32, joined
    assert here["latents kept for the update"] == 32 * 12 * 4e6
    assert parts(replace(COUNTS, vae_in_fp32=True), phase="decoding")["decoding"] == 16e9
    assert parts(replace(COUNTS, pixels=2048 * 2049), phase="decoding")["decoding"] == 0.5e9
    few = with_changes(RECIPE, prompts_per_chunk=1, rows_per_forward=8)
    assert parts(recipe=few, phase="decoding")["decoding"] == 8 * 0.5e9
    assert parts(recipe=few, phase="decoding")["decoded images"] == here["decoded images"] / 4
    reward = RewardTerm(function="flowgrpo_fast.rewards.rules:digit_log_prob", where="process")
    remote = with_changes(few, task=Task(rewards=(reward,)))
    assert parts(recipe=remote, phase="decoding")["decoded images"] == here["decoded images"]
    previewed = with_changes(RECIPE, topology=Cuts(steps=(3,), sizes=(24,)))
    got = parts(recipe=previewed, phase="decoding")
    assert got["decoded images"] == 4 * 24 * 3 * 512 * 512 * 10
    assert got["latents of the candidates"] == 4 * 24 * 12 * 4e6  # the cut comes after the scores
    assert got["embeddings of the candidates"] == 4 * 24 * 2e5
    pooled = with_changes(RECIPE, topology=Cuts(steps=(3,), sizes=(24,), score="latents"))
    assert parts(recipe=pooled, phase="decoding")["decoded images"] == here["decoded images"]


def test_an_evaluation_goes_all_at_once() -> None:
    here = parts(recipe=with_changes(RECIPE, task=Task(num_eval_samples=100)), phase="evaluation")
    assert here["latents of the evaluation"] == 100 * 2 * 4e6
    assert here["embeddings of the evaluation"] == 100 * 2e5
    assert here["decoded images"] == 100 * 3 * 512 * 512 * 10


def test_the_heaviest_phase_decides() -> None:
    many = with_changes(RECIPE, rows_per_forward=1, task=Task(num_eval_samples=5000))
    memory = plan_memory(COUNTS, many)
    assert memory.heaviest.name == "evaluation"
    line = memory.refusal(40e9, "cuda:0", divisors(32))
    assert line is not None
    assert "the largest part is latents of the evaluation, 40.0 GB: lower task.num_eval_samples" in line
    assert "even machine.rows_per_forward=1 does not fit" in line
    assert plan_memory(COUNTS, RECIPE).heaviest.name == "update"
    heavy = plan_memory(replace(COUNTS, parameters=3 * 10**10), many).refusal(60e9, "cuda:0", divisors(32))
    assert heavy is not None
    assert (
        "transformer weights, 60.0 GB: choose a smaller model or a GPU with more memory; then latents"
        in heavy
    )


def test_parts_of_full_fine_tuning_by_hand() -> None:
    recipe = replace(
        RECIPE,
        network=Network(train=FullFineTuning(), checkpointing="full"),
        objective=PolicyGradient(regularizers=(TransitionKL(beta=0.1),)),
        optimizer=Optimizer(ema_decay=0.9),
    )
    got = parts(replace(COUNTS, trained=10**9, trained_share=1.0), recipe)
    assert got["transformer weights"] == got["gradients"] == got["moving average"] == 4e9
    assert got["optimiser state"] == 8e9
    assert got["bf16 weights of the forward"] == 2e9
    assert got["reference weights"] == 4e9  # a snapshot is a copy of the fp32 masters
    assert got["activations"] == 0.75e9


@pytest.mark.parametrize(
    ("precision", "size"),
    [
        (LowPrecision(), 8e8),
        (LowPrecision(format="nvfp4", mode="merged"), 0.5625 * 8e8),
        (LowPrecision(mode="bare_layers"), 0.75 * 8e8),
    ],
    ids=str,
)
def test_a_low_precision_copy(precision, size) -> None:
    name = f"low-precision copy ({precision.format})"
    assert parts(recipe=with_changes(RECIPE, rollout_precision=precision))[name] == size
    assert parts(recipe=with_changes(RECIPE, experience=Scouts(precision=precision)))[name] == size


def test_the_remedy_is_the_setting_that_asked() -> None:
    recipe = with_changes(RECIPE, experience=Scouts(precision=LowPrecision(format="nvfp4")))
    copies = [p for p in plan_memory(COUNTS, recipe).fixed if p.name.startswith("low-precision")]
    assert [p.remedy for p in copies] == ["set experience.precision=TrainingPrecision"]
    same = with_changes(recipe, rollout_precision=LowPrecision(format="nvfp4"))
    copies = [p for p in plan_memory(COUNTS, same).fixed if p.name.startswith("low-precision")]
    assert [p.remedy for p in copies] == ["set machine.rollout_precision=TrainingPrecision"]


def test_a_shared_base_replaces_the_weights() -> None:
    got = parts(recipe=with_changes(RECIPE, rollout_precision=LowPrecision(mode="shared_base")))
    assert got["transformer weights"] == 2e9 - 2 * 8e8
    assert got["low-precision copy (fp8_rows)"] == 8e8


def test_compiled_blocks_keep_what_selective_checkpointing_keeps() -> None:
    compiled = with_changes(RECIPE, network=Network(compile=True))
    assert parts(recipe=compiled)["activations"] == 2.25e9
    full = with_changes(RECIPE, network=Network(compile=True, checkpointing="full"))
    assert parts(recipe=full)["activations"] == 0.75e9


def test_uncond_in_autograd_doubles_the_activations() -> None:
    guided = with_changes(RECIPE, guidance_scale=4.0)
    doubled = parts(recipe=replace(guided, unconditional_gradient=True))["activations"]
    assert doubled == 2 * parts(recipe=guided)["activations"]


def test_the_largest_micro_batch_divides_an_update() -> None:
    update = Phase(
        "update", (Part("latents", 2e9, ""),), (Part("kept", 4e9, ""), Part("buffers", 0.25e9, ""))
    )
    memory = Memory((Part("weights", 3e9, ""),), (Phase("decoding", (Part("images", 1e9, ""),)), update), 32)
    fixed = 5e9
    assert plan_memory(COUNTS, RECIPE).rows == 32
    assert memory.total == fixed + 32 * 4.25e9
    for fits, rows in ((0.9, 0), (1.1, 1), (7.5, 4), (8.0, 8), (31.0, 16), (1000.0, 32)):
        capacity = (fixed + fits * 4.25e9) / 0.95 + 1.5e9
        assert memory.largest_rows(capacity * (1 + 1e-9), divisors(32)) == rows, fits
        assert usable(capacity) == pytest.approx(fixed + fits * 4.25e9)


def test_what_does_not_fit_is_one_line_with_the_largest_part() -> None:
    memory = plan_memory(COUNTS, RECIPE)
    line = memory.refusal(80e9, "cuda:0 (80 GB)", divisors(32))
    assert line is not None
    assert "\n" not in line
    for part in (
        "a step needs 139.9 GB and cuda:0 (80 GB) has 74.6 GB",
        "the largest part is activations, 128.0 GB: set network.checkpointing=selective, "
        "or lower machine.rows_per_forward",
        "(machine.rows_per_forward=16 fits)",
    ):
        assert part in line
    assert (
        plan_memory(COUNTS, with_changes(RECIPE, rows_per_forward=16)).refusal(80e9, "x", divisors(32))
        is None
    )
    full = with_changes(RECIPE, network=Network(train=FullFineTuning()), rows_per_forward=1)
    heavy = plan_memory(replace(COUNTS, trained=10**9), full).refusal(10e9, "x", divisors(32))
    assert heavy is not None
    assert (
        "the largest part is optimiser state, 8.0 GB: set network.train=LoRA (even machine.rows_per" in heavy
    )


def test_published_sizes_fit_where_people_train_them() -> None:
    """SD3.5-M LoRA at 9 rows on 80 GB (Flow-GRPO's own); FLUX LoRA on 80 GB; FLUX whole only across GPUs."""
    recipe = with_changes(RECIPE, num_prompts=48, group_size=24, guidance_scale=4.5)
    medium = plan_memory(count(architecture("sd3.5-medium"), Network()), recipe)
    assert 9 <= medium.largest_rows(80e9, divisors(72)) <= 36
    each = next(part.bytes for part in medium.phases[0].each_row if part.name == "activations") / 1e9
    assert each == pytest.approx(2.7, rel=0.25)  # the notes' own estimate of a sample's activations
    flux = count(architecture("flux.1-dev"), Network())
    distilled = with_changes(recipe, guidance_scale=1.0)
    assert plan_memory(flux, distilled).largest_rows(80e9, divisors(72)) >= 4
    # What guidance adds to what waits for the update: half an fp32 latent in bf16 for each stochastic step.
    waiting = [
        part.bytes
        for plan in (medium, plan_memory(count(architecture("sd3.5-medium"), Network()), distilled))
        for part in plan.phases[0].fixed
        if part.name == "latents kept for the update"
    ]
    half = 4 if recipe.machine.precision == "fp32" else 2
    assert waiting[0] - waiting[1] == 48 * 24 * 9 * 16 * 64 * 64 * half
    whole = with_changes(recipe, network=Network(train=FullFineTuning(), checkpointing="full"))
    trained = count(architecture("flux.1-dev"), whole.network)
    assert plan_memory(trained, whole).largest_rows(180e9, divisors(72)) == 0


def test_snapshots_are_those_of_the_parts() -> None:
    assert not {
        name
        for name in parts(
            recipe=with_changes(RECIPE, objective=PolicyGradient(regularizers=(TransitionKL(),)))
        )
        if "weights" in name
    } - {"transformer weights"}
    ode = Independent(at=Deterministic())
    nft = parts(recipe=with_changes(RECIPE, topology=ode, objective=NFT(kl_beta=0.1)))
    assert nft["policy that samples"] == 4e7
    assert nft["latents kept for the update"] == 32 * 2 * 4e6  # finished samples alone
    assert "reference weights" not in nft  # a fresh adapter starts from the base
    loaded = Network(train=LoRA(path="adapter"))
    assert (
        parts(recipe=with_changes(RECIPE, topology=ode, objective=NFT(kl_beta=0.1), network=loaded))[
            "reference weights"
        ]
        == 4e7
    )
    followed = TransitionKL(to="followed", rule=EMA(decay=0.9))
    assert (
        parts(recipe=with_changes(RECIPE, objective=PolicyGradient(regularizers=(followed,))))[
            "snapshot followed"
        ]
        == 4e7
    )


@pytest.mark.parametrize(
    ("topology", "states"),
    [
        (Independent(at=FrozenWindow(size=3, start=2)), 4),
        (SharedStart(at=FrozenWindow(size=3, start=2)), 3 + 1 / 8),  # the row before the first is the group's
        (SharedStart(at=FrozenWindow(size=3, start=2), share_prefix=False), 4),
        (Tree(at=FrozenWindow(size=3, start=2)), (1 + 2 + 4 + 8) / 8),
        (
            Comb(at=FrozenWindow(size=4, start=2)),
            (4 + 8) / 8,
        ),  # of the trunk at four steps; every branch's first
        (OneStepEach(), 2),  # before and after the one step
        (Cuts(inner=SharedStart(at=FrozenWindow(size=3, start=2)), steps=(6,), sizes=(16,)), 3 + 1 / 16),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_that_samples_have_in_common_are_stored_once(topology, states) -> None:
    recipe = with_changes(RECIPE, topology=topology)
    got = parts(recipe=recipe)["latents kept for the update"]
    assert got == pytest.approx(32 * (states + 2) * 4e6)


def test_what_is_planned_is_what_a_walk_stores(toy_recipe) -> None:
    """Distinct storages of a real trajectory, the unconditional halves of guidance among them."""
    for topology in (
        Independent(at=FrozenWindow(size=3, start=1)),
        SharedStart(at=FrozenWindow(size=3, start=1)),
        Tree(at=FrozenWindow(size=3, start=1)),
        Comb(at=FrozenWindow(size=4, start=1)),
        OneStepEach(at=FrozenWindow(size=4, start=1)),
    ):
        recipe = toy_recipe(topology=topology, guidance_scale=2.0)
        engine = build_engine(recipe, torch.device("cpu"))
        stage = engine.stage
        draws = draw(
            recipe.data.draw(0, recipe.seed, recipe.num_prompts, len(engine.prompts)),
            step=0,
            seed=recipe.seed,
            num_drawn=recipe.num_drawn,
            share_start=recipe.topology.shares_start,
            device=engine.device,
        )
        samples = recipe.experience.collect(stage, draws, 0).samples
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for kept in samples.transitions
            for tensor in (kept.latents, kept.next_latents, kept.unconditional)
            if tensor is not None
        }
        states, heads = planned.stored(samples.plan)
        assert sum(held.values()) == pytest.approx(32 * (states + heads) * 6 * 4), topology


def test_steps_side_by_side_are_copies_of_rows() -> None:
    """A forward has as many rows as ever; what they are gathered from comes on top."""
    name, guided = "steps side by side", with_changes(RECIPE, guidance_scale=2.0, steps_per_forward=3)
    assert name not in parts()
    assert parts(recipe=with_changes(guided, guidance_scale=1.0))[name] == 2 * 4e6 + 2e5
    assert parts(recipe=guided)[name] == 2.5 * 4e6 + 2e5
    assert parts(recipe=guided)["activations"] == parts()["activations"]


def test_a_share_that_is_no_run_of_neighbours_gathers_its_rows() -> None:
    name, guided = "rows gathered of the samples", with_changes(RECIPE, guidance_scale=2.0)
    for partition, found in (("groups", False), ("shuffled", True), ("across_groups", True)):
        two = replace(guided, optimizer=Optimizer(num_updates=2, partition=partition))
        assert (parts(recipe=two).get(name) == 2.5 * 4e6 + 2e5) == found
        assert (name in parts(recipe=two)) == found
    assert name not in parts(recipe=replace(guided, optimizer=Optimizer(partition="shuffled")))


def test_two_leaps_keep_two_forwards() -> None:
    rewards = (RewardTerm(function="flowgrpo_fast.rewards.rules:digit_log_prob", differentiable=True),)
    leaps = with_changes(
        RECIPE, topology=Independent(at=RandomPair()), objective=LeapAlign(), task=Task(rewards=rewards)
    )
    assert parts(recipe=leaps)["activations"] == 2 * 4e9

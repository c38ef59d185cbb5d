"""The floor of a run under way, and memory refused before and named during it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from flowgrpo_fast import launch
from flowgrpo_fast.cli import main
from flowgrpo_fast.launch import Run
from flowgrpo_fast.planner import live
from flowgrpo_fast.planner.architectures import architecture, count, count_model
from flowgrpo_fast.planner.counting import count_work
from flowgrpo_fast.planner.live import Floor, check_memory, floor_of, measured_rate
from flowgrpo_fast.precision import FORMATS, QuantizedLinear
from flowgrpo_fast.recipe import LowPrecision, Network
from flowgrpo_fast.recipes import digits
from flowgrpo_fast.recipes.trajectory import mix_grpo
from flowgrpo_fast.training.engine import build_engine

CPU = torch.device("cpu")


def test_the_digits_are_counted_like_their_architecture() -> None:
    engine = build_engine(digits(mix_grpo()), CPU)
    counts = count_model(engine.model, engine.stage.conditioning, CPU)
    d, image, text = 64, 16, engine.stage.conditioning.prompt_embeds.shape[1]
    blocks = 2 * (2 * (image + text) * 12 * d**2 + 2 * 12 * d**2)
    last = 2 * image * 12 * d**2 + 2 * text * 3 * d**2 + 2 * 8 * d**2
    ends = 2 * image * 4 * d + 2 * text * 32 * d + 2 * (256 * d + d * d) + 2 * (32 * d + d * d)
    assert counts.forward.linear == blocks + last + ends + 2 * 2 * d * d + 2 * image * d * 4
    assert counts.forward.attention == 3 * 4 * (image + text) ** 2 * d
    assert counts.forward.products == 0
    assert counts.trained_share == 1.0


def test_adapters_are_told_from_full_fine_tuning(toy_recipe) -> None:
    engine = build_engine(toy_recipe(), CPU)
    counts = count_model(engine.model, engine.stage.conditioning, CPU)
    assert counts.forward.linear == 2 * (8 * 32 + 32 * 6)
    assert (counts.forward.attention, counts.decode, counts.trained_share) == (0.0, 0.0, 1.0)
    engine.model.module[2].requires_grad_(False)
    counts = count_model(engine.model, engine.stage.conditioning, CPU)
    assert counts.trained_share == 8 * 32 / (8 * 32 + 32 * 6)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_products_in_low_precision_are_counted(name, toy_recipe, monkeypatch) -> None:
    """A shared base leaves no other; native or emulated, seen by the compiler or not."""
    engine = build_engine(toy_recipe(), CPU)
    source = nn.Linear(256, 128).requires_grad_(False)
    quantized = QuantizedLinear(source, FORMATS[name])
    x = torch.zeros(3, 256)
    if not quantized.native:
        assert count_work(lambda: quantized(x)).linear == 2 * 3 * 256 * 128
        monkeypatch.setattr(
            type(FORMATS[name]), "scaled_mm", lambda self, x, stored, bias, dtype: x.new_zeros(3, 128)
        )
        quantized.native = True
    assert count_work(lambda: quantized(x)).linear == 2 * 3 * 256 * 128
    engine.model.module.append(quantized)
    engine.model.velocity = lambda latents, sigma, conditioning: latents
    counts = count_model(engine.model, engine.stage.conditioning, CPU)
    trained = 8 * 32 + 32 * 6
    assert counts.trained_share == trained / (trained + 256 * 128)


def test_the_floor_is_work_over_rate(toy_recipe, monkeypatch) -> None:
    monkeypatch.setattr(live, "measured_rate", lambda device, dtype: 1e6)
    engine = build_engine(toy_recipe(), CPU)
    low = replace(engine.recipe.machine, rollout_precision=LowPrecision())  # emulated on a CPU: no faster
    engine.recipe = replace(engine.recipe, machine=low)
    floor = floor_of(engine)
    assert floor is not None
    forward = 2 * (8 * 32 + 32 * 6)
    expected = (
        32 * 6 * forward + 32 * 3 * 3 * forward
    )  # six steps; three replayed, forward and twice backward
    assert floor.flops == expected
    assert floor.seconds == pytest.approx(expected / 1e6)
    phases = {"rollout": 1.0, "update": 2.0, "self_test": 5.0, "evaluation": 9.0}
    assert floor.over(phases) == pytest.approx(3.0 / floor.seconds)
    assert "measured here, fp32" in str(floor)


def test_a_known_gpu_is_read_from_its_table(toy_recipe, monkeypatch) -> None:
    engine = build_engine(toy_recipe(precision="bf16"), CPU)
    counts = count_model(engine.model, engine.stage.conditioning, CPU)
    monkeypatch.setattr(live, "count_model", lambda *args: counts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    engine.device = torch.device("cuda:0")
    floor = floor_of(engine)
    assert floor is not None
    assert floor.rate == pytest.approx(800e12)
    assert floor.seconds == pytest.approx(floor.flops / 800e12)
    assert "bf16 on a H100" in str(floor)


def test_a_model_that_cannot_be_counted_has_no_floor(toy_recipe) -> None:
    engine = build_engine(toy_recipe(), CPU)
    engine.model.module = nn.Identity()  # nothing with a matrix product
    engine.model.velocity = lambda latents, sigma, conditioning: latents
    assert floor_of(engine) is None

    def fails(*args):
        raise RuntimeError("not under a counter")

    engine.model.velocity = fails
    assert floor_of(engine) is None


def test_attention_that_hides_from_the_counter_is_counted_from_the_configuration(toy_recipe) -> None:
    """flash-attn's own operator has no FLOP formula; the toy network, without any attention, stands in for it."""
    network = Network(path="sd3.5-medium")
    floor = floor_of(build_engine(toy_recipe(network=network), CPU))
    assert floor is not None
    work = count(architecture("sd3.5-medium"), network).forward
    assert floor.flops == pytest.approx(32 * 6 * work.forward + 32 * 3 * (work.forward + work.backward(1.0)))


def test_the_rate_is_that_of_matrix_products_now(monkeypatch) -> None:
    """On a clock of our own: the best of the products that fill the time."""
    now, products = [0.0], []

    def product(left, right) -> None:
        assert (left.dtype, left.shape) == (right.dtype, right.shape) == (torch.bfloat16, (side, side))
        products.append(2.0**-6 if len(products) == 3 else 2.0**-4)  # seconds; the first warms up
        now[0] += products[-1]

    side = live._SIDE["cpu"]
    monkeypatch.setattr(live.torch, "mm", product)
    monkeypatch.setattr(live, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert measured_rate(CPU, torch.bfloat16) == 2.0 * side**3 * 2**6
    assert sum(products[1:-1]) < live._MEASURING <= sum(products[1:])


def finished_run(recipe, folder: Path) -> str:
    text = io.StringIO()
    Run(recipe=recipe, folder=folder, device=CPU, console=Console(file=text, width=200)).start()
    return text.getvalue()


def test_every_step_tells_its_time_over_the_floor(toy_recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(live, "measured_rate", lambda device, dtype: 1e9)
    shown = finished_run(toy_recipe(), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    floor = floor_of(build_engine(toy_recipe(), CPU))
    assert floor is not None
    for record in records[1:]:
        outside = ("seconds/self_test", "seconds/evaluation")
        phases = {n: s for n, s in record.items() if n.startswith("seconds/") and n not in outside}
        assert {"seconds/rollout", "seconds/update"} <= set(phases)
        rounding = 1e-4 * len(phases) / floor.seconds + 1e-3  # of the phases and of the quotient
        assert record["time_over_floor"] == pytest.approx(sum(phases.values()) / floor.seconds, abs=rounding)
    assert f"{records[-1]['time_over_floor']:.3g}x floor" in shown
    assert "floor " in shown.splitlines()[2]
    assert "time over the floor of its FLOPs" in (tmp_path / "report.html").read_text()


def test_without_a_floor_the_run_says_so_and_goes_on(toy_recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(launch, "floor_of", lambda engine: None)
    shown = finished_run(toy_recipe(), tmp_path)
    assert "floor unknown" in shown
    assert "time_over_floor" not in (tmp_path / "metrics.jsonl").read_text()
    assert "x floor" not in shown


# ---------------------------------------------------------------------------------------------- memory


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(
    toy_recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "memory_of", lambda device: 24e9)
    monkeypatch.setattr(launch, "build_engine", lambda *args: pytest.fail("nothing may be loaded"))
    recipe = toy_recipe(network=Network(path="black-forest-labs/FLUX.1-dev"), precision="bf16")
    with pytest.raises(ValueError, match="out of memory before the start") as caught:
        Run(recipe=recipe, folder=tmp_path / "run", device=CPU).start()
    line = str(caught.value)
    assert "\n" not in line
    assert "the largest part is activations" in line
    assert "network.checkpointing=selective, or lower machine.rows_per_forward" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["", "someone/unknown", "folder"])
def test_what_the_planner_does_not_know_it_does_not_refuse(toy_recipe, tmp_path, path) -> None:
    if path == "folder":
        (tmp_path / "model_index.json").write_text('{"transformer": ["x", "Unknown"]}')
        path = str(tmp_path)
    check_memory(toy_recipe(network=Network(path=path)), CPU, 1e9)


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, RuntimeError, ImportError])
def test_a_pipeline_that_cannot_be_counted_is_not_refused(toy_recipe, monkeypatch, error) -> None:
    """A configuration the planner misreads may be one that trains; running out of memory still ends in one line."""

    def fails(*args):
        raise error("within a meta network")

    monkeypatch.setattr(live, "count", fails)
    recipe = toy_recipe(network=Network(path="sd3.5-medium"))
    check_memory(recipe, CPU, 1e9)
    with (
        pytest.raises(ValueError, match=r"lower machine\.rows_per_forward"),
        live.out_of_memory_in_one_line(recipe, CPU),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_cpu_out_of_memory_is_one_line_too(toy_recipe) -> None:
    with (
        pytest.raises(
            ValueError,
            match=r"^out of memory on cpu: .*DefaultCPUAllocator: .*; lower machine.rows_per_forward",
        ),
        live.out_of_memory_in_one_line(toy_recipe(), CPU),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="of its own"), live.out_of_memory_in_one_line(toy_recipe(), CPU):
        raise RuntimeError("of its own")


def test_a_plan_is_compared_with_what_others_left_free(monkeypatch) -> None:
    """Free memory no longer holds the CUDA context of the process that asks; the plan takes it off by itself."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30e9, 80e9))
    assert live.memory_of(torch.device("cuda:0")) == 30.5e9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79.9e9, 80e9))
    assert live.memory_of(torch.device("cuda:0")) == 80e9
    assert live.memory_of(CPU) is None


def test_enough_memory_or_a_cpu_is_no_obstacle(toy_recipe) -> None:
    recipe = toy_recipe(network=Network(path="sd3.5-medium", height=256, width=256), precision="bf16")
    one = replace(recipe, machine=replace(recipe.machine, rows_per_forward=1))
    check_memory(one, CPU, 24e9)
    check_memory(recipe, CPU, live.memory_of(CPU))


@pytest.mark.parametrize(
    ("network", "advice"),
    [
        (Network(), "lower machine.rows_per_forward (now 32)"),
        (
            Network(path="sd3.5-medium"),
            "the largest part is activations, about 66.0 GB: set network.checkpointing=selective",
        ),
    ],
    ids=["unknown", "known"],
)
def test_out_of_memory_during_training_is_one_line(
    toy_recipe, tmp_path, monkeypatch, network, advice
) -> None:
    def full(*args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB\nof which ..."
        )

    monkeypatch.setattr(launch, "train", full)
    with pytest.raises(ValueError, match=r"CUDA out of memory\. Tried to allocate 2\.00 GiB; ") as caught:
        finished_run(toy_recipe(network=network, precision="bf16"), tmp_path)
    assert "\n" not in str(caught.value)
    assert advice in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert (tmp_path / "report.html").exists()  # what was measured is still told


# ------------------------------------------------------------------------------------------------- CLI


@pytest.mark.slow
def test_plan_prints_tables(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main(["plan", "sd3.5-medium", "flow_grpo", "--gpus", "32"])
    shown = capsys.readouterr().out
    for part in (
        "2.22 TFLOP, 1.92 in weights and 0.31 in attention; backward 2.68",
        "48 prompts x 24 samples, 10 steps, bf16, LoRA",
        "RTX 4090",
        "18 of 18",
        "set network.checkpointing=selective",
        "unconditional half held constant",
    ):
        assert part in shown


@pytest.mark.slow
def test_plan_as_json_with_overrides(capsys) -> None:
    main(
        [
            "plan",
            "flux.1-dev",
            "mix_grpo",
            "network.height=720",
            "network.width=720",
            "topology.share_prefix=false",
            "--gpu",
            "b200",
            "--json",
        ]
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["counts"]["forward"]["linear"] / 1e12 == pytest.approx(32.77, rel=0.02)
    assert plan["step_flops"]["rollout"] / 1e15 == pytest.approx(358, rel=0.02)
    assert set(plan["floors"]) == {"h100", "h200", "b200", "a100", "4090"}
    assert plan["floors"]["b200"]["gpu_seconds"] < plan["floors"]["h100"]["gpu_seconds"]
    assert any(lever["name"] == "nvfp4 outside the window" for lever in plan["levers"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sd3.5-medum"], "did you mean 'sd3.5-medium'"),
        (["sd3.5-medium", "flow_gpro"], "unknown recipe 'flow_gpro'; did you mean 'flow_grpo'"),
        (["sd3.5-medium", "network.height=500"], "needs a multiple of 16"),
        (["sd3.5-medium", "--gpu", "h101"], "unknown GPU 'h101'; did you mean 'h100'"),
        (["sd3.5-medium", "--gpus", "0"], "--gpus is 0; it must be at least 1"),
    ],
)
def test_a_mistake_in_a_plan_is_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_floor_reads_well() -> None:
    assert str(Floor(0.5, 2.5e15, 8e14, "(there)")) == (
        "floor 0.5 s a step: 2.5 PFLOP, rewards left out, at 800 TFLOP/s (there)"
    )

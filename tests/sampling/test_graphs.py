"""Steps on static buffers: the numbers of the plain rollout to the bit, one graph per shape, captured or not."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from flowgrpo_fast.sampling.sampler import rollout
from flowgrpo_fast.sampling.schedule import resolve_schedule
from flowgrpo_fast.training.sample import draw, sample

from flowgrpo_fast.models.digits import DigitsConfig, DigitsModel, DigitsNetwork
from flowgrpo_fast.recipe import (
    NFT,
    AllSteps,
    Credit,
    Deterministic,
    DPMSolver2M,
    FrozenWindow,
    LowPrecision,
    Optimizer,
    Prune,
    Scouts,
    SlidingWindow,
)
from flowgrpo_fast.recipes import digits, mix_grpo
from flowgrpo_fast.sampling import graphs as module
from flowgrpo_fast.sampling.graphs import StepGraph
from flowgrpo_fast.training.engine import build_engine, sync_weights
from flowgrpo_fast.training.loop import train_step

CPU = torch.device("cpu")
FORWARD = {"loss": NFT(), "window": Deterministic(), "credit": Credit(std="batch", drop_zero_variance=False)}
FUNNEL = Prune(at=(3, 4), sizes=(24, 16), score="latents", pool=2)
CASES = {
    "plain": {},
    "guided": {"guidance_scale": 3.0},
    "shared": {"share_start_noise": True},
    "shared, micro-batches": {"share_start_noise": True, "rows_per_forward": 8},
    "second order": {"solver": DPMSolver2M(keep=0.6), "window": SlidingWindow(size=2, every=1)},
    "bf16": {"precision": "bf16", "guidance_scale": 2.0},
    "funnel": {"prune": FUNNEL, "window": AllSteps()},
    "shared funnel, rewards": {"prune": replace(FUNNEL, score="reward"), "share_start_noise": True},
    "low precision": {"rollout_precision": LowPrecision(mode="merged")},
    "forward process": {**FORWARD, "solver": DPMSolver2M()},
    "scouts": {**FORWARD, "explore": Scouts(num_scouts=16, num_inference_steps=4)},
    "scouts in low precision": {
        **FORWARD,
        "explore": Scouts(num_scouts=16, num_inference_steps=4, precision=LowPrecision(mode="merged")),
    },
}


@pytest.fixture
def small(monkeypatch):
    """Engines on a small SD3 transformer for handwritten digits; keywords replace fields of the recipe."""

    def load(device, setup) -> DigitsModel:
        torch.manual_seed(0)
        network = DigitsNetwork(DigitsConfig(num_layers=1)).eval()
        network.words.requires_grad_(False)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return DigitsModel(network.to(device))

    monkeypatch.setattr("flowgrpo_fast.models.digits.load", load)
    base = digits(mix_grpo())
    base = replace(
        base,
        sigmas=replace(base.sigmas, num_inference_steps=6),
        window=FrozenWindow(size=2, start=1),
        share_start_noise=False,
        optimizer=Optimizer(lr=1e-3),
        num_prompts=4,
        group_size=8,
        task=replace(base.task, judge=""),
    )

    def build(device=CPU, **changes):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fp8_rows is emulated")
            return build_engine(replace(base, **changes), device)

    return build


def equal(one, other) -> None:
    for name in ("latents", "next_latents", "log_prob", "x0"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.evaluations == other.evaluations


def both(small, changes, device=CPU):
    """Three training steps with and without graphs."""
    engines = [small(device, graphs=on, **changes) for on in (True, False)]
    for _ in range(3):
        metrics = [train_step(engine).metrics for engine in engines]
        assert metrics[0] == metrics[1]
    return engines


@pytest.mark.parametrize("name", CASES)
def test_training_on_static_buffers_is_the_plain_one_to_the_bit(small, name) -> None:
    graphed, plain = both(small, CASES[name])
    for mine, theirs in zip(graphed.model.module.parameters(), plain.model.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    draws, schedule = draw(plain.recipe, 10, 3, CPU), resolve_schedule(plain.recipe, 3)
    if name not in ("scouts", "scouts in low precision"):
        equal(sample(graphed, draws, schedule), sample(plain, draws, schedule))


def shapes(engine) -> list[tuple[int, int]]:
    """(rows, samples of a row) in the order of capture."""
    return [(key[1], key[2]) for key in engine.graphs.captured]


def test_one_graph_a_shape_the_largest_first(small) -> None:
    engine = small(graphs=True, prune=FUNNEL, window=AllSteps(), optimizer=Optimizer(num_updates=1))
    for _ in range(2):
        train_step(engine)
    assert shapes(engine) == [
        (32, 1),
        (32, 1),
    ]  # full micro-batches all along: only what a cut reads is another
    engine = small(graphs=True, prune=FUNNEL, window=AllSteps(), rows_per_forward=0, num_prompts=1)
    train_step(engine)
    assert shapes(engine) == [(8, 1), (8, 1)]
    engine = small(graphs=True, share_start_noise=True)
    train_step(engine)
    assert shapes(engine) == [(4, 8), (32, 1), (4, 1)]


def test_a_shrinking_batch_replays_smaller_graphs(small, monkeypatch) -> None:
    seen = []
    replay = StepGraph.replay

    def spy(graph):
        seen.append(len(graph.given.latents))
        return replay(graph)

    monkeypatch.setattr(StepGraph, "replay", spy)
    engine = small(graphs=True)
    funnel = replace(engine.recipe, prune=FUNNEL, window=AllSteps(), rows_per_forward=0, num_prompts=1)
    object.__setattr__(funnel, "rows_per_forward", 24)  # more than an update's samples: one forward for all
    engine.recipe = funnel
    sample(engine, draw(funnel, 10, 0, CPU), resolve_schedule(funnel, 0))
    assert seen == [24, 24, 24, 16, 8, 8]


def test_buffers_keep_their_addresses_and_models_their_graphs(small) -> None:
    engine = small(graphs=True, **FORWARD, rollout_precision=LowPrecision(mode="merged"))

    def addresses():
        graphs = engine.graphs
        held = [t for buffers in graphs._buffers.values() for t in (buffers.given.latents, buffers.coeffs)]
        held += list(engine.model.module.parameters())
        held += engine.old.values
        held += [layer.weight for layer, _ in engine.low_precision.merged if hasattr(layer, "weight")]
        held += [b for layer, _ in engine.low_precision.merged for b in layer.buffers()]
        return [t.data_ptr() for t in held], list(graphs.captured)

    train_step(engine)
    first = addresses()
    for _ in range(2):
        train_step(engine)
    sync_weights(engine)
    assert addresses() == first
    assert engine.outside is engine.outside  # a view is one object: its graphs are found again
    assert engine.outside is not engine.sampled


def test_a_larger_rollout_starts_over(small) -> None:
    engine = small(graphs=True)
    schedule = resolve_schedule(engine.recipe, 0)
    few = replace(engine.recipe, num_prompts=2)
    engine.recipe = few
    small_one = sample(engine, draw(few, 10, 0, CPU), schedule)
    engine.recipe = replace(few, num_prompts=4)
    sample(engine, draw(engine.recipe, 10, 0, CPU), schedule)
    engine.recipe = few
    equal(sample(engine, draw(few, 10, 0, CPU), schedule), small_one)
    assert len(engine.graphs._buffers) == 1


def test_the_oldest_layout_makes_room(small, monkeypatch) -> None:
    """Prompts of ever new lengths, as a cache on disk pads them."""
    monkeypatch.setattr(module, "_MOST_LAYOUTS", 2)
    engine, plain = small(graphs=True), small()
    schedule, draws = resolve_schedule(engine.recipe, 0), draw(engine.recipe, 10, 0, CPU)
    for length in (3, 4, 3, 2, 4):
        trajectories = []
        for one in (engine, plain):
            rows = one.conditioning.rows(draws.prompt_index[draws.group_id])
            rows = replace(rows, prompt_embeds=rows.prompt_embeds[:, :length].contiguous())
            trajectories.append(rollout(one.model, rows, draws, schedule, one.recipe, graphs=one.graphs))
        equal(*trajectories)
        assert len(engine.graphs._buffers) <= 2
        assert len(engine.graphs.captured) == len(engine.graphs._buffers)


def test_a_capture_that_fails_says_so_once(small, monkeypatch) -> None:
    """As on a device where something in the step cannot be captured."""

    def fail(graph, pool, side):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    monkeypatch.setattr(StepGraph, "capture", fail)
    monkeypatch.setattr(module, "_on_cuda", lambda given: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    engine, plain = small(graphs=True, share_start_noise=True), small(share_start_noise=True)
    with pytest.warns(RuntimeWarning) as caught:
        metrics = [train_step(engine).metrics for _ in range(2)]
    assert [str(w.message) for w in caught] == [
        "graphs: a step of 4 rows cannot be captured (operation not permitted when stream is capturing); "
        "steps are launched one by one"
    ]
    assert metrics == [train_step(plain).metrics for _ in range(2)]


class Driver:
    """Stands in for CUDA's: a replay computes into the captured outputs and spoils those of all other graphs."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[object] = []
        self.graphs: list[StepGraph] = []
        cuda = torch.cuda
        for name in ("current_stream", "Stream"):
            monkeypatch.setattr(cuda, name, lambda device, name=name: Stream(f"{name} of {device}"))
        monkeypatch.setattr(cuda, "set_stream", lambda stream: self.log.append(f"back to {stream.name}"))
        monkeypatch.setattr(cuda, "stream", lambda stream: self.scope(stream.name))
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: self.Graph(self))
        monkeypatch.setattr(cuda, "graph", lambda graph, **how: self.scope(how))
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(module, "_on_cuda", lambda given: True)
        capture, take = StepGraph.capture, module.take_step

        def counted(*arguments):
            self.log.append("run")
            return take(*arguments)

        def captured(graph, pool, side) -> None:
            capture(graph, pool, side)
            graph.graph.owner = graph
            self.graphs.append(graph)

        monkeypatch.setattr(module, "take_step", counted)
        monkeypatch.setattr(StepGraph, "capture", captured)

    @contextmanager
    def scope(self, what: object):
        self.log.append(what)
        yield

    class Graph:
        def __init__(self, driver) -> None:
            self.driver, self.owner = driver, None

        def replay(self) -> None:
            for graph in self.driver.graphs:
                for tensor in tensors(graph.result):
                    tensor.fill_(float("nan"))
            for static, value in zip(tensors(self.owner.result), tensors(self.owner.run()), strict=True):
                static.copy_(value)


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other) -> None:
        pass


def tensors(result) -> list[torch.Tensor]:
    negative = [result.guidance.negative_velocity] if result.guidance else []
    return [t for t in (*result.out, result.velocity, *negative) if t is not None]


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_read_before_another_graph_replays(small, name, monkeypatch) -> None:
    """One memory pool: the outputs of a graph are gone when any other has run."""
    Driver(monkeypatch)
    graphed, _ = both(small, CASES[name])
    assert graphed.graphs.captured
    assert all(graph.graph is not None for graph in graphed.graphs.captured.values())


def test_a_capture_warms_up_aside_and_lets_other_threads_be(small, monkeypatch) -> None:
    driver = Driver(monkeypatch)
    engine = small(graphs=True, share_start_noise=True)
    sample(engine, draw(engine.recipe, 10, 0, CPU), resolve_schedule(engine.recipe, 0))
    side = engine.graphs._side  # the one of all, on the latents' device, whichever device is the current one
    how = {"pool": "pool", "stream": side, "capture_error_mode": "thread_local"}
    one = ["Stream of cpu", "run", "run", "run", how, "run", "back to current_stream of cpu"]
    assert driver.log[: 3 * len(one)] == 3 * one
    assert len(driver.log) == 3 * len(one) + 6  # six steps, each one replay, which here runs again


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_the_launched_ones_to_the_bit(small, name) -> None:
    """Weights move between the steps: replays see them."""
    cuda = torch.device("cuda")
    graphed, _ = both(small, CASES[name], cuda)
    assert all(graph.graph is not None for graph in graphed.graphs.captured.values())


@pytest.mark.gpu
def test_rewards_may_use_the_device_while_a_step_is_captured(small) -> None:
    import threading

    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            torch.randn(64, 64, device="cuda").sum().item()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        engine = small(torch.device("cuda"), graphs=True)
        train_step(engine)
    finally:
        stop.set()
        thread.join()
    assert all(graph.graph is not None for graph in engine.graphs.captured.values())


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_is_launched(small, monkeypatch) -> None:
    velocity = DigitsModel.velocity

    def waiting(model, latents, sigma, conditioning):
        return velocity(model, latents + 0 * latents.sum().item(), sigma, conditioning)

    monkeypatch.setattr(DigitsModel, "velocity", waiting)
    cuda = torch.device("cuda")
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="graphs: a step of 32 rows cannot be captured") as caught:
        engines = both(small, {}, cuda)
    assert len(caught) == 1
    assert torch.cuda.current_stream() == stream
    assert all(graph.graph is None for graph in engines[0].graphs.captured.values())

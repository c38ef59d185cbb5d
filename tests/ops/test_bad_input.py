"""Every bad argument is one line: op, argument, what it was, what it must be."""

from __future__ import annotations

import re

import pytest
import torch

from flowgrpo_fast.ops import Extras, Guidance, flow_log_prob, flow_step, philox_normal, philox_uint32


def step_arguments(case):
    c = case((2, 4, 6))
    return {
        "latents": c.latents,
        "velocity": c.velocity,
        "coeffs": c.coeffs,
        "step_index": 1,
        "seed": c.seed,
    }


BAD_STEP_ARGUMENTS = [
    ({"latents": [1.0]}, "latents is a list, must be a torch.Tensor"),
    ({"latents": torch.zeros(6)}, "latents has 1 dimension(s), must be [batch, ...]"),
    ({"latents": torch.zeros(())}, "latents has 0 dimension(s), must be [batch, ...]"),
    ({"latents": torch.zeros(0, 4, 6)}, "latents is empty: shape [0, 4, 6], must have at least one element"),
    ({"latents": torch.zeros(2, 0, 6)}, "latents is empty: shape [2, 0, 6], must have at least one element"),
    ({"latents": torch.zeros(2, 4, 6).int()}, "latents has dtype torch.int32, must have float32"),
    (
        {"latents": torch.zeros(2, 4, 6).to(torch.complex64)},
        "latents has dtype torch.complex64, must have float32",
    ),
    (
        {"latents": torch.zeros(2, 4, 6, device="meta")},
        "latents is on meta with layout torch.strided, must be a dense tensor on a CPU or a CUDA device",
    ),
    (
        {"latents": torch.eye(4).to_sparse()},
        "latents is on cpu with layout torch.sparse_coo, must be a dense tensor",
    ),
    ({"velocity": None}, "velocity is a NoneType, must be a torch.Tensor"),
    ({"velocity": torch.zeros(2, 4, 5)}, "velocity has shape [2, 4, 5], must have [2, 4, 6] as latents has"),
    ({"velocity": torch.zeros(2, 24)}, "velocity has shape [2, 24], must have [2, 4, 6] as latents has"),
    (
        {"velocity": torch.zeros(2, 4, 6).double()},
        "velocity has dtype torch.float64, must have float32, bfloat16",
    ),
    ({"velocity": torch.zeros(2, 4, 6, dtype=torch.float8_e4m3fn)}, "velocity has dtype torch.float8_e4m3fn"),
    (
        {"velocity": torch.zeros(2, 4, 6, device="meta")},
        "velocity is on meta with layout torch.strided, must be",
    ),
    ({"coeffs": torch.zeros(5, 7)}, "coeffs has shape [5, 7], must have [5, 8]"),
    ({"coeffs": torch.zeros(8)}, "coeffs has shape [8], must have [8, 8]"),
    ({"coeffs": torch.zeros(5, 8).double()}, "coeffs has dtype torch.float64, must have torch.float32"),
    ({"coeffs": torch.zeros(0, 8)}, "coeffs is empty: shape [0, 8]"),
    ({"coeffs": [[0.0] * 8]}, "coeffs is a list, must be a torch.Tensor"),
    ({"step_index": 5}, "step_index is 5, must be in [0, 5)"),
    ({"step_index": -1}, "step_index is -1, must be in [0, 5)"),
    ({"step_index": 1.0}, "step_index is a float, must be an int or an int64 tensor"),
    ({"step_index": None}, "step_index is a NoneType, must be an int or an int64 tensor"),
    ({"step_index": torch.tensor([0, 5])}, "step_index is 5, must be in [0, 5)"),
    ({"step_index": torch.tensor(9)}, "step_index is 9, must be in [0, 5)"),
    ({"step_index": torch.tensor([0, 1, 2])}, "step_index has shape [3], must have [2]"),
    ({"step_index": torch.tensor([0, 1]).int()}, "step_index has dtype torch.int32, must have torch.int64"),
    ({"seed": torch.zeros(3, dtype=torch.int64)}, "seed has shape [3], must have [2]"),
    ({"seed": torch.zeros(2)}, "seed has dtype torch.float32, must have torch.int64"),
    ({"seed": 7}, "seed is a int, must be a torch.Tensor"),
    ({"guidance": 4.5}, "guidance is a float, must be Guidance(negative_velocity, scale)"),
    ({"guidance": Guidance(None, 4.5)}, "guidance.negative_velocity is a NoneType, must be a torch.Tensor"),
    ({"guidance": Guidance(torch.zeros(2, 4, 5), 4.5)}, "guidance.negative_velocity has shape [2, 4, 5]"),
    (
        {"guidance": Guidance(torch.zeros(2, 4, 6).half(), 4.5)},
        "guidance.negative_velocity has dtype torch.float16",
    ),
    (
        {"x0_prev": torch.zeros(2, 4, 6).bfloat16()},
        "x0_prev has dtype torch.bfloat16, must have torch.float32",
    ),
    ({"x0_prev": torch.zeros(2, 4)}, "x0_prev has shape [2, 4], must have [2, 4, 6] as latents has"),
]


def one_line(op, message):
    return rf"\A{op}: [^\n]*{re.escape(message)}[^\n]*\Z"


@pytest.mark.parametrize(("bad", "message"), BAD_STEP_ARGUMENTS, ids=[m for _, m in BAD_STEP_ARGUMENTS])
def test_flow_step_names_the_bad_argument(case, bad, message):
    with pytest.raises(ValueError, match=one_line("flow_step", message)):
        flow_step(**{**step_arguments(case), **bad})


@pytest.mark.parametrize("argument", ["latents", "velocity", "coeffs", "seed"])
def test_memory_given_back_is_not_read(case, argument):
    arguments = step_arguments(case)
    arguments[argument].untyped_storage().resize_(0)  # as sharding frees a parameter that keeps its shape
    with pytest.raises(
        ValueError, match=one_line("flow_step", f"{argument} has no memory, must have storage")
    ):
        flow_step(**arguments)


@pytest.mark.parametrize(
    ("bad", "message"),
    [pair for pair in BAD_STEP_ARGUMENTS if "seed" not in pair[0]],
    ids=lambda v: str(v)[:60],
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_flow_log_prob_names_the_bad_argument(case, bad, message, needs_grad):
    arguments = {**step_arguments(case), **bad}
    arguments["next_latents"] = torch.zeros(2, 4, 6)
    del arguments["seed"]
    if needs_grad:
        arguments["velocity"] = (
            torch.zeros(2, 4, 6, requires_grad=True) if "velocity" not in bad else bad["velocity"]
        )
    with pytest.raises(ValueError, match=one_line("flow_log_prob", message)):
        flow_log_prob(**arguments)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "next_latents is a NoneType, must be a torch.Tensor"),
        (torch.zeros(2, 4, 7), "next_latents has shape [2, 4, 7], must have [2, 4, 6] as latents has"),
        (torch.zeros(2, 4, 6).double(), "next_latents has dtype torch.float64, must have float32, bfloat16"),
    ],
)
def test_flow_log_prob_names_next_latents(case, value, message):
    arguments = step_arguments(case)
    del arguments["seed"]
    with pytest.raises(ValueError, match=one_line("flow_log_prob", message)):
        flow_log_prob(**arguments, next_latents=value)


ZEROS = torch.zeros(2, 4, 6)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (True, "extras is a bool, must be Extras(...)"),
        (Extras(reference_velocity=1.0), "extras.reference_velocity is a float, must be a torch.Tensor"),
        (Extras(reference_velocity=ZEROS[:1]), "extras.reference_velocity has shape [1, 4, 6], must have [2"),
        (
            Extras(reference_velocity=ZEROS.double()),
            "extras.reference_velocity has dtype torch.float64, must",
        ),
        (Extras(False, ZEROS, 2.0), "extras.reference_negative is a float, must be a torch.Tensor"),
        (Extras(False, ZEROS, ZEROS.half()), "extras.reference_negative has dtype torch.float16, must have"),
        (Extras(False, None, ZEROS), "extras.reference_negative is given alone, must come with"),
        (Extras(map_axis=0), "extras.map_axis is 0, must be 1 or -1"),
        (Extras(map_axis=3), "extras.map_axis is 3, must be 1 or -1"),
        (Extras(map_axis=-2), "extras.map_axis is -2, must be 1 or -1"),
        (Extras(map_axis="C"), "extras.map_axis is C, must be 1 or -1"),
    ],
    ids=str,
)
def test_flow_log_prob_names_the_bad_extra(case, extras, message):
    c = case((2, 4, 6), guided=True)
    with pytest.raises(ValueError, match=one_line("flow_log_prob", message)):
        flow_log_prob(c.latents, c.velocity, c.next_latents, c.coeffs, 1, c.guidance, extras=extras)


def test_a_reference_negative_wants_guidance(case):
    c = case((2, 4, 6))
    with pytest.raises(
        ValueError, match=one_line("flow_log_prob", "extras.reference_negative is given alone")
    ):
        flow_log_prob(c.latents, c.velocity, c.next_latents, c.coeffs, 1, extras=Extras(False, ZEROS, ZEROS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3], (4,)), "seed is a list, must be a torch.Tensor"),
        ((torch.zeros(2), (4,)), "seed has dtype torch.float32, must have torch.int64"),
        ((torch.tensor(3), (4,)), "seed has 0 dimension(s), must be [batch]"),
        ((torch.tensor([3]), (0,)), "shape is [0], must be of sizes of at least 1"),
        ((torch.tensor([3]), (4,), -1), "step is -1, must be in [0, 2^32)"),
        ((torch.tensor([3]), (4,), 1 << 32), "step is 4294967296, must be in [0, 2^32)"),
        ((torch.tensor([3]), (4,), 0.5), "step is a float, must be an int or an int64 tensor"),
        ((torch.tensor([3]), (4,), torch.tensor([1, 2])), "step has shape [2], must have [1]"),
        ((torch.tensor([3]), (4,), 0, -1), "stream is -1, must be in [0, 2^32)"),
    ],
)
def test_philox_names_the_bad_argument(arguments, message):
    for op in (philox_normal, philox_uint32):
        with pytest.raises(ValueError, match=one_line("philox[a-z0-9_]*", message)):
            op(*arguments)


def test_philox_normal_wants_a_floating_dtype():
    with pytest.raises(
        ValueError, match=r"philox_normal: dtype is torch.int64, must be one of torch.float32"
    ):
        philox_normal(torch.tensor([3]), (4,), dtype=torch.int64)

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

Case = dict[str, Tensor]


@pytest.fixture
def cases(golden: dict[str, np.ndarray]) -> Callable[[str], list[Case]]:
    """The golden cases that hold a key; bf16 ones with inputs in the dtype they were rounded to."""

    def find(key: str) -> list[Case]:
        found = []
        for prefix in sorted({name.split("_")[0] + "_" for name in golden if name.endswith("_" + key)}):
            case = {
                k.removeprefix(prefix): torch.from_numpy(np.asarray(v))
                for k, v in golden.items()
                if k.startswith(prefix)
            }
            if case["bf16"]:
                case |= {k: case[k].bfloat16() for k in ("x", "v", "next")}
            found.append(case)
        assert found
        return found

    return find


@pytest.fixture
def close() -> Callable[..., None]:
    def check(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
        torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=rtol, atol=atol)

    return check


@pytest.fixture
def with_schedule() -> Callable[..., FlowMatchEulerDiscreteScheduler]:
    """Puts a golden case's schedule into a scheduler."""

    def put(case: Case, scheduler: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
        scheduler.sigmas, scheduler.timesteps = case["sigmas"], case["timesteps"]
        return scheduler

    return put

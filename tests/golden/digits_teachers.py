"""Two teachers of the digits, and prompts that say which is whose: what a golden curve of distillation learns from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file

from flowgrpo_fast.data.prompts import Prompts
from flowgrpo_fast.models import digits
from flowgrpo_fast.objectives.snapshots import Moment
from flowgrpo_fast.types import PromptSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught(Prompts):
    """The digits' own prompts, each with the data set that its teacher is for."""

    def load(self, own: Sequence[str] = ()) -> PromptSet:
        found = Prompts.load(self, own)
        return replace(found, metadata=tuple({"dataset": ("even", "odd")[i % 2]} for i in range(len(found))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """The shipped weights, scaled: another model of the same kind."""

    by: float = 1.0
    moves = False

    @property
    def path(self) -> str:
        module = digits.shipped().module
        file = Path(tempfile.gettempdir()) / f"digits_scaled_{self.by}.safetensors"
        save_file({name: (self.by * value).contiguous() for name, value in module.state_dict().items()}, file)
        return str(file)

    def keep(self, moment: Moment) -> float | None:
        return None

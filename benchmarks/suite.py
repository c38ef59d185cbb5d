"""Which cases are measured: every family of `benchmarks.cases` on the sizes and dtypes of a selection.

A module of `benchmarks/cases` with a function `cases` is a family; nothing else names it. One that is not measured on
latents has a `SELECTION` of its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from benchmarks import cases as families_package
from benchmarks.cases import SIZES, TOY, Case, Selection, Size

FLAGSHIPS = ("SD3.5 512 x24", "FLUX 720 x24")  # in bfloat16 too; the other sizes in float32 alone
# The flagships first, so that a measurement cut short has them.
DEFAULT: Selection = (
    *((size, dtype) for size in SIZES if size.name in FLAGSHIPS for dtype in (torch.float32, torch.bfloat16)),
    *((size, torch.float32) for size in SIZES if size.name not in FLAGSHIPS),
)


@dataclass(frozen=True)
class Request:
    """One case before its data is made: what to ask which family for, and which of its answers is meant."""

    family: str
    asked: tuple[Size, torch.dtype]
    operation: str
    size_name: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What names the case in tables and test ids, as `Case.group` does."""
        return f"{self.operation} {self.size_name} {str(self.dtype).removeprefix('torch.')}"


def families() -> dict[str, ModuleType]:
    """Every family's module, by name."""
    found = {}
    for module in pkgutil.iter_modules(families_package.__path__):
        loaded = importlib.import_module(f"{families_package.__name__}.{module.name}")
        if hasattr(loaded, "cases"):
            found[module.name] = loaded
    return found


def requests(selection: Selection | None = None, device: torch.device | None = None) -> list[Request]:
    """The cases of a selection, each once, those of one family and size next to each other; None is all sizes.

    What a family offers is learnt from samples of a few elements under the name and batch of the real size. A case
    in a dtype of the family's own is kept as it is.
    """
    asked = [
        (size, dtype, family, module)
        for family, module in families().items()
        for size, dtype in selection or getattr(module, "SELECTION", DEFAULT)
    ]
    found: dict[str, Request] = {}
    for size, dtype, family, module in sorted(asked, key=lambda each: each[0].name not in FLAGSHIPS):
        probe = Size(size.name, size.batch, tuple(min(extent, 16) for extent in size.sample))
        for case in module.cases(probe, dtype, device or torch.device("cpu")):
            request = Request(family, (size, dtype), case.operation, case.size.name, case.dtype)
            found.setdefault(request.name, request)
    return list(found.values())


class Maker:
    """Makes the cases of requests; keeps the data of the latest family, size and dtype only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[str, Size, torch.dtype] | None = None
        self._cases: dict[str, Case] = {}

    def __call__(self, request: Request) -> Case:
        key = (request.family, *request.asked)
        if key != self._key:
            self._cases = {}  # frees the data before the next is made
            torch._dynamo.reset()  # each size is compiled for itself, not for a range of sizes
            self._cases = {
                case.group: case for case in families()[request.family].cases(*request.asked, self.device)
            }
            self._key = key
        return self._cases[request.name]


def toy_cases(device: torch.device, size: Size = TOY, dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Every family's cases on one small size."""
    for module in families().values():
        yield from module.cases(size, dtype, device)

"""What a part checks on construction: one `ValueError` line with part, field and value."""

from __future__ import annotations

import math


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def positive(owner: object, **values: float) -> None:
    """Every value is above 0 and finite; a value goes by the name of its field."""
    for name, value in values.items():
        require(value > 0, f"{type(owner).__name__}.{name} is {value}; it must be above 0")
        finite(owner, **{name: value})


def finite(owner: object, **values: float) -> None:
    """Every value is a finite number."""
    for name, value in values.items():
        require(math.isfinite(value), f"{type(owner).__name__}.{name} is {value}; it must be a finite number")


def at_most(owner: object, most: float, **values: float) -> None:
    """No value is above `most`: nobody means such a number, and what it would do shows late."""
    for name, value in values.items():
        require(value <= most, f"{type(owner).__name__}.{name} is {value}; it must be at most {most:g}")


def fraction(owner: object, **values: float) -> None:
    """Every value is in (0, 1]."""
    for name, value in values.items():
        require(0 < value <= 1, f"{type(owner).__name__}.{name} is {value}; it must be in (0, 1]")


def one_of(owner: object, choices: tuple[str, ...], **values: str) -> None:
    """Every value is among the choices."""
    for name, value in values.items():
        known = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])])
        require(value in choices, f"{type(owner).__name__}.{name} is {value!r}; it must be {known}")

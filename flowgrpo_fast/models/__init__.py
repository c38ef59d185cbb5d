"""Generators behind one face: `encode`, `velocity`, `decode` (see `types.FlowModel`), one family a file."""

from __future__ import annotations

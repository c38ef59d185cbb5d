"""The signatures of other trainers over `schedule` and `ops`: change an import, keep the loop.

Nothing here imports those trainers.
"""

from flowgrpo_fast.compat.scheduler import FlowMatchTransitionScheduler

__all__ = ["FlowMatchTransitionScheduler"]

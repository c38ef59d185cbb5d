"""Group-relative reinforcement learning for flow-matching generators.

`flowgrpo_fast.ops` and `flowgrpo_fast.sampling` are usable alone; `flowgrpo_fast.training` is the trainer.
"""

__version__ = "0.1.0"

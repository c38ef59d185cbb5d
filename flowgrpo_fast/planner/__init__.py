"""Planning: what a step of a recipe needs in FLOPs, seconds and memory, counted without a GPU.

`architectures` (published networks as data) -> `counting` (one forward on the meta device) -> `step` (an iteration of
a recipe) -> `memory` and `levers`. `live` does the same for a run that is under way.
"""

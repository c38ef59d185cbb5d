"""One function per method, with its paper's numbers; `digits` fits any of them to the default job."""

from flowgrpo_fast.recipes.catalogue import RECIPES, Entry
from flowgrpo_fast.recipes.fits import digits

__all__ = ["RECIPES", "Entry", "digits"]

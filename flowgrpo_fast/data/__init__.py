"""What a run is asked for: prompt files with what comes with each prompt, and the draws of every step."""

from __future__ import annotations

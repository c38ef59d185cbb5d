"""Rewards: plain functions `(images [B, C, H, W] in [0, 1], prompts) -> [B] fp32`, and judges that stay outside."""

from __future__ import annotations

"""Rewards: what they see and return, how samples are scored by several at once, and judges that stay outside."""

from __future__ import annotations

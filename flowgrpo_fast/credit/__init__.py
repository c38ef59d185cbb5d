"""Credit: rewards -> advantages, and which samples count."""

from flowgrpo_fast.credit.advantages import assign_credit

__all__ = ["assign_credit"]

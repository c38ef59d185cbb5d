"""Losses: one file per piece of mathematics."""

"""Sampling: policies walked along plans, cuts on the way, captured steps."""

"""Monitoring: metrics as JSON lines, cost, progress bar, trackers, figures and the HTML report."""

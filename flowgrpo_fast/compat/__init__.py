"""The signatures of other trainers over `sampling` and `ops`: change an import, keep the loop.

Nothing here imports those trainers.
"""

"""Tasks on top of a finished run, in the same folder."""

from influencespace.tasks.score import valued

__all__ = ["valued"]

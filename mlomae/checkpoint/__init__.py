"""Checkpoints that any number of ranks and any ZeRO stage can take over."""

from mlomae.checkpoint.checkpoint import Progress, finish_saving, latest, load, start_saving

__all__ = ["Progress", "finish_saving", "latest", "load", "start_saving"]

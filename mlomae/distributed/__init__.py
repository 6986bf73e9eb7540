"""Ranks: how they start, meet, agree and are watched."""

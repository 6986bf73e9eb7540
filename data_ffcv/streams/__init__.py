"""Batches for training and evaluation: settings, the two backends, streams and loaders."""

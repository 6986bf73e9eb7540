"""Semantic segmentation with UperNet."""

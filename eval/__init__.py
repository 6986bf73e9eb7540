"""Evaluation of a trained encoder: k-nearest neighbours and linear probe.

Each evaluation is a command (`python -m eval.knn`, `python -m eval.linear_probe`) and a function;
`python -m eval.compare` puts several encoders into one table.
"""

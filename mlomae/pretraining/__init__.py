"""Pretraining by MAE and MLO-MAE: recipe, program, task, losses."""

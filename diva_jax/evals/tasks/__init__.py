"""Evaluation tasks: each module here is one, found by its name."""

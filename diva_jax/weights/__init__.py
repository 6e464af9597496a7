"""Weights: two-way name tables, readers, writers, and the filling of a program from its sources."""

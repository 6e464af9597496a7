"""Objectives that the package does not have; tests copy this folder elsewhere and name them by dotted path."""

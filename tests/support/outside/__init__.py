"""Objectives outside of the package; tests copy this folder and select them by dotted path."""

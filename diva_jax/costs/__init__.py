"""Costs: FLOPs counted from a config, and what a compiled step costs on a chip."""

"""Costs: FLOPs counted in a traced program, and what a compiled step costs on a chip."""

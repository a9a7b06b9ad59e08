"""Image metrics: torch-fidelity's formulas and networks, and statistics that merge across workers."""

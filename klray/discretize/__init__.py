"""Time grids for sampling: from files now."""

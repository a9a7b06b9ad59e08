"""Time grids for sampling: learned, computed, kept in files, and the pool that learns them."""

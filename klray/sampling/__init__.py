"""Models to sample from, drawing images from them, and where the images go."""

"""klray: Karhunen-Loève diffusion experiments on Ray."""

__version__ = "0.1.0"

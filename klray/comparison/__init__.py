"""Comparing ways to train: what an arm is, what quality cost it, and which differences count."""

"""The data x basis mesh and random numbers that do not depend on it."""

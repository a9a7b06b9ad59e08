"""Search spaces: the YAML file of a study, read and checked whole before anything starts."""

from klray.space.parts import Objective
from klray.space.read import load_space
from klray.space.space import Space, Trial

__all__ = ["Objective", "Space", "Trial", "load_space"]

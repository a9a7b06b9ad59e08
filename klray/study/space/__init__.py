"""Search spaces: the YAML file of a study, read and checked whole before anything starts."""

from klray.study.space.parts import Objective
from klray.study.space.read import load_space
from klray.study.space.space import Space, Trial

__all__ = ["Objective", "Space", "Trial", "load_space"]

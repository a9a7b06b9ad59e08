"""Time grids for sampling: learned, computed, kept in files, and the pool that learns them."""

LEARNERS = {"ld3": "klray.schedules.learners:LD3_LEARNER", "adam": "klray.schedules.learners:ADAM_LEARNER"}

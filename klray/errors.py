"""What commands report in one line."""


class UserError(ValueError):
    """The user's to mend: one line that states the rule, the value and the way out. Commands exit with 2."""


class RunError(RuntimeError):
    """A run that started and failed: one line that says why. Commands exit with 1."""


class StoppedError(Exception):
    """A request to stop was granted: a checkpoint of the last step is on the disk."""

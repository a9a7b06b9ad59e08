"""The base of every error that is the user's to mend."""


class UserError(ValueError):
    """One line that states the rule, the value and the way out; commands print it and exit with 2."""

"""The one exception that means "the user can mend this": the command line prints it and exits with code 2."""


class InputError(ValueError):
    """One sentence: what was wrong, with the value, and what to do."""

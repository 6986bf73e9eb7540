"""UserError: bad input, shown to the user as one sentence."""


class UserError(ValueError):
    """Bad input: one sentence that names the file, key or flag and says how to fix it.

    Commands print it without a traceback and exit with code 2; it is raised before any
    expensive work starts.
    """

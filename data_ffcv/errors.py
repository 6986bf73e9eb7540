"""The one exception that bad data raises."""


class DataError(ValueError):
    """Bad data or data settings: one sentence that names the thing and says how to fix it."""

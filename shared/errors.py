"""The exceptions that cross the rooms of the house."""


class UserError(Exception):
    """Something the user can mend. `str(error)` is the one sentence shown: what came, what was expected,
    what to do.
    """


class QueueFull(UserError):
    """No further job is taken for now."""


class Cancelled(Exception):
    """The user asked for the work in progress to stop."""

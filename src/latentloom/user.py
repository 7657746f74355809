"""Who runs this."""

import getpass


def user_name() -> str | None:
    """The user's name; None where the user id has none, as in a container."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # as Python's versions have it
        return None

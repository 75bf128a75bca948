# SPDX-License-Identifier: Apache-2.0
"""The one exception type that stands for a mistake of the user, not of the program."""

__all__ = ["UserError"]


class UserError(Exception):
    """A setting, file or argument that the user has to change.

    The message is one sentence that names the setting or file, what was expected and what came. The
    command line prints it without a traceback and exits with code 2.
    """

# SPDX-License-Identifier: Apache-2.0
"""The exceptions the command line turns into one sentence."""

__all__ = ["SiteFailed", "UserError"]


class UserError(Exception):
    """A setting, file or argument that the user has to change.

    The message is one sentence that names the setting or file, what was expected and what came. The
    command line prints it without a traceback and exits with code 2.
    """


class SiteFailed(Exception):
    """A site ended before its work did; all others have been stopped.

    The message says which site and why. The command line prints it and exits with code 1.
    """

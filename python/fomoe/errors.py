# SPDX-License-Identifier: Apache-2.0
"""The exceptions the command line turns into one sentence."""

__all__ = ["CommunicationError", "SiteFailed", "UserError"]


class UserError(Exception):
    """A setting, file or argument that the user has to change.

    The message is one sentence that names the setting or file, what was expected and what came. The
    command line prints it without a traceback and exits with code 2.
    """


class CommunicationError(RuntimeError):
    """An exchange of tokens failed: the message names the ranks and the stage as far as known."""


class SiteFailed(Exception):
    """A site ended before its work did; all others have been stopped.

    ``sentence`` says which site and why; the message is this and the site's ``trace``, if any. The
    command line prints it and exits with code 1.
    """

    def __init__(self, sentence: str, trace: str = "") -> None:
        super().__init__(f"{sentence}\n{trace}" if trace else sentence)
        self.sentence = sentence
        self.trace = trace

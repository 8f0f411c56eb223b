"""The exceptions of the generator.

GenError                 anything the user can put right; the message says how
├── UsageError           a wrong argument on the command line (exit status 2)
└── TemplateFaultError        a fault in a template, shown with the template's lines
"""

from __future__ import annotations


class GenError(Exception):
    """Something the user can put right; the command line prints it without a traceback and exits with `status`."""

    status = 1


class UsageError(GenError):
    """A wrong argument on the command line."""

    status = 2


class TemplateFaultError(GenError):
    """A fault in a template; the message names the file and the line and shows the lines around it."""

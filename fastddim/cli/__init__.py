"""The command line: one module for each kind of command, and ``options`` for their options."""

from fastddim.cli.commands import app as app

"""The command line, a module for each kind of command. Options are declared in ``options``."""

from fastddim.cli.commands import app as app

"""The command line, a module for each kind of command. Options are declared in ``options``."""

from fastddim.cli.bars import bar_of_images as bar_of_images
from fastddim.cli.commands import app as app

"""`python -m reverie`: the command line."""

from reverie.cli import entry

entry()

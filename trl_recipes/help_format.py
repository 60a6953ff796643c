"""How the training commands print their `--help`."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter


class Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The text as it is written, and the defaults of all options."""

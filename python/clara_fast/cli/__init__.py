"""The command ``clara-fast``: the library from a shell, with ``--json`` for scripts.

Nothing here imports torch before a command needs it, so that ``--help`` answers at once.
"""

from clara_fast.cli.app import main

__all__ = ["main"]

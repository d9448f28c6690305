"""``python -m clara_fast``: the command line, as launchers of several processes start it."""

import sys

from clara_fast.cli import main

sys.exit(main())

"""``python -m clara_fast.cli``, as ``torchrun -m`` and ``accelerate launch -m`` need it."""

import sys

from clara_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

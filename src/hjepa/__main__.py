"""``python -m hjepa``, and so ``torchrun -m hjepa``."""

import sys

from hjepa.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m ebft``: the same as the command ``ebft``."""

import sys

from ebft.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m ebft.audit OUT``."""

import sys

from ebft.output.audit import main

if __name__ == "__main__":
    sys.exit(main())

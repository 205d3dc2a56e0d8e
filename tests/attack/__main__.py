"""``python -m tests.attack``: attacks runs, files and kernels. Exit code 0; 1: something did not survive.

python -m tests.attack                     # all attacks, with a new seed
python -m tests.attack kill --rounds 200   # one of them, more often
python -m tests.attack kill --seed 7 --case 31
python -m tests.attack --write             # and put the table into docs/reliability.md
"""

import os
import sys

# Read when torch and huggingface_hub are imported. A process that has threads cannot be forked.
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

from tests.attack.attacks import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))

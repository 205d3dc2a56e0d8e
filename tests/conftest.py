"""No test needs a network; none may wait for one."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each, and for the processes that its tests start
    os.environ["OMP_NUM_THREADS"] = "1"

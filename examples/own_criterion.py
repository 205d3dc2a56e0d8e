"""Prune with a criterion of your own, on text of your own, a model that is in memory; and recover it.

python examples/own_criterion.py my-model my-text.txt pruned
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft import EBFTConfig, run_ebft
from ebft.pruning import mask_of_best

folder, text, output = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


def relative(weight, inputs, pattern):
    """Weights that are large for their column, times the norm of what they multiply.

    Args:
        weight: float32 (outputs, inputs).
        inputs: statistics of the inputs.
        pattern: a share or N:M, which ``mask_of_best`` knows.

    Returns:
        bool (outputs, inputs), True = kept.
    """
    score = weight.abs() / weight.abs().mean(dim=0).clamp(min=1e-12) * inputs.norm()
    return mask_of_best(score, pattern, per_row=True)


documents = Path(text).read_text(encoding="utf-8").split("\n\n\n")
config = EBFTConfig.preset(
    "light", lr=0.01, holdout=0.0, sparsity=0.5, samples=16, seqlen=32, windows="packed", eval="none", output=output
)
result = run_ebft(model, config, tokenizer=tokenizer, criterion=relative, text=documents)
print(f"{result.summary['sparsity']:.1%} of the blocks' weights are zero in {output}, and in the model in memory")

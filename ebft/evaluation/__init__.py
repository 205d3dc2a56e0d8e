"""How good a model is: perplexity, divergence from another model, zero-shot tasks."""

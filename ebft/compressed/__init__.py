"""The compressed format: a pruned model without its zeros, made and loaded."""

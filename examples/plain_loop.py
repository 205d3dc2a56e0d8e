"""Tune a pruned model in a loop of your own: ``mask_linears_``, then ``MaskedAdamW`` or any other optimizer.

python examples/plain_loop.py ebft-output my-text.txt tuned
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import windows

from ebft_kernels import MaskedAdamW, load_masks, mask_linears_, save_masks

folder, text, output = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).to(device)

mask_linears_(model, load_masks(f"{folder}/masks.safetensors"))
optimizer = MaskedAdamW.for_module(model, lr=1e-4)  # survivors' states alone: compact=True

for batch in DataLoader(windows(tokenizer, text), batch_size=4, shuffle=True):
    loss = model(**{name: ids.to(device) for name, ids in batch.items()}).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.clip_grad_norm_(1.0)  # over kept weights
    optimizer.step()
print(f"loss of the last batch: {loss.item():.3f}")

model.save_pretrained(output)
tokenizer.save_pretrained(output)
save_masks(model, f"{output}/masks.safetensors")

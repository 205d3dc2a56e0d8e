"""Tune a pruned model on several processes with accelerate and FSDP2: mask first, shard afterwards.

torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py ebft-output my-text.txt tuned
"""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import windows

from ebft_kernels import load_masks, mask_linears_, save_masks

folder, text, output = sys.argv[1:]
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)

masks = load_masks(f"{folder}/masks.safetensors")
mask_linears_(model, masks)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
rows = DataLoader(windows(tokenizer, text), batch_size=4, shuffle=True)
model, optimizer, rows = accelerator.prepare(model, optimizer, rows)

for batch in rows:
    optimizer.zero_grad()
    accelerator.backward(model(**batch).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

state = accelerator.get_state_dict(model)  # whole, and zero where pruned
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)
    save_masks(masks, f"{output}/masks.safetensors")
accelerator.end_training()

"""Supervised fine-tuning of a pruned model with TRL; one callback keeps its zeros.

python examples/trl_sft.py ebft-output my-text.txt tuned
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ebft.integrations import KeepSparsity
from ebft_kernels import save_masks

folder, text, output = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
paragraphs = [{"text": paragraph} for paragraph in Path(text).read_text(encoding="utf-8").split("\n\n") if paragraph]

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        max_length=64,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=Dataset.from_list(paragraphs),
    processing_class=tokenizer,
    callbacks=[KeepSparsity(folder)],
)
trainer.train()

trainer.save_model(output)
tokenizer.save_pretrained(output)
save_masks(model, f"{output}/masks.safetensors")

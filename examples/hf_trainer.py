"""Tune a pruned model with transformers' Trainer; one callback keeps its zeros.

python examples/hf_trainer.py ebft-output my-text.txt tuned
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from windows import windows

from ebft.integrations import KeepSparsity
from ebft_kernels import save_masks

folder, text, output = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-4, save_strategy="no", report_to=[]
    ),
    train_dataset=windows(tokenizer, text),
    callbacks=[KeepSparsity(folder)],
)
trainer.train()

trainer.save_model(output)
tokenizer.save_pretrained(output)
save_masks(model, f"{output}/masks.safetensors")

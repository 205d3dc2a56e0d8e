"""Tune adapters on a pruned model with peft, and merge them: what falls on pruned weights is dropped in the merge.

    python examples/peft_merge.py ebft-output my-text.txt tuned

The sum of a sparse weight and an adapter is dense; the merged layer keeps it where the mask does. So measure the merged
model, not the adapted one. (``ebft run --recover lora`` tunes adapters under the mask, and loses nothing in the merge.)
"""

import sys

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from windows import windows

from ebft.integrations import KeepSparsity
from ebft_kernels import save_masks

folder, text, output = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

trainer = Trainer(
    model=adapted,
    args=TrainingArguments(
        output, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no", report_to=[]
    ),
    train_dataset=windows(tokenizer, text),
    callbacks=[KeepSparsity(folder)],
)
trainer.train()

merged = adapted.merge_and_unload()
merged.save_pretrained(output)
tokenizer.save_pretrained(output)
save_masks(merged, f"{output}/masks.safetensors")

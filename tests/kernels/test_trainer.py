"""MaskedLinear and MaskedAdamW inside a Hugging Face Trainer."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ebft_kernels import MaskedAdamW, PackedMask, mask_linears_
from ebft_kernels.testing import assert_exact_zeros


def test_trainer_keeps_the_mask_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=False, **sizes))
    masks = {
        f"{path}.weight": PackedMask.from_scores(layer.weight.abs(), 2, 4)
        for path, layer in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(layer, nn.Linear)
    }
    mask_linears_(model, masks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(64, (16, 12))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, save_steps=3, report_to=[], use_cpu=True,
        max_grad_norm=1.0, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip

    def make_trainer():
        optimizer = MaskedAdamW.for_module(model, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
        return Trainer(model=model, args=settings, train_dataset=rows, optimizers=(optimizer, schedule))

    make_trainer().train()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert after.keys() == before.keys()
    for name, mask in masks.items():
        assert_exact_zeros(after[name], mask.dense(), name)
        assert not torch.equal(after[name], before[name])
        assert (after[name][mask.dense()] != 0).all()

    make_trainer().train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )  # steps 4 to 6 again, from the saved state
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), after[name], rtol=1e-6, atol=1e-7)
        if name in masks:
            assert_exact_zeros(parameter, masks[name].dense(), name)

"""peft, TRL, accelerate and Lightning on masked models: what they train, merge, offload and save stays masked."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from twins import VOCABULARY, batches, check, llama, make_twins, outputs, token_rows

from ebft_kernels import MaskedAdamW, MaskedLinear


def trained(model: nn.Module, folder, trainer=Trainer, settings=TrainingArguments, **more) -> nn.Module:
    """Three steps; both twins see the same rows in the same order."""
    arguments = settings(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, logging_steps=100, bf16=False,
    )  # fmt: skip
    made = trainer(model=model, args=arguments, train_dataset=more.pop("rows", None) or token_rows(), **more)
    made.train()
    return made.model


# --- peft -----------------------------------------------------------------------------------------------------------


def with_adapters(model: nn.Module, **settings) -> nn.Module:
    import peft

    torch.manual_seed(7)
    kind = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], **settings)
    return peft.get_peft_model(model, kind)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_peft_trains_and_merges(settings, tmp_path):
    """The merged weight is the sum, where it is kept: adapters are dense, a masked layer has no room for the rest."""
    twins = make_twins(llama)
    adapted = [trained(with_adapters(model, **settings), tmp_path) for model in (twins.masked, twins.plain)]
    torch.testing.assert_close(outputs(adapted[0]), outputs(adapted[1]), rtol=1e-4, atol=1e-5)
    merged = [model.merge_and_unload() for model in adapted]
    assert any(type(layer) is MaskedLinear for layer in merged[0].modules())
    assert (merged[1].model.layers[0].self_attn.q_proj.weight[~twins.masks[Q_PROJ]] != 0).any()
    check(twins, *merged)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_peft_merges_and_unmerges(tmp_path):
    """Merging and taking back leaves the weights as they were, to rounding."""
    twins = make_twins(llama)
    before = twins.masked.state_dict()[Q_PROJ].clone()
    adapted = trained(with_adapters(twins.masked), tmp_path)
    adapted.merge_adapter()
    outputs(adapted)
    adapted.unmerge_adapter()
    kept = twins.masks[Q_PROJ]
    after = adapted.unload().state_dict()[Q_PROJ]
    torch.testing.assert_close(after[kept], before[kept])
    assert (after[~kept] == 0).all()


# --- TRL ------------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{n}": n for n in range(VOCABULARY - 2)} | {"<pad>": VOCABULARY - 2, "<eos>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="w0")


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_trl_sft(adapters, tmp_path):
    """All weights, or LoRA that is merged afterwards."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in token_rows()])
    twins = make_twins(llama)
    ended = []
    for model in (twins.masked, twins.plain):
        model = with_adapters(model) if adapters else model
        model = trained(model, tmp_path, SFTTrainer, SFTConfig, rows=rows, processing_class=tokenizer())
        ended.append(model.merge_and_unload() if adapters else model)
    check(twins, *ended, rtol=1e-4, atol=1e-5)


# --- accelerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [False, True])
def test_accelerate(ours, tmp_path):
    """Prepared, trained, saved and read back, by torch's AdamW or ours."""
    from accelerate import Accelerator

    twins = make_twins()
    for model in (twins.masked, twins.plain):
        accelerator = Accelerator(cpu=True)
        masked = ours and model is twins.masked
        optimizer = MaskedAdamW.for_module(model, lr=1e-2) if masked else torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = DataLoader(batches(4), batch_size=None)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for step, (x, y) in enumerate(loader):
            if step == 2:  # one step too many, and back
                accelerator.load_state(str(tmp_path / "state"))
            optimizer.zero_grad()
            accelerator.backward((prepared(x) - y).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step == 0:
                accelerator.save_state(str(tmp_path / "state"))
        accelerator.free_memory()
    check(twins, rtol=1e-4, atol=1e-6)


def test_accelerate_offload():
    """Weights that are on the meta device between calls; what is written to the stored ones stays masked."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    twins = make_twins()
    stored = {name: value.clone() for name, value in twins.masked.state_dict().items()}
    for name, mask in twins.masks.items():
        stored[name][~mask] = 1.0
    cpu_offload(twins.masked, execution_device=torch.device("cpu"), state_dict=stored)
    assert twins.masked[0]._parameters["weight"].is_meta
    torch.testing.assert_close(outputs_of(twins.masked), outputs_of(twins.plain))
    remove_hook_from_submodules(twins.masked)
    check(twins)


def outputs_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batches(1)[0][0])


# --- Lightning ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
def test_lightning(ours, tmp_path):
    """Trained, and read back from Lightning's own checkpoint."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            x, y = batch
            return (self.model(x) - y).square().mean()

        def configure_optimizers(self):
            if ours and type(self.model[0]) is MaskedLinear:
                return MaskedAdamW.for_module(self.model, lr=1e-2)
            return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    twins = make_twins()
    for model in (twins.masked, twins.plain):
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module = Module(model)
        trainer.fit(module, DataLoader(batches(4), batch_size=None))
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        read = torch.load(tmp_path / "saved.ckpt", weights_only=True)
        module.load_state_dict(read["state_dict"])
    check(twins, rtol=1e-4, atol=1e-6)

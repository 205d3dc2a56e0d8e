"""Every family of decoders: our walk gives the model's own logits, and the whole job runs."""

import pytest
import torch
import transformers
from conftest import FAMILIES, VOCABULARY, random_model

from ebft import run_ebft
from ebft.model.decoder import Decoder
from ebft.model.matrices import find_matrices, router_paths

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_gives_the_models_own_logits(family):
    model = random_model(family)
    decoder = Decoder(model, CPU)
    ids = torch.randint(VOCABULARY, (3, 20))
    hidden = decoder.enter(ids)
    for index in range(len(decoder)):
        hidden = decoder.run_block(index, decoder.working_block(index), hidden)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(decoder.exit(ids, hidden), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_products_in_every_family(family, config, silent, tokenizer):
    """As on a GPU: bfloat16 checkpoint, bfloat16 products, float32 tuning."""
    model = random_model(family).to(torch.bfloat16)
    settings = config(sparsity=0.5, dtype="bfloat16", epochs=1, samples=4)
    result = run_ebft(model, settings, tokenizer=tokenizer, reporter=silent)
    for line in result.blocks:
        assert line["loss_after"] < line["loss_before"], line["name"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_job(family, config, silent, tokenizer):
    model = random_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = run_ebft(model, config(sparsity=0.5, eval="builtin"), tokenizer=tokenizer, reporter=silent)

    saved = transformers.AutoModelForCausalLM.from_pretrained(result.output)
    after = dict(saved.named_parameters())
    assert after.keys() == before.keys()
    in_blocks = {f"{name}." for name in Decoder(model, CPU).names}
    matrices = 0
    for name, parameter in after.items():
        if name in result.masks:
            kept = result.masks[name].dense()
            assert torch.count_nonzero(parameter[~kept]) == 0, name
            assert kept.float().mean().item() == pytest.approx(0.5, abs=0.03), name
            assert not torch.equal(parameter[kept], before[name][kept]), name
            matrices += 1
        elif not any(name.startswith(block) for block in in_blocks):
            assert torch.equal(parameter, before[name]), name  # embeddings, final norm, head
        elif "gate.weight" in name or "router" in name:
            assert torch.equal(parameter, before[name]), name
    assert matrices == sum(len(find_matrices(block)) for block in model.get_submodule(Decoder(model, CPU)._path))
    assert matrices >= 3 * 4
    for line in result.blocks:
        assert line["loss_after"] < line["loss_before"], line["name"]
    assert result.summary["sparsity"] == pytest.approx(0.5, abs=0.03)


def test_routers_and_experts_are_told_apart():
    block = random_model("qwen2-moe").model.layers[0]
    names = {matrix.name: matrix for matrix in find_matrices(block)}
    assert router_paths(block) == {"mlp.gate", "mlp.shared_expert_gate"}
    assert not any(name.startswith(("mlp.gate.", "mlp.shared_expert_gate")) for name in names)
    fused = names["mlp.experts.gate_up_proj"]
    assert (fused.experts, fused.outputs, fused.inputs, fused.transposed) == (4, 48, 32, False)
    assert names["mlp.shared_expert.down_proj.weight"].experts == 1


def test_an_expert_that_saw_no_tokens_falls_back_to_magnitude(config, silent, tokenizer):
    model = random_model("mixtral", num_local_experts=8)  # two tokens go to two experts each: four see none
    settings = config(samples=1, seqlen=2, batch_size=1, recover="none")
    result = run_ebft(model, settings, tokenizer=tokenizer, reporter=silent)
    notes = [note for line in result.blocks for note in line["notes"]]
    assert any("saw no tokens and fell back to magnitude" in note for note in notes)
    for mask in result.masks.values():
        assert mask.density() == pytest.approx(0.4, abs=0.03)


def test_statistics_are_kept_per_expert():
    from ebft.pruning.statistics import InputObserver

    model = random_model("mixtral")
    decoder = Decoder(model, CPU)
    block, hidden = decoder.working_block(0), torch.randn(2, 9, 32)
    observer = InputObserver(block, decoder.matrices[0])
    with observer.watching(), torch.no_grad():
        decoder.run_block(0, block, hidden)
    tokens = [s.tokens for s in observer.statistics["mlp.experts.gate_up_proj"]]
    assert sum(tokens) == 2 * 9 * 2  # each token goes to two experts
    assert len(set(tokens)) > 1
    assert [s.tokens for s in observer.statistics["self_attn.q_proj.weight"]] == [18]
    expected = block.input_layernorm(hidden).reshape(-1, 32).square().sum(0)
    torch.testing.assert_close(observer.statistics["self_attn.q_proj.weight"][0].squares, expected)

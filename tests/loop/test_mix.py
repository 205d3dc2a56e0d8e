"""--input mix: some samples of the dense stream, the others of the sparse one."""

import pytest
import torch
from conftest import random_model
from faults import assert_same, stopped_at_pass

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.data.streams import Store, Streams, dense_samples
from ebft.model.decoder import Decoder
from ebft.plan.planner import make_plan

CPU = torch.device("cpu")


def test_samples_are_a_function_of_seed_and_block():
    config = EBFTConfig.of(input="mix", target="dense-stream", mix=0.3, samples=50)
    chosen = dense_samples(config, 1)
    assert chosen.sum() == 15
    assert torch.equal(chosen, dense_samples(config, 1))
    assert not torch.equal(chosen, dense_samples(config, 2))


def test_inputs_are_of_both_streams(config):
    """Against the two streams walked alone, for three blocks; a rank has its part of the same choice."""
    dense, sparse = (Decoder(random_model("llama-gqa"), CPU) for _ in range(2))
    with torch.no_grad():
        for parameter in sparse.model.model.layers.parameters():
            parameter.mul_(0.5)
    ids = torch.randint(512, (8, 6), generator=torch.Generator().manual_seed(1))
    settings = config(input="mix", target="dense-stream", batch_size=3)
    streams = [
        Streams(settings, sparse, dense, ids[share], Store(CPU), share=share) for share in (slice(8), slice(3, 8))
    ]
    hidden = {decoder: decoder.enter(ids) for decoder in (dense, sparse)}
    for index in range(3):
        chosen = dense_samples(settings, index)
        wanted = torch.where(chosen[:, None, None], hidden[dense], hidden[sparse])
        hidden = {d: d.run_block(index, d.working_block(index), states) for d, states in hidden.items()}
        assert 0 < chosen.sum() < 8
        for stream, share in zip(streams, (slice(8), slice(3, 8)), strict=True):
            torch.testing.assert_close(stream.inputs.states, wanted[share], rtol=1e-4, atol=1e-5)
            stream.dense_pass(lambda x, index=index: dense.run_block(index, dense.working_block(index), x))
            torch.testing.assert_close(stream.targets.states, hidden[dense][share], rtol=1e-4, atol=1e-5)
            stream.sparse_pass(lambda x, index=index: sparse.run_block(index, sparse.working_block(index), x))


@pytest.mark.parametrize(("mix", "same"), [(0.0, "sparse-stream"), (1.0, "dense-stream")])
def test_its_ends_are_the_streams(mix, same, short_run, silent, tmp_path):
    for name, given in (("mixed", {"input": "mix", "mix": mix}), ("plain", {"input": same})):
        settings = EBFTConfig.of(**short_run(name, target="dense-stream", prune="magnitude", eval="", **given))
        run_ebft(config=settings, reporter=silent)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mixed", "plain")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("streams", ["host", "disk"])
def test_a_run_is_gone_on_with(streams, short_run, silent, tmp_path):
    given = {"input": "mix", "target": "dense-stream", "streams": streams, "recover": "layerwise+ebft"}
    whole = run_ebft(config=EBFTConfig.of(**short_run("whole", **given)), reporter=silent)
    assert all(line["loss_after"] < line["loss_before"] for line in whole.blocks)

    with stopped_at_pass(3):
        run_ebft(config=EBFTConfig.of(**short_run(**given)), reporter=silent)
    run_ebft(config=EBFTConfig.of(**short_run(**given, resume=True)), reporter=silent)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_what_it_needs(short_run):
    with pytest.raises(EBFTError, match=r"--input mix aims at one target .* expected --target dense-stream"):
        EBFTConfig.of(input="mix")
    with pytest.raises(EBFTError, match=r"--mix is 1\.5; expected a share from 0 to 1"):
        EBFTConfig.of(mix=1.5)
    plans = [
        make_plan(EBFTConfig.of(**short_run(input=which, target="dense-stream", eval="")))
        for which in ("sparse-stream", "mix")
    ]
    assert plans[1].host["streams"] == 1.5 * plans[0].host["streams"]

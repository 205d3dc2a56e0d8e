"""``--plan``: what a run needs, before anything is loaded; and the settings that fit a budget."""

import json
import re

import pytest
import torch
from conftest import random_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from ebft import BlockReconstructor, EBFTError
from ebft.config import EBFTConfig
from ebft.data.streams import Store
from ebft.distributed import Ranks
from ebft.model.decoder import Decoder
from ebft.model.device import choose_device
from ebft.plan.data_sheets import DEVICES, SHARE
from ebft.plan.plan import flags
from ebft.plan.planner import CONTEXT, fit_to_budget, make_plan
from ebft.pruning import Pattern
from ebft.pruning.protocol import MASK_BYTES
from ebft.pruning.statistics import InputStatistics
from ebft.pruning.wanda import Wanda
from ebft.recovery.distill import Distillation
from ebft.recovery.distill.predictions import Predictions
from ebft.recovery.distill.stack import Stack
from ebft.recovery.distill.tune import _blocks
from ebft.recovery.optimizers.adamw import AdamW
from ebft.recovery.whole_model import WholeTask
from ebft.run import main
from ebft_kernels import PackedMask, use_impl

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    """A folder that holds the configuration of LlamaV1-7B and no weights."""
    folder = tmp_path_factory.mktemp("llama-7b")
    LlamaConfig(dtype="float16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)  # the class's defaults
    return str(folder)


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    """The same with two blocks, where their number does not matter."""
    folder = tmp_path_factory.mktemp("llama-7b-short")
    LlamaConfig(dtype="float16", num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def test_the_rows_of_llama_7b_are_those_of_the_paper(configuration):
    plan = make_plan(EBFTConfig.of(model=configuration, device="cpu"))
    weights = 202_383_360  # of a block: four 4096 x 4096, three 4096 x 11008, two norms
    assert plan.device["weights"] == 4 * weights
    assert plan.device["optimizer states"] == pytest.approx(8.125 * weights, rel=1e-3)  # two moments and the mask
    assert 0 < plan.device["gradients"] <= 4 * weights  # at the peak, which comes before the last gradient
    tokens = 256 * 1024
    training, forward = 1.14e9 * tokens * 10, 0.41e9 * tokens * (2 + 11 / 16)  # PAPER.md's FLOPs a token and block
    assert plan.flops == pytest.approx(32 * (training + forward), rel=0.06)
    assert plan.host["streams"] == 2 * tokens * 4096 * 4
    assert plan.disk["model"] == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert plan.host_peak == sum(plan.host.values()) + plan.device_peak  # on a CPU they are one memory


def test_the_command_prints_a_plan_and_loads_nothing(two_blocks, capsys, tmp_path):
    assert main(["--model", two_blocks, "--plan", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for row in ("weights", "gradients", "optimizer states", "activations", "streams", "disk", "TFLOP"):
        assert re.search(rf"\b{row}\b.*\d|{row}: \d|\d {row}", said), row
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral", "gemma3"])
def test_a_plan_for_other_families(family, tmp_path):
    random_model(family).config.save_pretrained(tmp_path)
    small = {"samples": 4, "seqlen": 16, "epochs": 1, "batch_size": 2, "eval": ""}
    plan = make_plan(EBFTConfig.of(model=str(tmp_path), device="cpu", **small))
    assert plan.device["weights"] > 0
    assert plan.flops > 0
    assert "plan for" in str(plan)
    leanest = make_plan(EBFTConfig.of(model=str(tmp_path), gpu_memory="1MiB", **small), "h100")
    assert leanest.faults
    assert leanest.chosen["weights"] == "stochastic"
    assert ("recompute" in leanest.chosen) == (family != "opt")


def test_the_plan_of_the_default_model(capsys):
    assert main(["--plan"]) == 0
    said = capsys.readouterr().out
    assert "plan for SmolLM2-135M-Instruct" in said
    blocks = 3_540_096 * 4 / 2**30  # bytes of a block's float32 weights
    weights = float(re.search(r"weights +([\d.]+) GiB", said)[1])
    assert weights == pytest.approx(blocks, abs=1e-3)


def test_lengths_are_checked_in_a_plan_too(two_blocks, capsys):
    assert main(["--model", two_blocks, "--plan", "--seqlen", "5000"]) == 2
    assert "--seqlen is 5000; expected at most 2048" in capsys.readouterr().err


def test_the_paper_plan_has_more_of_everything_than_the_demo(configuration):
    paper = make_plan(EBFTConfig.of(model=configuration, device="cpu"))
    small = make_plan(EBFTConfig.of(model=configuration, device="cpu", samples=8, seqlen=64, batch_size=2))
    assert paper.flops > 10 * small.flops
    assert paper.device["activations"] > 10 * small.device["activations"]
    assert paper.device["weights"] == small.device["weights"]
    assert torch.get_default_dtype() == torch.float32


# --- against what is really allocated -------------------------------------------------------------------------------


def allocated_at_most(work, tmp_path):
    """Bytes that ``work`` has at most at a time, by the allocation events of torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], -e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = most = 0
    for _, negative in changes:
        now -= negative
        most = max(most, now)
    return most


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with blocks of 0.8 M parameters, saved with its weights."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64, max_position_embeddings=256, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


LEAN = {"weights": "stochastic", "moments": "int8", "compact": True, "recompute": "halves"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch": 1},
        {"recompute": "halves"},
        {"recompute": "block", "micro_batch": 2},
        {"compact": True, "seqlen": 16},
        {"moments": "int8", "compact": True, "seqlen": 16},
        {"clip": 0.0, "update_in_backward": True, "seqlen": 16},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param(
            {"dtype": "bfloat16", "weights": "master", "moments": "bf16", "micro_batch": 4}, marks=pytest.mark.slow
        ),
        {"dtype": "bfloat16", **LEAN, "micro_batch": 2, "seqlen": 16},
    ],
    ids=lambda changes: flags(changes) or "as it is",
)
def test_a_step_allocates_what_was_planned(changes, folder, tmp_path):
    """Within a tenth, weights and first step included, whatever makes up the peak: activations or states."""
    settings = {"batch_size": 8, "samples": 8, "seqlen": 128, "eval": "", "device": "cpu", "sparsity": 0.5, **changes}
    config = EBFTConfig.of(model=str(folder), **settings)
    planned = sum(make_plan(config).device.values())
    compute = getattr(torch, config.runtime.dtype) if config.runtime.dtype != "auto" else torch.float32
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(folder), CPU, compute)
    inputs = torch.randn(8, config.data.seqlen, 256)
    decoder.call_for(0, config.recover.micro_batch or 8, config.data.seqlen)

    def work():
        block = decoder.working_block(0)
        masks = {
            m.name: PackedMask.from_topk(torch.rand(m.outputs, m.inputs), m.inputs // 2) for m in decoder.matrices[0]
        }
        x, y = inputs.clone(), inputs.clone()
        reconstructor = BlockReconstructor(config, CPU, compute)
        with reconstructor.prepared(block, masks, lambda block, hidden: decoder.run_block(0, block, hidden)) as tuning:
            for _ in range(2):
                reconstructor.step(tuning, x, y)

    assert planned == pytest.approx(allocated_at_most(work, tmp_path), rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"distill_blocks": "host", "micro_batch": 2, "dtype": "bfloat16"}, marks=pytest.mark.slow),
        {"distill_blocks": "host", "micro_batch": 1, "moments": "int8", "compact": True, "seqlen": 16},
    ],
    ids=lambda changes: flags(changes) or "as it is",
)
def test_a_step_of_distillation_allocates_what_was_planned(changes, tmp_path):
    """Within a tenth, blocks and what is on the host included, for a CPU has them in one memory."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=512, max_position_embeddings=256, pad_token_id=0)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path)
    settings = {"batch_size": 8, "samples": 8, "seqlen": 128, "eval": "", "device": "cpu", "sparsity": 0.5, **changes}
    config = EBFTConfig.of(model=str(tmp_path), recover="distill", **settings)
    plan, seqlen = make_plan(config), config.data.seqlen
    away = plan.host.get("weights and states of all blocks", 0)
    planned = sum(plan.device.values()) + away
    if "hidden states at the borders" not in plan.device:
        planned += 5 * 8 * seqlen * 256 * 4
    compute = getattr(torch, config.runtime.dtype) if config.runtime.dtype != "auto" else torch.float32
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(tmp_path), CPU, compute)
    decoder.call_for(0, config.recover.at_once, seqlen)
    masks = {
        f"{name}.{m.name}": PackedMask.from_topk(torch.rand(m.outputs, m.inputs), m.inputs // 2)
        for name, matrices in zip(decoder.names, decoder.matrices, strict=True)
        for m in matrices
    }
    own = config.of_method(Distillation.Settings)
    tokens = torch.randint(512, (8, seqlen))
    predictions = Predictions(
        torch.zeros(8, seqlen - 1, own.distill_top, dtype=torch.int32), torch.full((8, seqlen - 1, 65), -4.2).half()
    )

    def work():
        task = WholeTask(decoder, decoder, lambda _: None, masks, tokens, Store(CPU), Ranks(), lambda _: None)
        blocks, again = _blocks(task, config, own), own.recompute != "none"
        stack = Stack(decoder, blocks, tokens, predictions, config.recover.at_once, Ranks(), 1.0, again, Store(CPU))
        with stack.in_place():
            for _ in range(2):
                stack.step(torch.arange(8), 1e-3, 0.5)

    assert planned == pytest.approx(allocated_at_most(work, tmp_path), rel=0.1)


def test_making_a_mask_allocates_what_was_planned(tmp_path):
    weight, inputs = torch.randn(512, 1024), InputStatistics(1, torch.rand(1024))
    with use_impl("torch"):
        most = allocated_at_most(lambda: Wanda().mask(weight, inputs, Pattern(0.5)), tmp_path)
    assert most <= MASK_BYTES * weight.numel() <= 1.3 * most


def test_work_of_distillation(two_blocks):
    """The dense model's pass, two epochs of three passes' worth, another where activations are made again."""
    small = {"model": two_blocks, "device": "cpu", "recover": "distill", "samples": 64, "eval": "", "seqlen": 64}
    walk = make_plan(EBFTConfig.of(**{**small, "recover": "none", "prune": "wanda"})).flops
    held, streamed = (make_plan(EBFTConfig.of(**small, distill_blocks=where)).flops for where in ("device", "host"))
    head = 32000 * 4096  # which has no gradients
    weights = 2 * 202_375_168 + head
    forward = 2 * weights * 64 * 64
    validation = 3 / 8
    assert held - walk == pytest.approx(forward * (1 + validation + 2 * 7 / 8 * (3 - head / weights)), rel=0.02)
    blocks_again = forward * (1 - head / weights)
    assert streamed - held == pytest.approx(2 * 7 / 8 * blocks_again, rel=0.02)


# --- budgets --------------------------------------------------------------------------------------------------------


def test_7b_fits_4_gib_and_8_gib_of_host_memory(configuration):
    config = EBFTConfig.of(model=configuration, gpu_memory="4GiB", host_memory="8GiB")
    plan = make_plan(config, "a100")
    assert plan.faults == []
    assert plan.device_peak <= 4 * GIB
    assert plan.host_peak <= 8 * GIB
    assert plan.chosen["streams"] == "disk"
    assert plan.config == config.replace(**plan.chosen)


def test_7b_runs_at_full_speed_in_6_gib(configuration):
    """8 x 1024 tokens at once, nothing recomputed, moments in float32."""
    plan = make_plan(EBFTConfig.of(model=configuration, gpu_memory="6GiB"), "a100")
    assert plan.faults == []
    assert plan.device_peak <= 6 * GIB
    assert plan.chosen.keys() <= {"streams", "compact", "weights"}
    assert plan.chosen.get("weights", "fp32") in ("fp32", "master")
    assert list(plan.seconds) == [f"a100 at {SHARE:.0%} of its rate"]
    assert plan.seconds.popitem()[1] == plan.flops / (SHARE * DEVICES["a100"].rate)


def test_more_memory_never_costs_speed(two_blocks):
    """A larger budget gives a plan with fewer settings changed."""
    small = {"model": two_blocks, "eval": "", "prune": "magnitude", "batch_size": 4}
    chosen = [make_plan(EBFTConfig.of(gpu_memory=size, **small), "a100").chosen for size in ("3.5GiB", "4GiB", "40GiB")]
    assert len(chosen[0]) > len(chosen[1]) > len(chosen[2])
    assert chosen[2] == {"streams": "device"}


def test_a_plan_where_nothing_is_kept_in_streams(two_blocks):
    """Where they would be is nothing that could be chosen."""
    config = EBFTConfig.of(model=two_blocks, prune="magnitude", recover="none", eval="", host_memory="12GiB")
    assert make_plan(config).chosen == {}


def test_what_cannot_fit_is_said(two_blocks, capsys):
    argv = ["--model", two_blocks, "--plan", "--gpu-memory", "1GiB"]
    assert main(argv) == 2
    said = capsys.readouterr().out
    assert re.search(
        r"it does not fit: [\d.]+ GiB is needed with the leanest settings, and --gpu-memory is 1.000 GiB", said
    )
    if not torch.cuda.is_available():  # then the time is told for those that are known
        assert f"h100 at {SHARE:.0%}" in said
    assert main([*argv[:-1], "4GiB", "--host-memory", "1GiB"]) == 2
    assert "--host-memory is 1.000 GiB" in capsys.readouterr().out


def test_a_step_without_gradients_is_the_last_resort(two_blocks):
    """Where clipping is off, and only then; its micro-batch is the whole batch."""
    tight = {"model": two_blocks, "gpu_memory": "1MiB", "eval": "", "batch_size": 1}
    with_norm, without = (make_plan(EBFTConfig.of(**tight, clip=clip), "a100") for clip in (1.0, 0.0))
    assert "update_in_backward" not in with_norm.chosen
    assert without.chosen["update_in_backward"]
    assert without.device["gradients"] < 0.01 * with_norm.device["gradients"]


def test_a_distillation_that_fits(two_blocks):
    """Held where there is room; streamed where there is not, and then in small parts."""
    small = {"model": two_blocks, "eval": "", "recover": "distill", "samples": 64, "prune": "magnitude"}
    held, streamed = (make_plan(EBFTConfig.of(gpu_memory=size, **small), "a100") for size in ("16GiB", "7GiB"))
    assert held.faults == streamed.faults == []
    assert held.chosen == {"streams": "device"}
    assert held.traffic == []
    assert streamed.chosen == {"streams": "host", "distill_blocks": "host", "compact": True, "micro_batch": 4}
    assert streamed.device_peak <= 7 * GIB
    weights, states = 2 * 202_383_360, 0.3 * 8 + 1 / 8  # of survivors alone, and a mask
    said = re.search(r"in each of 14 steps: ([\d.]+) GiB each way", "\n".join(streamed.traffic))
    assert float(said[1]) * GIB == pytest.approx((8 + states) * weights, rel=1e-2)
    assert streamed.host["weights and states of all blocks"] >= (4 + states) * weights
    assert "work hides it from --batch-size" in str(streamed)


def test_a_named_gpu_is_a_budget(two_blocks):
    t4, h200 = (make_plan(EBFTConfig.of(model=two_blocks, samples=1024), name) for name in ("t4", "h200"))
    assert t4.faults == h200.faults == []
    assert t4.chosen["streams"] == "host"
    assert h200.chosen == {"streams": "device"}
    assert t4.device_peak <= DEVICES["t4"].memory
    assert "weights" not in t4.chosen  # its products are in float16


def test_a_budget_on_a_cpu_is_of_all_memory(two_blocks):
    plan = make_plan(EBFTConfig.of(model=two_blocks, device="cpu", host_memory="12GiB"))
    assert plan.faults == []
    assert plan.host_peak <= 12 * GIB
    assert plan.chosen["streams"] == "disk"


def test_a_gpu_is_named_by_its_number(monkeypatch):
    """As tensors name theirs; torch caps no allocator of a device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for given, chosen in (("auto", "cuda:2"), ("cuda", "cuda:2"), ("cuda:3", "cuda:3"), ("cpu", "cpu")):
        assert choose_device(given, "bfloat16") == (torch.device(chosen), torch.bfloat16)


def test_a_run_takes_the_settings_and_caps_the_allocator(two_blocks, monkeypatch):
    """With a GPU that is only pretended: what is asked of torch is noted."""
    fractions, said = [], []
    monkeypatch.setattr("ebft.plan.planner.choose_device", lambda *_: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr("ebft.plan.planner._matmul_rate", lambda *_: 1e15)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    config = EBFTConfig.of(model=two_blocks, gpu_memory="4GiB", eval="")
    fitted = fit_to_budget(config, None, said.append)
    assert fitted.of_method(AdamW.Settings).compact
    assert fitted.of_method(AdamW.Settings).weights == "master"
    assert fitted.runtime.streams == "host"
    assert fractions == [(4 * GIB - CONTEXT) / (16 * GIB)]
    assert said[0].startswith("--gpu-memory 4GiB: --")
    with pytest.raises(EBFTError, match=r"is needed with the leanest settings, and --gpu-memory is 1\.000 GiB"):
        fit_to_budget(config.replace(gpu_memory="1GiB"), None, said.append)
    assert fit_to_budget(config.replace(gpu_memory=None), None, said.append) == config.replace(gpu_memory=None)


def test_a_configuration_that_does_not_run_is_a_sentence(tmp_path):
    config = random_model("llama-gqa").config
    config.num_key_value_heads = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(EBFTError, match=r"does not run as its config\.json has it: ") as error:
        make_plan(EBFTConfig.of(model=str(tmp_path), device="cpu", samples=4, seqlen=16, eval_seqlen=32))
    assert "\n" not in str(error.value)

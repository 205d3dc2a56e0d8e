"""Products are seen wherever a block makes them, and say how its weights are stored."""

import pytest
import torch
import transformers
from conftest import VOCABULARY, random_model
from torch import nn
from torch.nn import functional as F

from ebft import EBFTError
from ebft.model.decoder import Decoder
from ebft.model.matrices import Matrix, find_matrices, left_dense, router_paths
from ebft.pruning.statistics import InputObserver

N, IN, OUT, EXPERTS = 5, 16, 8, 3  # sizes that grouped products take
# how a product is made of x (N, IN) and a weight -> how the weight is stored
PLAIN = {
    "linear": (lambda x, w: F.linear(input=x, weight=w), False),
    "matmul": (lambda x, w: torch.matmul(x, w.T), False),
    "a weight on the left": (lambda x, w: (w @ x.T).T, False),
    "Conv1D": (lambda x, w: torch.addmm(torch.zeros(OUT), x, w), True),
    "mm": (lambda x, w: torch.mm(x, mat2=w), True),
    "einsum": (lambda x, w: torch.einsum("np, pd -> nd", x, w), True),
    "einsum on the left": (lambda x, w: torch.einsum("dp,np->nd", w, x), False),
}


@pytest.mark.parametrize("made", PLAIN)
def test_every_product_is_seen_and_proves_its_orientation(made):
    product, transposed = PLAIN[made]
    block, x = nn.Module(), torch.randn(N, IN)
    block.weight = nn.Parameter(torch.randn((IN, OUT) if transposed else (OUT, IN)))
    observer = InputObserver(block, [Matrix("weight", OUT, IN, 1, transposed)])
    with observer.watching():
        product(x, block.weight)
    (seen,) = observer.statistics["weight"]
    assert seen.tokens == N
    torch.testing.assert_close(seen.squares, x.square().sum(0))

    square = nn.Module()
    square.weight = nn.Parameter(torch.randn(IN, IN))
    wrong = InputObserver(square, [Matrix("weight", IN, IN, 1, not transposed)])
    with pytest.raises(EBFTError, match="weight is multiplied as"), wrong.watching():
        product(x, square.weight) if made != "Conv1D" else torch.addmm(torch.zeros(IN), x, square.weight)


@pytest.mark.parametrize("made", ["bmm", "baddbmm", "matmul", "grouped_mm"])
def test_every_expert_of_a_product_of_all_is_seen(made):
    block, x = nn.Module(), torch.randn(EXPERTS, N, IN)
    block.weight = nn.Parameter(torch.randn(EXPERTS, IN, OUT))
    observer = InputObserver(block, [Matrix("weight", OUT, IN, EXPERTS, True)])
    with observer.watching(), torch.no_grad():
        if made == "bmm":
            torch.bmm(x, block.weight)
        elif made == "baddbmm":
            torch.baddbmm(torch.zeros(EXPERTS, 1, OUT), x, block.weight)
        elif made == "matmul":
            x @ block.weight
        else:
            ends = torch.tensor([N, 2 * N, 3 * N], dtype=torch.int32)
            F.grouped_mm(x.flatten(0, 1), block.weight, offs=ends)
    for expert, seen in enumerate(observer.statistics["weight"]):
        assert seen.tokens == N
        torch.testing.assert_close(seen.squares, x[expert].square().sum(0))


_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def llama4():
    config = transformers.Llama4TextConfig(**_SMALL, intermediate_size_mlp=48, num_local_experts=3, moe_layers=[0, 1])
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM(config).eval()


def test_the_experts_of_llama_4_are_stored_the_other_way_round():
    decoder = Decoder(llama4(), torch.device("cpu"))
    matrices = {matrix.name: matrix for matrix in decoder.matrices[0]}
    gate_up, down = matrices["feed_forward.experts.gate_up_proj"], matrices["feed_forward.experts.down_proj"]
    assert (gate_up.outputs, gate_up.inputs, gate_up.transposed) == (96, 32, True)
    assert (down.outputs, down.inputs, down.transposed) == (32, 48, True)
    block, hidden = decoder.working_block(0), torch.randn(2, 9, 32)
    observer = InputObserver(block, decoder.matrices[0])
    with observer.watching(), torch.no_grad():
        decoder.run_block(0, block, hidden)
    assert observer.statistics.keys() == matrices.keys()
    assert all(seen.tokens for of_matrix in observer.statistics.values() for seen in of_matrix)


def test_gates_and_convolutions_are_no_experts():
    gates = nn.Module()
    gates.gate = nn.Parameter(torch.randn(4, 8, 8))
    block = nn.ModuleDict({"rg_lru": gates, "conv": nn.Conv1d(8, 8, 4, groups=2), "proj": nn.Linear(8, 8)})
    assert [matrix.name for matrix in find_matrices(block)] == ["proj.weight"]
    assert left_dense(block) == ["rg_lru.gate", "conv.weight"]


def test_indexers_of_sparse_attention_are_left_dense():
    class TinyIndexer(nn.Module):
        def __init__(self):
            super().__init__()
            self.wk = nn.Linear(8, 4)

    attention = nn.ModuleDict({"indexer": TinyIndexer(), "q_proj": nn.Linear(8, 8)})
    assert router_paths(attention) == {"indexer", "indexer.wk"}
    assert [matrix.name for matrix in find_matrices(attention)] == ["q_proj.weight"]


def test_a_weight_whose_product_was_never_seen_is_named_as_that(config, silent, tokenizer, monkeypatch):
    from ebft import run_ebft
    from ebft.pruning import statistics

    monkeypatch.setattr(statistics, "PRODUCTS", {})
    result = run_ebft(
        random_model("llama"), config(recover="none", prune="wanda"), tokenizer=tokenizer, reporter=silent
    )
    notes = result.blocks[0]["notes"]
    assert "no product with self_attn.q_proj.weight was seen, and it fell back to magnitude" in notes
    assert not any("saw no tokens" in note for note in notes)

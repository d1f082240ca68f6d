"""Claims about the other kinds of adapters, each against its formula written out."""

import argparse
import copy
import json

import pytest
import torch
import torch.nn as nn

import extras.proxies  # noqa: F401  registers fisher
import heterolora
import train
from data import InputError
from extras.adapters import ADAPTERS, LoRAXS, PRoLoRA, SVDLoRA, TiedLoRA, usual_rank
from extras.allocators import costs_once
from extras.evaluate import evaluate_run
from heterolora import HeteroLoRA, LoRA, inject, set_ranks
from model import Classifier, Encoder
from test_heterolora import SMALL, loss_fn, make_batches

KINDS = sorted(ADAPTERS)


def generator():
    return torch.Generator().manual_seed(0)


def make_model(kind, rank=6, trained=True):
    """Return a small classifier with adapters of a kind on all linears; trained: dW is not 0."""
    torch.manual_seed(0)
    encoder = Encoder(SMALL)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = Classifier(encoder, 3, generator=generator()).eval()
    adapters = inject(encoder, heterolora.TARGETS, [], rank, 8.0, adapter=ADAPTERS[kind])
    if trained:
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
    return model, adapters


class FreeVector(LoRA):
    """An adapter that trains a vector, which a subclass may forget to list."""

    def __init__(self, d_in, d_out, rank, alpha, generator=None):
        super().__init__(d_in, d_out, rank, alpha, generator)
        self.m = nn.Parameter(torch.ones(d_out))


class AlwaysCounted(FreeVector):
    """The same, listed for rank 0 too."""

    def active(self, rank):
        return [*super().active(rank), (self.m, (slice(None),))]


def roll_by_hand(chunk, count, width):
    """PRoLoRA's rows, element by element: row i of chunk k is row i + k * step of the first."""
    rows, columns = chunk.shape
    step = max(rows // count, 1)
    wide = torch.empty(rows, width)
    for i in range(rows):
        for column in range(width):
            k, j = divmod(column, columns)
            wide[i, column] = chunk[(i + k * step) % rows, j]
    return wide


# ------------------------------------------------------------------------------- what dW is


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_tied_lora_is_its_formula(rank):
    adapter = TiedLoRA(7, 9, 5, 2.0, generator())
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    A, B, u, v = adapter.A[:rank], adapter.B[:, :rank], adapter.u[:rank], adapter.v
    dW = 2.0 / 5 * v.diag() @ B @ u.diag() @ A
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(adapter(x, rank), x @ dW.T)


@pytest.mark.parametrize("rank, unshared", [(9, 1), (9, 0), (8, 0), (3, 2), (1, 1)])
def test_prolora_is_its_formula_also_where_the_chunks_do_not_divide_the_width(rank, unshared):
    adapter = PRoLoRA(10, 11, 9, 2.0, generator(), chunks=4, unshared=unshared)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    shared = rank - min(rank, unshared)
    A, B = adapter.own_A[:rank], adapter.own_B[:, :rank]
    if shared:
        A = torch.cat([roll_by_hand(adapter.chunk_A[:shared], 4, 10), A])
        B = torch.cat([roll_by_hand(adapter.chunk_B[:, :shared].T, 4, 11).T, B], 1)
    x = torch.randn(2, 3, 10)
    torch.testing.assert_close(adapter(x, rank), x @ (2.0 / 9 * B @ A).T)


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_xs_puts_its_core_between_the_singular_vectors_of_the_weight(rank):
    host = nn.Linear(7, 9)
    adapter = LoRAXS(7, 9, 4, 2.0, generator())
    adapter.attach("q", host, {})
    U, S, Vh = torch.linalg.svd(host.weight, full_matrices=False)
    W_r = U[:, :rank] * S[:rank] @ Vh[:rank]  # the signs of the vectors cancel
    adapter.R.data.copy_(torch.eye(4))
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(adapter(x, rank), 2.0 / 4 * x @ W_r.T)
    adapter.R.data.normal_()
    dW = 2.0 / 4 * adapter.B[:, :rank] @ adapter.R[:rank, :rank] @ adapter.A[:rank]
    torch.testing.assert_close(adapter(x, rank), x @ dW.T)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_form_of_adalora_is_its_formula(rank):
    adapter = SVDLoRA(7, 9, 4, 2.0, generator())
    nn.init.normal_(adapter.E)
    dW = 2.0 / 4 * adapter.B[:, :rank] @ adapter.E[:rank].diag() @ adapter.A[:rank]
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(adapter(x, rank), x @ dW.T)


def test_initial_values_have_the_spread_that_the_docstrings_say():
    prolora = PRoLoRA(400, 300, 40, 1.0, generator())
    vera = ADAPTERS["vera"](400, 300, 40, 1.0, generator())
    for values, bound in ((prolora.chunk_A, 1 / 20), (prolora.own_A, 1 / 20), (vera.A, 1 / 20)):
        assert 0.95 * bound < values.abs().max() <= bound
    assert 0.95 / 40**0.5 < vera.B.abs().max() <= 1 / 40**0.5
    assert LoRAXS(400, 300, 40, 1.0, generator()).R.std().item() == pytest.approx(1e-5, rel=0.1)
    svd = SVDLoRA(400, 300, 40, 1.0, generator())
    assert svd.A.std().item() == pytest.approx(0.02, rel=0.05)
    assert svd.B.std().item() == pytest.approx(0.02, rel=0.05)


def test_prolora_with_fewer_ranks_than_are_unshared_shares_none():
    adapter = PRoLoRA(10, 11, 1, 1.0, generator(), unshared=2)
    assert heterolora.cost({"q": adapter}) == 10 + 11


@pytest.mark.parametrize("kind", ["lora", "tied", "tied-abu", "prolora", "prolora-shared"])
def test_kinds_that_can_be_lora_are_lora_bit_for_bit(kind):
    settings = {"chunks": 1, "unshared": 0} if "prolora" in kind else {}
    adapter = ADAPTERS[kind](12, 9, 4, 2.0, generator(), **settings)
    lora = LoRA(12, 9, 4, 2.0, generator())
    x = torch.randn(2, 3, 12)
    B = torch.randn(9, 4)
    first, second = ("chunk_A", "chunk_B") if "prolora" in kind else ("A", "B")
    getattr(adapter, second).data.copy_(B)
    lora.B.data.copy_(B)
    for each in (adapter, lora):
        each(x).square().sum().backward()
    assert torch.equal(adapter(x), lora(x))
    assert torch.equal(getattr(adapter, first).grad, lora.A.grad)
    assert torch.equal(getattr(adapter, second).grad, lora.B.grad)


def test_rotation_raises_the_rank_of_prolora():
    adapter = PRoLoRA(32, 32, 8, 1.0, generator(), chunks=8, unshared=0)
    nn.init.normal_(adapter.chunk_B)
    rotated = torch.linalg.matrix_rank(adapter(torch.eye(32)))
    adapter.unroll = lambda chunk, width, axis: torch.cat([chunk] * 8, 1 - axis)
    assert torch.linalg.matrix_rank(adapter(torch.eye(32))) == 4  # the width of a chunk
    assert rotated == 8


@pytest.mark.parametrize("kind", KINDS)
def test_dW_starts_at_zero_and_the_parameters_get_a_gradient(kind):
    model, adapters = make_model(kind, trained=False)
    inputs, _ = batch = make_batches()[0]
    with_adapters = model(*inputs)
    loss_fn(model, batch).backward()
    set_ranks(adapters, {})
    off = model(*inputs)
    torch.testing.assert_close(with_adapters, off, atol=1e-4 if kind == "xs" else 0, rtol=0)
    for adapter in adapters.values():
        assert any(p.grad.any() for p in adapter.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------- what it costs


def test_a_tied_kind_that_could_never_learn_is_refused():
    with pytest.raises(ValueError, match="B or v must train"):
        TiedLoRA(7, 9, 2, 1.0, trained=("A", "u"))


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_tells_modules_apart_before_training(kind):
    model, adapters = make_model(kind, trained=False)
    scores = HeteroLoRA(model, adapters, 0, loss_fn, "fisher").score(make_batches())
    assert all(score > 0 for score in scores.values())


def test_fisher_scores_prolora_of_one_rank_which_has_no_shared_chunk():
    model, adapters = make_model("prolora", rank=1, trained=False)
    scores = HeteroLoRA(model, adapters, 0, loss_fn, "fisher").score(make_batches())
    assert all(score > 0 for score in scores.values())


def test_what_layers_share_is_one_object_and_counts_once():
    model, adapters = make_model("tied", rank=2)
    assert adapters["layers.0.q"].A is adapters["layers.2.q"].A
    assert adapters["layers.0.q"].A is not adapters["layers.0.k"].A
    trained = {p for p in model.encoder.parameters() if p.requires_grad}
    total = sum(p.numel() for p in trained)
    assert heterolora.cost(adapters) == total
    assert sum(map(sum, costs_once(adapters).values())) == total
    per_type = 4 * (2 * (16 + 16) + 3 * (2 + 16)) + (2 * 40 + 3 * (2 + 24)) + (2 * 40 + 3 * 18)
    assert total == per_type


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_is_the_number_of_parameters_that_train(kind):
    model, adapters = make_model(kind)
    trained = [p for n, p in model.encoder.named_parameters() if p.requires_grad]
    assert heterolora.cost(adapters) == sum(p.numel() for p in trained)
    for rank in range(7):
        allocation = dict.fromkeys(adapters, rank)
        spent = heterolora.cost(adapters, allocation)
        prices = costs_once(adapters).values()
        assert spent == sum(sum(costs[:rank]) for costs in prices)


def test_the_next_rank_of_lora_xs_always_costs_more():
    _, adapters = make_model("xs", rank=4)
    assert heterolora.rank_costs(adapters)["layers.0.q"] == [1, 3, 5, 7]


def test_only_the_core_of_lora_xs_trains():
    _, adapters = make_model("xs")
    for adapter in adapters.values():
        assert [name for name, _ in adapter.named_parameters()] == ["R"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_rank_is_the_largest_that_fits(kind):
    encoder = Encoder(SMALL)
    args = argparse.Namespace(method="lora", adapter=kind, rank=None, init=None, allocator="greedy")
    for wanted in (1, 3):
        twin = copy.deepcopy(encoder)
        adapters = inject(twin, ["q", "v"], [], wanted, 1.0, adapter=ADAPTERS[kind])
        spent = heterolora.cost(adapters)
        for budget, rank in ((spent, wanted), (spent - 1, wanted - 1)):
            args.budget = str(budget)
            if rank > 0 and kind != "lora":
                assert usual_rank(args, encoder, ["q", "v"], [], ADAPTERS[kind]) == rank
    assert not any(".adapter" in name for name, _ in encoder.named_modules())


@pytest.mark.parametrize("shortcuts", [[], ["residual_attn"]])
def test_adalora_starts_with_the_first_rank_that_costs_half_as_much_again_as_the_budget(shortcuts):
    encoder = Encoder(SMALL)
    args = argparse.Namespace(method="adalora", adapter="svd", rank=None, budget="1,000")
    rank = usual_rank(args, encoder, ["q", "v"], shortcuts, SVDLoRA)
    costs = []
    for r in (rank - 1, rank):
        twin = copy.deepcopy(encoder)
        adapters = inject(twin, ["q", "v"], shortcuts, r, 1.0, adapter=SVDLoRA)
        costs.append(heterolora.cost(adapters))
    assert costs[0] < 1500 <= costs[1]
    args.budget = "1000000"
    assert usual_rank(args, encoder, ["q", "v"], [], SVDLoRA) == 16


# ---------------------------------------------------------------------------------- how it runs


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_the_norm_of_the_gradients_by_plain_autograd(kind):
    model, adapters = make_model(kind)
    batch = make_batches(1)[0]
    scores = HeteroLoRA(model, adapters, 0, loss_fn).score([batch])
    for name in adapters:  # one at a time, as layers may share parameters
        host = model.encoder.get_submodule(name)
        host.adapter = copy.deepcopy(adapters[name])
        loss_fn(model, batch).backward()
        norms = [p.grad.norm() for p in host.adapter.parameters() if p.requires_grad]
        assert scores[name] == pytest.approx(float(sum(norms)), rel=1e-4), name
        host.adapter = adapters[name]


def run(folder, *flags):
    common = ["--train-limit", "60", "--max-steps", "6", "--precision", "float32"]
    common += ["--batch-size", "16", "--probe-batches", "4", "--max-length", "12"]
    common += ["--shortcuts", "none", "--head-warmup", "4", "--holdout", "0.2", "--device", "cpu"]
    common += ["--out", str(folder)]
    return train.main([*common, *flags])


@pytest.mark.parametrize("kind", ["tied", "vera", "prolora", "xs"])
def test_a_kind_trains_within_the_budget_and_its_run_can_be_loaded(tmp_path, kind):
    flags = ["--method", "lora", "--adapter", kind, "--budget", "3000"]
    assert run(tmp_path / "a", *flags) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert 2000 < result["params_active"] <= 3000
    assert evaluate_run(str(tmp_path / "a")) == result["dev"]


@pytest.mark.parametrize("kind", ["vera", "prolora", "xs"])
def test_a_search_works_with_kinds_whose_modules_share_nothing(tmp_path, kind):
    flags = ["--method", "dynamic", "--adapter", kind, "--realloc-every", "0.7"]
    assert run(tmp_path / "a", *flags, "--budget", "25%") == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert 0 < result["params_active"] <= result["params_budget"]


def test_layers_in_turn_can_spend_what_is_not_enough_for_a_rank_everywhere(tmp_path):
    flags = ["--method", "lora", "--adapter", "prolora-shared", "--budget", "1000"]
    spent = {}
    for allocator in ("uniform", "middle-layers"):
        assert run(tmp_path / allocator, *flags, "--allocator", allocator) == 0
        result = json.loads((tmp_path / allocator / "result.json").read_text())
        spent[allocator] = result["params_active"]
    assert spent["uniform"] < spent["middle-layers"] <= 1000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "static", "--adapter", "tied"], "cannot be bought one by one"),
        (["--method", "lora", "--adapter", "xs", "--shortcuts", "all"], "use --shortcuts none"),
        (["--method", "lora", "--adapter", "tied", "--allocator", "first-layers"], "one by one"),
        (["--method", "lora", "--adapter", "prolora", "--budget", "9"], "rank 1 of prolora costs"),
        (["--method", "lora", "--adapter", "xs", "--budget", "1,2,3,4"], "want 25% or 0.25"),
        (["--method", "alora", "--adapter", "xs"], "leave --adapter out"),
        (["--method", "adalora", "--adapter", "tied"], "leave --adapter out"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys, flags, message):
    assert run(tmp_path / "a", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class FromHost(LoRA):
    """An adapter that makes a parameter of the host's weight."""

    def attach(self, name, host, adapters):
        self.m = nn.Parameter(host.weight.norm(dim=1))

    def active(self, rank):
        return [*super().active(rank), (self.m, (slice(None) if rank else slice(0),))]


def test_a_kind_that_trains_what_it_does_not_list_or_lists_what_is_off_is_refused(monkeypatch):
    for kind, reason in ((FreeVector, "list what trains"), (AlwaysCounted, "rank 0 is off")):
        monkeypatch.setitem(ADAPTERS, "own", kind)
        with pytest.raises(InputError, match=reason):
            train.build(train.parse_args(["--adapter", "own"]), 2)
    monkeypatch.setitem(ADAPTERS, "own", FromHost)
    train.build(train.parse_args(["--adapter", "own", "--shortcuts", "none"]), 2)

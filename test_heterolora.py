"""What heterolora.py, model.py, data.py and train.py claim, in the order of the paper.

python -m pytest -q runs these and the tests of extras/, in about a minute on two cores.
"""

import copy
import itertools
import json
import math
import pathlib
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import data
import extras.synflow  # noqa: F401  registers synflow
import heterolora
import train
from data import InputError
from extras.part_ranks import hold_off_ranks
from heterolora import SHORTCUTS, TARGETS, HeteroLoRA, LoRA, LoRALinear, inject, set_ranks
from model import Classifier, Encoder, EncoderConfig

ROOT = pathlib.Path(__file__).parent
GLUE = ROOT.parent / "shared" / "glue"
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL = EncoderConfig(**SIZES, intermediate_size=24, max_position_embeddings=12)


def loss_fn(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(*inputs), labels)


def make_batches(count=2, seed=0, size=5, length=9):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 40, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        labels = torch.randint(0, 3, (size,), generator=generator)
        batches.append(((ids, mask), labels))
    return batches


def make_model(targets=TARGETS, shortcuts=SHORTCUTS, rank=4, trained=True, config=SMALL):
    """Return a small classifier in eval mode and its adapters; trained: B is not 0."""
    torch.manual_seed(0)
    encoder = Encoder(config)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = Classifier(encoder, 3, generator=torch.Generator().manual_seed(1)).eval()
    adapters = inject(encoder, targets, shortcuts, rank, alpha=8.0, shortcut_alpha=2.0)
    if trained:
        for adapter in adapters.values():
            nn.init.normal_(adapter.B, std=0.2)
    return model, adapters


def score(model, adapters, batches, proxy):
    return HeteroLoRA(model, adapters, 0, loss_fn, proxy).score(batches)


# ------------------------------------------------------------------------------------ adapters


def test_A_is_uniform_within_one_over_sqrt_d_in_and_B_is_zero():
    adapter = LoRA(400, 30, 16, alpha=8, generator=torch.Generator().manual_seed(0))
    assert adapter.A.abs().max() <= 1 / 20
    assert adapter.A.var().item() == pytest.approx(1 / (3 * 400), rel=0.03)
    assert not adapter.B.any()
    assert adapter.scale == 8 / 16


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_first_ranks_of_A_and_B_make_dW_and_the_scale_stays(rank):
    adapter = LoRA(7, 5, 4, alpha=2)
    nn.init.normal_(adapter.B)
    adapter.rank = rank
    x = torch.randn(2, 3, 7)
    dW = 2 / 4 * adapter.B[:, :rank] @ adapter.A[:rank]
    torch.testing.assert_close(adapter(x), x @ dW.T)
    torch.testing.assert_close(adapter(x, 2), x @ (2 / 4 * adapter.B[:, :2] @ adapter.A[:2]).T)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(ValueError, match="want 1 to 5"):
        LoRA(7, 5, rank, alpha=1)


def test_with_B_zero_the_model_computes_exactly_what_the_checkpoint_computes():
    torch.manual_seed(0)
    model = Classifier(Encoder(SMALL), 3).eval()
    inputs, _ = make_batches()[0]
    before = model(*inputs)
    inject(model.encoder, TARGETS, SHORTCUTS, 4, 8.0)
    assert torch.equal(model(*inputs), before)


def test_with_everything_off_the_model_computes_exactly_what_the_checkpoint_computes():
    model, adapters = make_model()
    inputs, _ = make_batches()[0]
    trained = model(*inputs)
    set_ranks(adapters, {})
    off = model(*inputs)
    for adapter in adapters.values():
        adapter.rank = adapter.max_rank
        nn.init.zeros_(adapter.B)
    assert torch.equal(off, model(*inputs))
    assert not torch.allclose(off, trained)


def test_a_layer_is_the_two_equations_of_the_docstring():
    model, _ = make_model()
    inputs, _ = make_batches()[0]
    encoder = model.encoder
    mask = inputs[1][:, None, None, :].bool()
    x = encoder.ln(
        encoder.word(inputs[0]) + encoder.position.weight[:9] + encoder.token_type.weight[0]
    )
    f_before = None

    def delta(connection, x):  # dW x, written out
        adapter = connection.adapter
        return adapter.scale * x @ adapter.A.T @ adapter.B.T

    for layer in encoder.layers:
        B, T, D = x.shape
        q, k, v = [m(x).view(B, T, 4, 4).transpose(1, 2) for m in (layer.q, layer.k, layer.v)]
        weights = (q @ k.transpose(2, 3) / 2).masked_fill(~mask, -math.inf).softmax(-1)
        attended = layer.o((weights @ v).transpose(1, 2).reshape(B, T, D))
        total = x + delta(layer.residual_attn, x) + attended
        if f_before is not None:
            total = total + delta(layer.shortcut_ffn, f_before)
        f = layer.ln1(total)
        fed_forward = layer.fc2(F.gelu(layer.fc1(f)))
        x = layer.ln2(
            f + delta(layer.residual_ffn, f) + fed_forward + delta(layer.shortcut_attn, x)
        )
        f_before = f
    torch.testing.assert_close(encoder(*inputs), x)


# -------------------------------------------------------------------------------- search space


def test_every_linear_and_connection_is_a_module_but_the_first_layer_has_no_shortcut_ffn():
    _, adapters = make_model()
    expected = set()
    for layer, kind in itertools.product(range(3), TARGETS + SHORTCUTS):
        if (layer, kind) != (0, "shortcut_ffn"):
            expected.add(f"layers.{layer}.{kind}")
    assert set(adapters) == expected


def test_only_adapters_and_head_can_train():
    model, _ = make_model()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapter." in name or name.startswith("head.")), name


def test_initial_values_depend_on_the_seed_and_the_name_only():
    few = make_model(targets=["v"], shortcuts=[])[1]
    many = make_model()[1]
    torch.manual_seed(0)
    other = inject(Encoder(SMALL), ["v"], [], 4, 8.0, seed=1)
    assert torch.equal(few["layers.1.v"].A, many["layers.1.v"].A)
    assert not torch.equal(few["layers.1.v"].A, few["layers.2.v"].A)
    assert not torch.equal(few["layers.1.v"].A, other["layers.1.v"].A)


def test_any_model_with_linears_can_be_adapted():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    adapters = inject(model, ["0", "2"], [], rank=2, alpha=2)
    assert list(adapters) == ["0", "2"]
    assert isinstance(model[2], LoRALinear)


@pytest.mark.parametrize(
    "targets, shortcuts, message",
    [
        (["w"], [], "no 'w'; it has: .*fc1"),
        ([], ["bridge"], "no 'bridge'; it has: .*residual"),
        ([], ["dropout"], "no 'dropout'"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_those_that_exist(targets, shortcuts, message):
    with pytest.raises(ValueError, match=message):
        inject(Encoder(SMALL), targets, shortcuts, 2, 1.0)


def test_a_model_whose_width_is_not_known_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    with pytest.raises(AttributeError, match="config"):
        inject(model, ["0"], ["1"], rank=1, alpha=1)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_bad_rank_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="rank 4 for 4 -> 2: want 1 to 2"):
        inject(model, ["0", "1"], [], rank=4, alpha=1)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    assert list(inject(model, ["0", "1"], [], rank=2, alpha=1)) == ["0", "1"]


def test_injecting_twice_is_refused():
    model, _ = make_model()
    with pytest.raises(ValueError, match="adapters already"):
        inject(model.encoder, ["q"], [], 2, 1.0)


@pytest.mark.parametrize(
    "ranks, message",
    [
        ({"layers.9.q": 1}, "no adapter is called"),
        ({"layers.0.q": 5}, "from 0 to 4"),
        ({"layers.0.q": -1}, "from 0 to 4"),
        ({"layers.0.q": 2.0}, "whole number"),
        ({"layers.0.q": True}, "whole number"),
    ],
)
def test_a_wrong_allocation_is_refused_and_changes_nothing(ranks, message):
    _, adapters = make_model()
    with pytest.raises(ValueError, match=message):
        set_ranks(adapters, ranks)
    assert all(adapter.rank == 4 for adapter in adapters.values())


def test_switching_keeps_all_values():
    _, adapters = make_model()
    before = {name: copy.deepcopy(adapter.state_dict()) for name, adapter in adapters.items()}
    set_ranks(adapters, {"layers.0.q": 2})
    set_ranks(adapters, {name: 4 for name in adapters})
    for name, adapter in adapters.items():
        assert torch.equal(adapter.A, before[name]["A"])
        assert torch.equal(adapter.B, before[name]["B"])


def test_cost_counts_d_in_plus_d_out_for_every_rank():
    _, adapters = make_model()
    assert heterolora.cost(adapters, {}) == 0
    assert heterolora.cost(adapters, {"layers.0.q": 3, "layers.2.fc1": 1}) == 3 * 32 + 16 + 24
    assert heterolora.cost(adapters) == sum(
        4 * sum(a.A.shape[1:] + a.B.shape[:1]) for a in adapters.values()
    )
    assert heterolora.rank_costs(adapters)["layers.1.fc2"] == [40] * 4


def make_optimizer(name, parameters):
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_ranks_that_are_off_do_not_move_by_momentum_or_weight_decay(name):
    model, adapters = make_model()
    optimizer = make_optimizer(name, [p for p in model.parameters() if p.requires_grad])
    batches = make_batches(6)
    for step, batch in enumerate(batches):
        if step == 3:  # momentum is there by now
            ranks = {module: i % 5 for i, module in enumerate(adapters)}
            set_ranks(adapters, ranks)
            before = {module: copy.deepcopy(a.state_dict()) for module, a in adapters.items()}
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        with hold_off_ranks(adapters):
            optimizer.step()
    for module, adapter in adapters.items():
        r = ranks[module]
        assert torch.equal(adapter.A[r:], before[module]["A"][r:])
        assert torch.equal(adapter.B[:, r:], before[module]["B"][:, r:])
        if r:
            assert not torch.equal(adapter.B[:, :r], before[module]["B"][:, :r])


def test_without_holding_a_part_that_is_off_would_move():
    model, adapters = make_model()
    set_ranks(adapters, {"layers.0.v": 2})
    optimizer = make_optimizer("adamw", [p for p in model.parameters() if p.requires_grad])
    before = adapters["layers.0.v"].A[2:].clone()
    loss_fn(model, make_batches()[0]).backward()
    optimizer.step()
    assert not torch.equal(adapters["layers.0.v"].A[2:], before)


# ------------------------------------------------------------------------------------- proxies


def mean_gradients(model, adapters, batches):
    """Gradients by plain autograd, with everything on: {name: (dA, dB)}."""
    model.zero_grad()
    for batch in batches:
        (loss_fn(model, batch) / len(batches)).backward()
    gradients = {name: (a.A.grad.clone(), a.B.grad.clone()) for name, a in adapters.items()}
    model.zero_grad()
    return gradients


def test_grad_norm_is_the_norm_of_the_mean_gradient():
    model, adapters = make_model()
    batches = make_batches(3)
    scores = score(model, adapters, batches, "grad-norm")
    for name, (dA, dB) in mean_gradients(model, adapters, batches).items():
        assert scores[name] == pytest.approx((dA.norm() + dB.norm()).item(), rel=1e-5)


def test_snip_is_the_sum_of_parameter_times_gradient():
    model, adapters = make_model()
    batches = make_batches(3)
    scores = score(model, adapters, batches, "snip")
    for name, (dA, dB) in mean_gradients(model, adapters, batches).items():
        A, B = adapters[name].A, adapters[name].B
        expected = (A * dA).abs().sum() + (B * dB).abs().sum()
        assert scores[name] == pytest.approx(expected.item(), rel=1e-4)


def test_modules_that_are_off_score_as_if_they_were_on_while_B_is_zero():
    model, adapters = make_model(trained=False)
    batches = make_batches()
    on = score(model, adapters, batches, "grad-norm")
    set_ranks(adapters, {"layers.1.k": 4})
    off = score(model, adapters, batches, "grad-norm")
    assert off == pytest.approx(on, rel=1e-5)
    assert all(value > 0 for value in off.values())


def test_scores_read_off_training_steps_are_those_of_extra_passes():
    model, adapters = make_model()
    set_ranks(adapters, {"layers.0.v": 4, "layers.2.shortcut_ffn": 4})
    batches = make_batches(3)
    search = HeteroLoRA(model, adapters, 0, loss_fn)
    for batch in batches:
        with search.record():
            loss_fn(model, batch).backward()
    assert search.score() == pytest.approx(search.score(batches), rel=1e-5)


def test_scoring_batches_and_recorded_steps_do_not_mix():
    model, adapters = make_model()
    search = HeteroLoRA(model, adapters, 0, loss_fn)
    first, second = make_batches()
    with search.record():
        loss_fn(model, first).backward()
    assert search.score([second]) == score(model, adapters, [second], "grad-norm")
    assert search.score() == pytest.approx(score(model, adapters, [first], "grad-norm"))
    with search.record():
        loss_fn(model, second).backward()
    assert search.score() == pytest.approx(score(model, adapters, [second], "grad-norm"))
    with pytest.raises(ValueError, match="nothing to score"):
        search.score()


def test_a_proxy_with_passes_of_its_own_cannot_be_recorded():
    model, adapters = make_model()
    with pytest.raises(ValueError, match="passes of its own"):
        HeteroLoRA(model, adapters, 0, loss_fn, "synflow").record()


def test_scoring_is_without_dropout():
    model, adapters = make_model()
    batches = make_batches()
    expected = score(model, adapters, batches, "grad-norm")
    model.train()
    assert score(model, adapters, batches, "grad-norm") == expected


def test_a_proxy_may_draw_random_numbers(monkeypatch):
    monkeypatch.setattr(heterolora, "PROXIES", dict(heterolora.PROXIES))

    @heterolora.proxy("lottery", None)
    def lottery(model, adapters, batches, loss_fn):
        return {name: torch.rand(()) for name in adapters}

    model, adapters = make_model()
    before = torch.get_rng_state()
    score(model, adapters, make_batches(), "lottery")
    assert torch.equal(torch.get_rng_state(), before)


def test_recording_changes_no_gradient_of_a_training_step():
    model, adapters = make_model()
    set_ranks(adapters, {"layers.0.v": 4, "layers.1.fc1": 2, "layers.2.shortcut_ffn": 4})
    batch = make_batches()[0]
    search = HeteroLoRA(model, adapters, 0, loss_fn)
    gradients = []
    for context in (torch.enable_grad(), search.record()):
        model.zero_grad()
        with context:
            loss_fn(model, batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


@pytest.mark.parametrize("proxy", ["snip", "synflow"])
def test_the_trap_scores_made_of_B_are_exactly_zero_at_the_start_and_a_draw_is_announced(proxy):
    model, adapters = make_model(trained=False)
    search = HeteroLoRA(model, adapters, 500, loss_fn, proxy)
    with pytest.warns(UserWarning, match="all scores are 0"):
        entry = search.reallocate(make_batches())
    assert set(entry["scores"].values()) == {0.0}


def test_the_trap_modules_of_the_first_random_draw_win_ever_after():
    model, adapters = make_model(trained=False)
    search = HeteroLoRA(model, adapters, 500, loss_fn, "snip")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with pytest.warns(UserWarning):
        first = search.reallocate(make_batches())["ranks"]
    for batch in make_batches(10, seed=3):
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    later = search.reallocate(make_batches())["ranks"]
    assert {name for name in first if first[name]} >= {name for name in later if later[name]}


def test_at_B_zero_grad_norm_marks_down_wide_inputs():
    # E |dL/dB|^2 = scale^2 r / (3 d_in) |G|^2 over draws of A
    torch.manual_seed(0)
    x, d = torch.randn(20, 50), torch.randn(20, 6)
    G = d.T @ x
    squares = []
    for seed in range(300):
        adapter = LoRA(50, 6, 4, alpha=2, generator=torch.Generator().manual_seed(seed))
        _, dB = heterolora.adapter_gradients(adapter, x, d)
        squares.append(dB.square().sum().item())
    expected = (2 / 4) ** 2 * 4 / (3 * 50) * G.square().sum().item()
    assert sum(squares) / 300 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("proxy", sorted(heterolora.PROXIES))
def test_scoring_leaves_the_model_as_it_was(proxy):
    model, adapters = make_model()
    model.train()
    model.encoder.layers[0].eval()
    set_ranks(adapters, {"layers.0.v": 2, "layers.1.shortcut_ffn": 4})
    loss_fn(model, make_batches()[0]).backward()
    state = copy.deepcopy(model.state_dict())
    gradients = {n: copy.deepcopy(p.grad) for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    ranks = {name: (adapter.rank, adapter.scale) for name, adapter in adapters.items()}
    random_state = torch.get_rng_state()
    score(model, adapters, make_batches(), proxy)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert ranks == {name: (adapter.rank, adapter.scale) for name, adapter in adapters.items()}
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        old = gradients[name]
        assert (parameter.grad is None) == (old is None)
        assert old is None or torch.equal(parameter.grad, old)


def test_a_module_that_the_loss_ignores_scores_zero():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 3)})
    adapters = inject(model, ["used", "idle"], [], 2, 2)

    def loss(model, x):
        model["idle"](x)
        return model["used"](x).square().sum()

    scores = HeteroLoRA(model, adapters, 0, loss).score([torch.ones(2, 4)])
    assert scores["idle"] == 0 < scores["used"]


def test_an_input_that_is_changed_in_place_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    adapters = inject(model, ["0", "1"], [], 2, 2)

    def loss(model, x):
        hidden = model[0](x)
        y = model[1](hidden)
        hidden.detach().zero_()
        return y.sum()

    with pytest.raises(RuntimeError, match="in place"):
        HeteroLoRA(model, adapters, 0, loss).score([torch.ones(2, 4)])


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4)])  # of 3 dimensions, y is a view in torch
def test_outputs_that_are_changed_in_place_score_as_if_they_were_not(is_first, shape):
    scores = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.ReLU(inplace), nn.Linear(8, 3)]
        model = nn.Sequential(*([] if is_first else [nn.Linear(4, 4)]), *layers)
        linears = [name for name, module in model.named_children() if name != str(len(model) - 2)]
        adapters = inject(model, linears, [], 2, 2)
        set_ranks(adapters, {})
        search = HeteroLoRA(model, adapters, 0, lambda model, x: model(x).square().sum())
        scores.append(search.score([torch.ones(shape)]))
    assert scores[0] == scores[1]
    assert all(scores[0].values())


def test_a_module_inside_a_reentrant_checkpoint_is_refused_instead_of_scored_zero():
    model = nn.Sequential(nn.Linear(4, 3))
    adapters = inject(model, ["0"], [], 2, 2)

    def loss(model, x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).sum()

    with pytest.raises(RuntimeError, match="a checkpoint"):
        HeteroLoRA(model, adapters, 0, loss).score([torch.ones(2, 4, requires_grad=True)])


def test_a_score_that_is_not_finite_stops_the_search():
    model, adapters = make_model()
    with torch.no_grad():
        model.head[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="layers"):
        score(model, adapters, make_batches(), "grad-norm")


# ---------------------------------------------------------------------------------- allocators


def run_greedy(scores, costs, budget, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return heterolora.ALLOCATORS["greedy"](scores, costs, budget, generator)


def test_greedy_takes_the_best_whole_modules_and_goes_on_past_one_that_does_not_fit():
    scores = {"a": 5.0, "b": 9.0, "c": 1.0, "d": 3.0}
    costs = {"a": [10, 10], "b": [4, 4], "c": [2, 2], "d": [3, 3]}
    assert run_greedy(scores, costs, 19) == {"b": 2, "a": 0, "d": 2, "c": 2}
    assert run_greedy(scores, costs, 0) == dict.fromkeys("abcd", 0)
    assert run_greedy(scores, costs, 38) == dict.fromkeys("abcd", 2)


def test_greedy_is_the_best_there_is_where_all_modules_cost_the_same():
    generator = torch.Generator().manual_seed(0)
    for budget in range(0, 50, 3):
        values = torch.rand(6, generator=generator).tolist()
        scores = dict(zip("abcdef", values, strict=True))
        ranks = run_greedy(scores, {name: [3, 4] for name in scores}, budget)
        best = 0
        for chosen in itertools.product([0, 1], repeat=6):
            if 7 * sum(chosen) <= budget:
                best = max(best, sum(v for v, c in zip(values, chosen, strict=True) if c))
        assert sum(scores[name] for name in scores if ranks[name]) == pytest.approx(best)


def test_ties_are_broken_at_random_and_the_same_way_for_a_seed():
    scores = dict.fromkeys("abcdefgh", 1.0)
    costs = {name: [1] for name in scores}
    draws = [
        tuple(sorted(n for n, r in run_greedy(scores, costs, 3, s).items() if r)) for s in range(40)
    ]
    assert draws[7] == tuple(sorted(n for n, r in run_greedy(scores, costs, 3, 7).items() if r))
    assert len(set(draws)) > 15


def test_a_list_of_scores_counts_as_its_sum():
    costs = {"a": [1, 1], "b": [1, 1]}
    assert run_greedy({"a": [2.0, 0.5], "b": 2.2}, costs, 2) == {"a": 2, "b": 0}


# ---------------------------------------------------------------------------------- the search


def test_reallocating_scores_allocates_and_switches():
    model, adapters = make_model()
    search = HeteroLoRA(model, adapters, 600, loss_fn)
    batches = make_batches()
    scores = search.score(batches)
    entry = search.reallocate(batches, step=30)
    assert entry["step"] == 30
    assert entry["scores"] == scores
    assert entry["ranks"] == {name: adapter.rank for name, adapter in adapters.items()}
    assert 400 < entry["parameters"] == heterolora.cost(adapters) <= 600
    assert search.history == [entry]


def test_an_allocator_that_spends_too_much_is_refused(monkeypatch):
    model, adapters = make_model()
    everything = {name: 4 for name in adapters}
    monkeypatch.setitem(heterolora.ALLOCATORS, "rich", lambda *_: everything)
    with pytest.raises(ValueError, match="rich spends more than 600"):
        HeteroLoRA(model, adapters, 600, loss_fn, allocator="rich").reallocate(make_batches())


# --------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_padding_and_its_company_do_not_change_a_sentence(model_type):
    torch.manual_seed(0)
    config = copy.copy(SMALL)
    config.model_type = model_type
    encoder = Encoder(config).eval()
    ids = torch.tensor([[5, 6, 7, 0, 0, 0], [8, 9, 10, 11, 12, 13]])
    mask = (ids != 0).long()
    alone = encoder(ids[:1, :3], mask[:1, :3])
    torch.testing.assert_close(encoder(ids, mask)[:1, :3], alone)


def test_roberta_counts_positions_from_after_its_padding():
    config = copy.copy(SMALL)
    config.model_type = "roberta"
    config.pad_token_id = 1
    encoder = Encoder(config)
    assert encoder.positions(torch.tensor([[5, 6, 1, 1]])).tolist() == [[2, 3, 1, 1]]
    assert encoder.max_length == 12 - 2


def test_dropout_follows_the_embeddings_and_both_halves_of_every_layer():
    encoder = Encoder(SMALL)
    dropped = []
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: dropped.append(1))
    ids = torch.ones(1, 5, dtype=torch.long)
    encoder(ids, ids)
    assert len(dropped) == 1 + 2 * 3


def test_a_sequence_longer_than_the_positions_is_refused():
    ids = torch.ones(1, 13, dtype=torch.long)
    with pytest.raises(ValueError, match="13 tokens, but the encoder has positions for 12"):
        Encoder(SMALL)(ids, ids)


def test_mean_pooling_is_over_real_tokens_and_cls_takes_the_first():
    hidden = torch.arange(12.0).view(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    assert Classifier(Encoder(SMALL), 2).pool(hidden, mask).tolist() == [[1.5, 2.5, 3.5]]
    assert Classifier(Encoder(SMALL), 2, "cls").pool(hidden, mask).tolist() == [[0, 1, 2]]


# ---------------------------------------------------------------------------------------- data


def write_task(folder, train_lines, dev_lines=None):
    (folder / "SST-2").mkdir()
    for name, lines in (("train", train_lines), ("dev", dev_lines or train_lines)):
        (folder / "SST-2" / f"{name}.tsv").write_bytes("\n".join(lines).encode())
    return str(folder)


def test_quotes_in_glue_files_are_only_text_and_windows_line_ends_are_fine(tmp_path):
    folder = write_task(tmp_path, ["sentence\tlabel\r", 'he said "so\t1\r', 'and "\t0\r', ""])
    assert data.load_task("sst2", folder).train == [('he said "so', None, 1), ('and "', None, 0)]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["sentence\tlabel", "a\t1", "b"], "line 3: 1 columns instead of 2"),
        (["sentence\tlabel", "a\t2"], "line 2: label '2' is not one of 0, 1"),
        (["text\tlabel", "a\t1"], "line 1: want columns"),
        (["sentence\tlabel"], "no examples"),
        ([""], "line 1: want one column 'label'"),
        (["sentence\tlabel", "a\0\t1"], "line 2: a NUL byte"),
    ],
)
def test_a_damaged_glue_file_is_refused_with_its_line(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        data.load_task("sst2", write_task(tmp_path, lines))


def test_an_unknown_task_and_a_wrong_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="or one of paraphrase"):
        data.load_task("mnist")
    with pytest.raises(InputError, match="no MRPC/ in it"):
        data.load_task("mrpc", str(tmp_path))


@pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE data here")
def test_mrpc_as_it_lies_on_disk_is_read_whole():
    task = data.load_task("mrpc", str(GLUE))
    assert (len(task.train), len(task.dev)) == (3667, 408)
    assert sum(label for _, _, label in task.dev) == 279


def test_metrics_are_those_of_the_confusion_matrix():
    predictions, labels = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1]  # tp 2, fp 1, tn 1, fn 2
    assert data.accuracy(predictions, labels) == {"accuracy": 0.5}
    assert data.accuracy_and_f1(predictions, labels)["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    expected = (2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3)
    assert data.matthews(predictions, labels)["matthews"] == pytest.approx(expected)
    assert data.matthews([1, 1], [1, 0]) == {"matthews": 0}


def test_which_examples_are_right_is_kept_as_a_bit_each():
    bits = "1101 0111 1000 0000"  # nine examples, filled up with zeros
    predictions, labels = [1, 0, 2, 0, 0, 1, 1, 1, 2], [1, 0, 0, 0, 1, 1, 1, 1, 2]
    digits = "".join(f"{int(four, 2):x}" for four in bits.split())
    assert data.which_are_right(predictions, labels) == digits


def test_an_epoch_has_every_example_once_and_batches_of_similar_length():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (1000,), generator=generator).tolist()
    epoch = data.batches(lengths, 16, generator)
    assert sorted(itertools.chain(*epoch)) == list(range(1000))
    padded = sum(len(chunk) * max(lengths[i] for i in chunk) for chunk in epoch)
    assert padded < 1.1 * sum(lengths)
    assert epoch != data.batches(lengths, 16, generator)


def test_padding_is_marked_in_the_mask():
    ids, mask, types = data.pad([([5, 6, 7], [0, 0, 1]), ([8], [0])], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert types.tolist() == [[0, 0, 1], [0, 0, 0]]


def test_held_out_texts_do_not_stand_in_the_training_part():
    examples = [(f"text {i % 60}", None, i % 2) for i in range(100)]
    task = data.hold_out(data.Task(examples, [], ("0", "1"), data.accuracy), 0.2)
    assert len(task.train) + len(task.dev) == 100
    assert not {text for text, _, _ in task.train} & {text for text, _, _ in task.dev}
    assert len(task.dev) >= 20


# --------------------------------------------------------------------------------------- train


@pytest.mark.parametrize(
    "text, expected",
    [
        ("25%", 250),
        ("0.25", 250),
        ("1", 1),
        ("1.0", 1000),
        ("100%", 1000),
        ("2", 2),
        ("1,000", 1000),
        ("0", 0),
        ("33.38%", 333),
    ],
)
def test_a_budget_is_a_share_or_a_number_of_parameters(text, expected):
    assert train.parse_budget(text, 1000) == expected


@pytest.mark.parametrize("text", ["0,25", "2,5%", "101%", "1001", "-1", "nan", "a lot", "2.5", ""])
def test_any_other_budget_is_refused_with_what_is_allowed(text):
    with pytest.raises(InputError, match="want 25% or 0.25, or a number up to 1,000 parameters"):
        train.parse_budget(text, 1000)


def run(*flags, out=None):
    """Run train.main on a few examples of the built-in task, a quarter held out -> exit status"""
    common = ["--train-limit", "64", "--holdout", "0.25", "--max-steps", "6"]
    common += ["--precision", "float32", "--head-warmup", "8", "--probe-batches", "2"]
    common += ["--batch-size", "8", "--max-length", "12"]
    return train.main([*common, *flags, *(["--out", str(out)] if out else [])])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--budget", "0,25"], "budget '0,25'"),
        (["--budget", ""], "is empty: is a shell variable not set"),
        (["--targets", "w"], "no 'w'"),
        (["--rank", "999"], "rank 999"),
        (["--targets", "none", "--shortcuts", "none"], "search space is empty"),
        (["--task", "mrpc"], "needs --model"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "mps"], "--device mps: want cpu or cuda"),
        (["--device", "meta"], "--device meta"),
        (["--method", "full", "--precision", "int8"], "no frozen weights"),
        (["--method", "head", "--budget", "much"], "budget 'much'"),
        (["--method", "lora", "--allocator", "breadth"], "lora has no scores"),
        (["--method", "alora", "--allocator", "breadth"], "alora has its own rule"),
        (["--holdout", "1"], "holdout"),
        (["--resume", "no/such/run"], "no/such/run"),
    ],
)
def test_bad_input_is_refused_in_one_line_with_exit_status_2(capsys, flags, message):
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--proxy", "magic"],
        ["--rank", "0"],
        ["--lr", "-1"],
        ["--probe-batches", "999999999"],
        ["--batch-size", "9" * 30],
    ],
)
def test_a_wrong_flag_is_refused_by_the_parser(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(flags)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.py: error: argument {flags[0]}: ")


def test_an_update_of_the_training_loop_leaves_ranks_that_are_off():
    args = train.parse_args(["--method", "static", "--lr", "0.1"])
    model, adapters = make_model()
    set_ranks(adapters, {name: 2 for name in adapters})
    before = {name: adapter.A[2:].clone() for name, adapter in adapters.items()}
    optimizer, schedule = train.make_optimizer(args, model, adapters, 10)
    for batch in make_batches(3):
        loss_fn(model, batch).backward()
        train.update(model, adapters, optimizer, schedule)
    assert all(torch.equal(adapters[name].A[2:], before[name]) for name in adapters)


def copy_builtin(folder, **changes):
    """Copy the built-in checkpoint, with other fields in its config."""
    shutil.copytree(ROOT / "builtin", folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_dropout_is_the_same_for_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    model = copy_builtin(tmp_path / "model", hidden_dropout_prob=0.5)
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        flags = ["--method", "lora", "--model", model, "--seed", seed]
        assert run(*flags, out=tmp_path / name) == 0
    assert read_losses(tmp_path / "a") == read_losses(tmp_path / "b")
    assert read_losses(tmp_path / "a") != read_losses(tmp_path / "c")


def read_losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_trains_and_reports(tmp_path, monkeypatch, method):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    assert run("--method", method, "--budget", "25%", out=tmp_path / "a") == 0
    assert run("--method", method, "--budget", "25%", out=tmp_path / "b") == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert read_losses(tmp_path / "a") == read_losses(tmp_path / "b")
    assert result["ranks"] == again["ranks"]
    assert result["steps"] == 6
    if method in ("static", "dynamic", "lora"):
        space = result["params_search_space"]
        assert 0.8 * space // 4 <= result["params_active"] <= space // 4 == result["params_budget"]
    if method == "lora":
        assert len({r for n, r in result["ranks"].items() if n.endswith((".q", ".v"))}) == 1
        assert not any(r for n, r in result["ranks"].items() if n.split(".")[-1] in SHORTCUTS)


def test_more_probe_batches_do_not_change_the_order_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    for n in ("1", "3"):
        flags = ["--method", "static", "--budget", "100%", "--probe-batches", n]
        assert run(*flags, out=tmp_path / n) == 0
    assert read_losses(tmp_path / "1") == read_losses(tmp_path / "3")


def test_a_dynamic_run_reallocates_and_keeps_the_history(tmp_path):
    assert run("--realloc-every", "0.34", "--warmup-steps", "3", out=tmp_path / "a") == 0
    lines = (tmp_path / "a" / "history.jsonl").read_text().splitlines()
    space, *history = map(json.loads, lines)
    assert [entry["step"] for entry in history] == [0, 2, 4]
    assert history[0]["ranks"].keys() == space["modules"].keys()


def test_a_dynamic_run_says_if_it_will_not_search_again_or_if_a_score_sees_few_batches(capsys):
    few = "a score sees 2 batches"
    assert run("--realloc-every", "0.34", "--probe-batches", "2") == 0
    assert "note" not in capsys.readouterr().out
    assert run("--realloc-every", "0.34", "--probe-batches", "3") == 0
    assert few in capsys.readouterr().out
    assert run("--realloc-every", "1") == 0  # as long as the run
    assert "no second allocation: it would come after step 6" in capsys.readouterr().out


def test_the_learning_rate_rises_and_falls():
    args = train.parse_args(["--lr", "1", "--method", "lora"])
    model, adapters = make_model()
    optimizer, schedule = train.make_optimizer(args, model, adapters, 100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    assert rates[-1] == pytest.approx(1 / 94)
    assert schedule.get_last_lr()[0] == 0

"""Allocation rules: hand-made examples, and brute force over all allocations of small inputs."""

import itertools
import random
import warnings

import pytest
import torch
import torch.nn as nn

import extras.allocators  # noqa: F401  it registers the rules
import train
from heterolora import ALLOCATORS, inject


def allocate(name, scores, costs, budget, seed=0):
    return ALLOCATORS[name](scores, costs, budget, torch.Generator().manual_seed(seed))


def total(values, ranks):
    """Return the sum of values {name: one for each rank} over the ranks that are on."""
    return sum(sum(values[name][:rank]) for name, rank in ranks.items())


def random_input(seed):
    """Return scores (numbers or lists), costs and a budget for up to 4 layers."""
    draw = random.Random(seed)
    scores = {}
    costs = {}
    for layer in range(draw.randint(1, 4)):
        for last in ("q", "fc1", "residual_attn"):
            ranks = draw.randint(1, 4)
            name = f"layers.{layer}.{last}"
            by_rank = draw.choices([-1.0, 0.0, 0.5, 1.0], k=ranks)  # many are equal
            scores[name] = draw.choice([by_rank, draw.random()])
            costs[name] = [draw.randint(1, 9)] * ranks
    budget = draw.randint(0, sum(map(sum, costs.values())))
    return scores, costs, budget


pytestmark = pytest.mark.filterwarnings("ignore:all scores are 0")


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_no_rule_spends_more_than_the_budget(name):
    for seed in range(200):
        scores, costs, budget = random_input(seed)
        ranks = allocate(name, scores, costs, budget)
        assert total(costs, ranks) <= budget
        for module, prices in costs.items():
            assert 0 <= ranks[module] <= len(prices)


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"random-linears"}))
def test_the_whole_budget_buys_everything(name):
    scores, costs, _ = random_input(0)
    ranks = allocate(name, scores, costs, sum(map(sum, costs.values())))
    for module, prices in costs.items():
        assert ranks[module] == len(prices)


def test_uniform_is_the_largest_rank_that_fits_for_all():
    costs = {"a.q": [2, 2, 2], "a.fc1": [5, 5]}
    for budget, rank in ((6, 0), (7, 1), (13, 1), (14, 2), (15, 2)):
        assert allocate("uniform", {}, costs, budget) == {"a.q": rank, "a.fc1": rank}
    assert allocate("uniform", {}, costs, 16) == {"a.q": 3, "a.fc1": 2}


@pytest.mark.parametrize(
    "name, order", [("first-layers", "01234"), ("middle-layers", "21304"), ("last-layers", "43210")]
)
def test_layers_are_served_in_their_order_round_by_round(name, order):
    costs = {f"layers.{i}.q": [1, 1] for i in range(5)}
    for budget in range(11):
        expected = dict.fromkeys(costs, budget // 5)
        for layer in order[: budget % 5]:
            expected[f"layers.{layer}.q"] += 1
        assert allocate(name, {}, costs, budget) == expected


def test_greedy_ranks_is_best_of_all_where_prices_are_equal():
    for seed in range(30):
        draw = random.Random(seed)
        gains = {}
        for name in "abc":
            gains[name] = sorted(draw.choices(range(100), k=3), reverse=True)
        costs = dict.fromkeys(gains, [4, 4, 4])
        budget = draw.randint(0, 36)
        best = 0
        for numbers in itertools.product(range(4), repeat=3):
            ranks = dict(zip("abc", numbers, strict=True))
            if total(costs, ranks) <= budget:
                best = max(best, total(gains, ranks))
        assert total(gains, allocate("greedy-ranks", gains, costs, budget)) == best


def test_a_rank_shares_its_score_with_worse_ones_before_it():
    costs = {"late": [1, 1], "even": [1, 1]}
    scores = {"late": [0.0, 10.0], "even": [4.0, 4.0]}
    assert allocate("greedy-ranks", scores, costs, 2) == {"late": 2, "even": 0}


def test_one_number_is_shared_by_the_ranks_of_its_module():
    costs = {"number": [1, 1], "list": [1, 1]}
    scores = {"number": 8.0, "list": [5.0, 3.0]}
    assert allocate("greedy-ranks", scores, costs, 3) == {"number": 2, "list": 1}
    assert allocate("greedy-ranks", scores, costs, 1) == {"number": 0, "list": 1}


def test_equal_scores_are_drawn_by_the_generator():
    costs = {f"layers.{i}.q": [1] for i in range(8)}
    scores = dict.fromkeys(costs, 1.0)
    draw = allocate("greedy-ranks", scores, costs, 4, seed=0)
    assert draw == allocate("greedy-ranks", scores, costs, 4, seed=0)
    assert draw != allocate("greedy-ranks", scores, costs, 4, seed=1)


def test_shortcuts_get_their_share_even_with_the_worst_scores():
    costs = {"a.q": [6], "a.v": [6], "a.residual_ffn": [6], "a.shortcut_ffn": [6]}
    scores = {"a.q": 9.0, "a.v": 8.0, "a.residual_ffn": 0.1, "a.shortcut_ffn": 0.2}
    ranks = allocate("greedy-separated", scores, costs, 12)
    assert ranks == {"a.q": 1, "a.v": 0, "a.residual_ffn": 0, "a.shortcut_ffn": 1}
    assert allocate("greedy", scores, costs, 12)["a.shortcut_ffn"] == 0


def test_a_smaller_pool_has_a_smaller_share():
    costs = {"a.q": [6], "a.v": [6], "a.k": [6], "a.residual_ffn": [6]}
    scores = {"a.q": 9.0, "a.v": 8.0, "a.k": 7.0, "a.residual_ffn": 0.1}
    ranks = allocate("greedy-separated", scores, costs, 12)  # shares of 9 and 3
    assert ranks == {"a.q": 1, "a.v": 1, "a.k": 0, "a.residual_ffn": 0}


def test_what_both_shares_leave_over_is_spent():
    for seed in range(200):
        scores, costs, budget = random_input(seed)
        ranks = allocate("greedy-separated", scores, costs, budget)
        left = budget - total(costs, ranks)
        for name, rank in ranks.items():
            assert rank > 0 or sum(costs[name]) > left


def test_breadth_buys_one_rank_for_everybody_before_a_second_and_linears_first():
    scores = {"0.q": 1.0, "0.v": [2.0, 1.0], "0.residual_attn": 9.0}
    costs = {name: [2, 2] for name in scores}
    bought = []
    for budget in range(2, 13, 2):
        bought.append(allocate("breadth", scores, costs, budget))
    assert [tuple(ranks[name] for name in scores) for ranks in bought] == [
        (0, 1, 0),
        (1, 1, 0),
        (1, 1, 1),
        (1, 2, 1),
        (2, 2, 1),
        (2, 2, 2),
    ]


def test_within_layer_a_layer_with_large_scores_does_not_take_everything():
    scores = {"0.q": 1.0, "0.v": 3.0, "1.q": 100.0, "1.v": 110.0}
    costs = {name: [1] for name in scores}
    assert allocate("within-layer", scores, costs, 2) == {"0.q": 0, "0.v": 1, "1.q": 0, "1.v": 1}
    assert allocate("greedy", scores, costs, 2) == {"0.q": 0, "0.v": 0, "1.q": 1, "1.v": 1}


def test_layers_are_found_in_the_names_of_other_models():
    names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    costs = {f"model.layers.{i}.{name}": [1] for i in range(2) for name in names}
    scores = dict.fromkeys(costs, 0.1)
    for first in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        scores[first] = 1.0
    ranks = allocate("within-layer", scores, costs, 2)
    assert {name for name, rank in ranks.items() if rank} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    }
    ranks = allocate("last-layers", {}, costs, 3)
    assert all(rank == (".1." in name) for name, rank in ranks.items())


@pytest.mark.parametrize("name", ["{}", "net.{}", "0.auto_model.encoder.layer.{}.q", "0.{}.1.q"])
def test_a_number_tells_the_layer_wherever_it_stands_but_not_one_that_all_names_begin_with(name):
    costs = {name.format(number): [1] for number in (0, 2, 10)}
    assert extras.allocators.layers_of(costs) == [[one] for one in costs]


@pytest.mark.parametrize(
    "names",
    [
        ["layer.0.SelfAttention.q", "layer.0.SelfAttention.v", "layer.1.DenseReluDense.wo"],  # T5
        ["mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "self_attn.q_proj"],
    ],
)
def test_parts_of_a_layer_that_have_numbers_too_are_no_layers(names):
    costs = {f"decoder.block.{i}.{name}": [1] for i in range(2) for name in names}
    layers = extras.allocators.layers_of(costs)
    assert layers == [list(costs)[:3], list(costs)[3:]]


def test_random_linears_never_draws_a_shortcut_and_does_not_look_at_the_scores():
    scores = {"0.q": 0.0, "0.v": 9.0, "0.shortcut_ffn": 99.0}
    costs = {name: [1, 1] for name in scores}
    draws = [allocate("random-linears", scores, costs, 2, seed) for seed in range(30)]
    assert {ranks["0.shortcut_ffn"] for ranks in draws} == {0}
    assert {ranks["0.q"] for ranks in draws} == {0, 2}


def test_without_linears_random_linears_buys_nothing_and_does_not_complain():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allocate("random-linears", {"0.shortcut_ffn": 1.0}, {"0.shortcut_ffn": [1]}, 2) == {
            "0.shortcut_ffn": 0
        }


def test_plain_lora_without_linears_is_refused(capsys):
    assert train.main(["--method", "lora", "--targets", "none", "--shortcuts", "all"]) == 2
    assert "--method lora is of linears, and there are none" in capsys.readouterr().err


def test_plain_lora_refuses_a_rule_of_somebodys_own_whatever_its_name(capsys, monkeypatch):
    monkeypatch.setitem(ALLOCATORS, "best-layers", ALLOCATORS["breadth"])  # it needs scores
    assert train.main(["--method", "lora", "--allocator", "best-layers"]) == 2
    assert "--method lora has no scores" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["greedy", "middle-layers"])
def test_plain_lora_says_that_a_budget_buys_nothing(name):
    model = nn.ModuleDict({"0": nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)})})
    adapters = inject(model, ["q", "v"], [], rank=2, alpha=2)
    with pytest.warns(UserWarning, match="7 parameters buy no rank: raise --budget"):
        assert not any(extras.allocators.plain_lora(adapters, name, 7).values())
    ranks = extras.allocators.plain_lora(adapters, name, 16)
    assert ranks == {"0.q": 1, "0.v": 1}

"""Claims about ALoRA: how ranks are scored, and how they move."""

import copy
import json
import os
import signal

import pytest
import torch
import torch.nn as nn

import heterolora
import train
from extras import state
from extras.alora import ALoRA
from extras.part_ranks import RankAdamW
from heterolora import LoRA, set_ranks
from test_heterolora import loss_fn, make_batches, make_model

BUDGET = 12 * 32  # 12 ranks over the 6 modules q, v of three layers, 16 wide


def make_search(trained_steps=0):
    """Return (search, optimizer, batches), begun, and trained for some steps."""
    model, adapters = make_model(["q", "v"], [], rank=4, trained=False)
    for parameter in model.head.parameters():  # so that the loss feels the adapters
        nn.init.normal_(parameter)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-2}]
    optimizer = RankAdamW(groups, adapters)
    search = ALoRA(model, adapters, BUDGET, loss_fn).follow(optimizer)
    search.reallocate()
    batches = make_batches(2)
    train_for(search, optimizer, trained_steps)
    return search, optimizer, batches


def train_for(search, optimizer, steps):
    for batch in make_batches(steps, seed=7):
        loss_fn(search.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_it_starts_uniform_and_spends_the_budget():
    search, _, _ = make_search()
    assert set(search.history[0]["ranks"].values()) == {2}
    assert heterolora.cost(search.adapters) == BUDGET


def test_a_score_is_the_loss_without_a_rank_minus_the_loss_with_it_alone():
    search, _, batches = make_search(trained_steps=3)
    scores = search.score(batches)
    for name, k in (("layers.0.q", 0), ("layers.2.v", 1)):
        without, alone = copy.deepcopy(search.model), copy.deepcopy(search.model)
        without.encoder.get_submodule(name).adapter.B.data[:, k] = 0
        for other in search.adapters:
            columns = [c for c in range(4) if (other, c) != (name, k)]
            alone.encoder.get_submodule(other).adapter.B.data[:, columns] = 0
        losses = [sum(loss_fn(m, b).item() for b in batches) / 2 for m in (without, alone)]
        assert scores[name][k] == pytest.approx(losses[0] - losses[1], abs=1e-6)


def test_scores_are_without_dropout():
    search, _, batches = make_search(trained_steps=3)
    expected = search.score(batches)
    search.model.train()
    assert search.score(batches) == expected


def test_a_loss_that_is_not_finite_stops_the_search():
    search, _, batches = make_search(trained_steps=1)
    search.model.head[0].weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="layers.0.q"):
        search.score(batches)


def test_scoring_changes_nothing():
    search, _, batches = make_search(trained_steps=3)
    before = copy.deepcopy(search.model.state_dict())
    search.score(batches)
    after = search.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {adapter.rank for adapter in search.adapters.values()} == {2}


def test_a_rank_that_was_made_useful_by_hand_is_scored_first():
    search, _, batches = make_search()
    target = search.adapters["layers.1.v"]
    inputs, labels = batches[0]
    for _ in range(60):  # train one column of B, nothing else has an effect
        loss = loss_fn(search.model, (inputs, labels))
        (gradient,) = torch.autograd.grad(loss, [target.B])
        target.B.data[:, 1] -= 0.05 * gradient[:, 1]
    scores = search.score([batches[0]])
    best = max((score, name, k) for name in scores for k, score in enumerate(scores[name]))
    assert best[1:] == ("layers.1.v", 1)


def test_ranks_move_from_the_worst_to_modules_that_lost_none_and_the_budget_holds():
    search, optimizer, batches = make_search(trained_steps=3)
    before = search.history[0]["ranks"]
    scores = search.score(batches)
    entry = search.reallocate(batches, step=3)
    lost = sum(max(0, before[n] - r) for n, r in entry["ranks"].items())
    gained = sum(max(0, r - before[n]) for n, r in entry["ranks"].items())
    assert lost == gained == round(12 / 8)
    worst = min(score for ranks in scores.values() for score in ranks)
    loser = next(name for name in scores if worst in scores[name])
    assert entry["ranks"][loser] < 2
    assert heterolora.cost(search.adapters) == BUDGET


def allocate(ranks, scores, budget, costs=None):
    """Return what ALoRA makes of an allocation and scores. A rank costs 16, or what costs says."""
    adapters = {}
    for name in ranks:
        d_in = costs[name] - 8 if costs else 8
        adapters[name] = LoRA(d_in, 8, 4, 1.0)
    set_ranks(adapters, ranks)
    search = ALoRA(None, adapters, budget, None)
    search.history = [{"ranks": ranks}]
    return search.allocate(scores), search.dropped


def test_new_ranks_go_to_the_best_modules_by_their_mean_that_lost_none():
    ranks = {"a": 3, "b": 2, "c": 4, "d": 3, "off": 0}
    scores = {"a": [5, -9, 5], "b": [3, 3], "c": [4, 4, 4, 4], "d": [2, 2, 1], "off": []}
    # An eighth of 12 ranks is 2, of which -9 and 1 are the worst. c is full; b is next, then off.
    after, dropped = allocate(ranks, scores, budget=12 * 16)
    assert dropped == {"a": [1], "d": [2]}
    assert after == {"a": 2, "b": 3, "c": 4, "d": 2, "off": 1}


def test_a_module_that_is_off_grows_after_those_that_are_on():
    after, _ = allocate({"off": 0, "a": 2, "b": 2}, {"off": [], "a": [1, 5], "b": [3, 3]}, 4 * 16)
    assert after == {"off": 0, "a": 1, "b": 3}


def test_what_was_left_over_is_spent_too():
    after, dropped = allocate({"a": 2, "b": 2}, {"a": [1, 5], "b": [9, 9]}, budget=5 * 16)
    assert dropped == {"a": [0]}
    assert after == {"a": 1, "b": 4}


def test_the_best_mean_comes_before_the_largest_sum():
    ranks = {"a": 3, "b": 3, "c": 1, "d": 4}
    scores = {"a": [2, 2, 2], "b": [1, 1, 1], "c": [4], "d": [-9, -8, 5, 5]}
    after, dropped = allocate(ranks, scores, 16 * 11)
    assert dropped == {"d": [0]}  # an eighth of 11 is 1
    assert after == {"a": 3, "b": 3, "c": 2, "d": 3}


def test_growth_stays_within_the_budget_where_modules_cost_more_than_what_was_dropped():
    ranks = {"small": 4, "large": 2, "other": 2}
    scores = {"small": [1, 2, 3, 4], "large": [9, 9], "other": [5, 5]}
    costs = {"small": 16, "large": 30, "other": 16}
    spent = 4 * 16 + 2 * 30 + 2 * 16
    after, _ = allocate(ranks, scores, spent, costs)
    assert after == {"small": 3, "large": 2, "other": 3}


def test_what_was_bought_is_no_longer_there_to_spend():
    ranks = {"a": 4, "b": 3, "c": 3, "d": 3}
    scores = {"a": [0, 0, 9, 9], "b": [5] * 3, "c": [6] * 3, "d": [7] * 3}
    costs = {"a": 16, "b": 16, "c": 16, "d": 32}
    spent = 4 * 16 + 3 * 16 + 3 * 16 + 3 * 32
    after, dropped = allocate(ranks, scores, spent, costs)
    assert dropped == {"a": [0, 1]}  # frees 32, which d takes; nothing is left for c
    assert after == {"a": 2, "b": 3, "c": 3, "d": 4}


def test_a_search_with_few_ranks_still_moves_one():
    after, _ = allocate({"a": 1, "b": 1}, {"a": [1], "b": [2]}, 32)
    assert after == {"a": 0, "b": 2}


def test_dropped_ranks_leave_their_place_to_those_that_stay_with_their_moments():
    search, optimizer, _ = make_search(trained_steps=3)
    adapter = search.adapters["layers.0.q"]
    values = adapter.A[1].clone(), adapter.B[:, 1].clone()
    moment = optimizer.state[adapter.B]["exp_avg"][:, 1].clone()
    search.dropped = {"layers.0.q": [0]}
    ranks = {name: a.rank for name, a in search.adapters.items()} | {"layers.0.q": 1}
    search.switch(ranks)
    assert adapter.rank == 1
    assert torch.equal(adapter.A[0], values[0]) and torch.equal(adapter.B[:, 0], values[1])
    assert torch.equal(optimizer.state[adapter.B]["exp_avg"][:, 0], moment)


def test_growth_leaves_the_function_unchanged_and_begins_afresh():
    search, optimizer, batches = make_search()
    set_ranks(search.adapters, dict.fromkeys(search.adapters, 4))
    train_for(search, optimizer, 3)  # every rank has moments now
    start = dict.fromkeys(search.adapters, 2)
    set_ranks(search.adapters, start)
    before = search.model(*batches[0][0])
    adapter = search.adapters["layers.0.v"]
    old_A = adapter.A.detach().clone()
    search.dropped = {}
    search.switch(start | {"layers.0.v": 4})
    torch.testing.assert_close(search.model(*batches[0][0]), before)
    new = slice(2, 4)
    for parameter, part in ((adapter.A, (new,)), (adapter.B, (slice(None), new))):
        for values in optimizer.state[parameter].values():
            assert not values[part].any()
        assert optimizer.state[parameter]["step"].max() == 3
    assert not adapter.B[:, new].any() and (adapter.A[new] != old_A[new]).all()
    assert 0.8 / 4 < adapter.A[new].abs().max() <= 1 / 4
    assert torch.equal(adapter.A[:2], old_A[:2])


def test_new_values_depend_on_the_seed_of_the_search_alone():
    drawn = []
    for seed in (1, 2):
        search, _, _ = make_search(trained_steps=1)
        torch.manual_seed(seed)
        search.dropped = {}
        search.switch(search.history[0]["ranks"] | {"layers.0.v": 3})
        drawn.append(search.adapters["layers.0.v"].A[2].tolist())
    assert drawn[0] == drawn[1]
    search.switch(search.history[0]["ranks"] | {"layers.0.v": 3, "layers.1.v": 3})
    assert search.adapters["layers.1.v"].A[2].tolist() != drawn[0]  # every new rank has its own


def test_the_first_allocation_keeps_the_initial_values():
    search, _, _ = make_search()
    _, adapters = make_model(["q", "v"], [], rank=4, trained=False)
    for name, adapter in adapters.items():
        assert torch.equal(search.adapters[name].A, adapter.A)


def test_a_rank_that_is_new_is_not_dropped_in_the_next_round():
    search, optimizer, batches = make_search(trained_steps=3)
    first = search.reallocate(batches, step=3)["ranks"]
    grown = {name for name, rank in first.items() if rank > 2}
    scores = search.score(batches)
    for name in grown:
        scores[name][-1] = -100.0
    search.allocate(scores)
    for name in grown:
        assert first[name] - 1 not in search.dropped.get(name, [])


def test_after_the_last_round_the_ranks_stay():
    search, optimizer, batches = make_search(trained_steps=2)
    for step in range(12):
        search.reallocate(batches, step)
        train_for(search, optimizer, 1)
        assert heterolora.cost(search.adapters) <= BUDGET
    assert len(search.history) == 1 + 8


def test_a_run_reports_its_search_and_resumes_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    flags = ["--method", "alora", "--budget", "2000", "--train-limit", "60", "--realloc-every"]
    flags += ["0.7", "--max-steps", "8", "--precision", "float32", "--shortcuts", "none"]
    flags += ["--holdout", "0.2", "--probe-batches", "2", "--batch-size", "16"]
    flags += ["--max-length", "12"]
    assert train.main([*flags, "--out", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert 1700 < result["params_active"] <= 2000
    assert result["search_seconds"] > 0
    history = (tmp_path / "a" / "history.jsonl").read_text().splitlines()
    assert len(history) > 2  # the search space, and more than one allocation
    interrupt_after(5, monkeypatch)
    assert train.main([*flags, "--out", str(tmp_path / "b")]) == 130
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "b")]) == 0
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert (again["dev"], again["ranks"]) == (result["dev"], result["ranks"])


def interrupt_after(step, monkeypatch):
    """Ask a run to stop after a step, as Ctrl-C does."""
    count = state.Progress.count

    def count_and_stop(progress, number, *args):
        count(progress, number, *args)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(state.Progress, "count", count_and_stop)

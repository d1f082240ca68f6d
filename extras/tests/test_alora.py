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
    search, optimizer, batches = make_search(trained_steps=3)
    nn.init.normal_(search.adapters["layers.0.v"].B)  # what is off may hold anything
    before = search.model(*batches[0][0])
    search.dropped = {}
    ranks = {name: a.rank for name, a in search.adapters.items()} | {"layers.0.v": 4}
    search.switch(ranks)
    torch.testing.assert_close(search.model(*batches[0][0]), before)
    adapter = search.adapters["layers.0.v"]
    for parameter, new in ((adapter.A, (slice(2, 4),)), (adapter.B, (slice(None), slice(2, 4)))):
        for values in optimizer.state[parameter].values():
            assert not values[new].any()
    assert not adapter.B[:, 2:].any() and adapter.A[2:].abs().max() <= 1 / 4


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
    flags = ["--method", "alora", "--budget", "2000", "--train-limit", "96", "--realloc-every"]
    flags += ["0.7", "--max-steps", "8", "--precision", "float32", "--shortcuts", "none"]
    flags += ["--holdout", "0.2"]
    assert train.main([*flags, "--out", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert 1700 < result["params_active"] <= 2000
    assert result["search_seconds"] > 0
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

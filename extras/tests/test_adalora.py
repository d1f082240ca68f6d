"""Claims about AdaLoRA: its schedule, its scores, and what it leaves on."""

import copy
import json

import pytest
import torch

import heterolora
import train
from extras import adalora
from extras.adalora import AdaLoRA
from extras.adapters import SVDLoRA
from extras.tests.test_alora import interrupt_after
from heterolora import inject
from model import Classifier, Encoder
from test_heterolora import SMALL, loss_fn, make_batches, read_losses, run

STEPS = 40
PRICE = 16 + 16 + 1  # of a triplet
BUDGET = 13 * PRICE + 5  # 13 of 24 triplets


def make_search(budget=BUDGET, steps=STEPS):
    torch.manual_seed(0)
    encoder = Encoder(SMALL)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = Classifier(encoder, 3, generator=torch.Generator().manual_seed(1)).eval()
    for parameter in model.head.parameters():  # so that the loss feels the adapters
        torch.nn.init.normal_(parameter)
    adapters = inject(encoder, ["q", "v"], [], 4, 8.0, adapter=SVDLoRA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    search = AdaLoRA(model, adapters, budget, loss_fn).follow(optimizer, steps)
    search.reallocate()
    return search, optimizer


def steps_of(search, optimizer, steps):
    """Train, and give control back after every step."""
    for batch in make_batches(steps, seed=3):
        search.loss_fn(search.model, batch).backward()
        optimizer.step()
        yield
        optimizer.zero_grad()


def triplets_on(search):
    """Return how many numbers E are not 0, of those that are on."""
    count = 0
    for adapter in search.adapters.values():
        count += int((adapter.E[: adapter.rank] != 0).sum())
    return count


def test_the_schedule_is_the_cubic_one_between_its_ends():
    search, _ = make_search(steps=1000)
    everything = 24 * PRICE
    t_i, t_f = 170, 500
    assert (search.allowed(0), search.allowed(t_i)) == (everything, everything)
    assert search.allowed(1000 - t_f) == search.allowed(1000) == BUDGET
    for t in range(t_i, 1000 - t_f):  # as peft writes it
        share = 1 - (t - t_i) / (1000 - t_f - t_i)
        assert search.allowed(t) == int((everything - BUDGET) * share**3 + BUDGET)
    falling = [search.allowed(t) for t in range(1000)]
    assert falling == sorted(falling, reverse=True)


def test_no_more_triplets_than_the_schedule_allows_and_never_over_the_budget_after_its_end():
    search, optimizer = make_search()
    for step, _ in enumerate(steps_of(search, optimizer, STEPS), 1):
        if step > search.first_choice:
            assert triplets_on(search) * PRICE <= search.allowed(step)
        if step >= search.last_choice:
            assert heterolora.cost(search.adapters) == 13 * PRICE
    assert len(search.history) == 2
    assert search.history[0]["parameters"] == 24 * PRICE


def test_switching_off_computes_what_masking_computes():
    search, optimizer = make_search()
    for _ in steps_of(search, optimizer, search.last_choice - 1):
        pass
    inputs, _ = make_batches()[0]
    ranks = search.allocate(search.score())
    masked = copy.deepcopy(search.model)
    for name, kept in search.kept.items():
        E = masked.encoder.get_submodule(name).adapter.E
        E.data[[k for k in range(4) if k not in kept]] = 0
    moved, kept = next(item for item in search.kept.items() if item[1] != sorted(item[1]))
    state = optimizer.state[search.adapters[moved].E]
    before = state["exp_avg"].clone()
    search.switch(ranks)
    torch.testing.assert_close(search.model(*inputs), masked(*inputs))
    order = kept + [k for k in range(4) if k not in kept]
    assert torch.equal(state["exp_avg"], before[order])


def test_sensitivity_is_averaged_as_the_paper_writes_it():
    search, optimizer = make_search()
    mean, deviation = 0.0, 0.0
    adapter = search.adapters["layers.1.v"]
    for step, _ in enumerate(steps_of(search, optimizer, 5), 1):
        sensitivity = (adapter.A * adapter.A.grad).abs()
        mean = 0.85 * mean + 0.15 * sensitivity
        deviation = 0.85 * deviation + 0.15 * (sensitivity - mean).abs()
        torch.testing.assert_close(search.recorded[adapter][0], mean)
        torch.testing.assert_close(search.recorded[adapter][1], deviation)
        assert search.recorded_steps == step


def test_a_gradient_that_falls_raises_the_uncertainty_as_one_that_rises_does():
    search, _ = make_search()
    adapter = search.adapters["layers.1.v"]
    mean, deviation = 0.0, 0.0
    for size in (5.0, 0.1, 0.1, 3.0, 0.0):
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, size)
        search.recorded[adapter] = search.sensitivities(adapter)
        sensitivity = (adapter.B * size).abs()
        mean = 0.85 * mean + 0.15 * sensitivity
        deviation = 0.85 * deviation + 0.15 * (sensitivity - mean).abs()
    torch.testing.assert_close(search.recorded[adapter][2:4], [mean, deviation])


def test_a_triplets_score_is_that_of_its_number_and_the_means_over_its_row_and_column():
    search, _ = make_search()
    for adapter in search.adapters.values():
        parts = [adapter.A, adapter.A, adapter.B, adapter.B, adapter.E, adapter.E]
        search.recorded[adapter] = [torch.rand_like(part) for part in parts]
    A, A_dev, B, B_dev, E, E_dev = search.recorded[search.adapters["layers.0.q"]]
    for k, score in enumerate(search.score()["layers.0.q"]):
        row = sum(A[k, j] * A_dev[k, j] for j in range(16)) / 16
        column = sum(B[j, k] * B_dev[j, k] for j in range(16)) / 16
        assert score == pytest.approx((E[k] * E_dev[k] + row + column).item(), rel=1e-5)


def test_the_best_triplets_stay():
    search, _ = make_search()
    scores = {name: [0.0, 0.0, 0.0, 0.0] for name in search.adapters}
    scores["layers.0.q"] = [4.0, 1.0, 9.0, 2.0]
    scores["layers.2.v"] = [0.0, 5.0, 0.5, 0.0]
    kept = search.choose(scores, 4 * PRICE + 7)
    assert kept["layers.0.q"] == [2, 0, 3] and kept["layers.2.v"] == [1]
    assert sum(map(len, kept.values())) == 4


def test_a_triplet_that_was_made_useful_by_hand_is_ranked_first():
    search, optimizer = make_search()
    search.adapters["layers.1.v"].E.data[2] = 3.0
    for _ in steps_of(search, optimizer, 5):
        pass
    scores = search.score()
    best = max((score, name, k) for name in scores for k, score in enumerate(scores[name]))
    assert best[1:] == ("layers.1.v", 2)


def test_masked_triplets_can_come_back():
    search, optimizer = make_search()
    gone = set()
    came_back = False
    for step, _ in enumerate(steps_of(search, optimizer, search.last_choice - 1), 1):
        for name, adapter in search.adapters.items():
            for k in range(4):
                if step > search.first_choice and adapter.E[k] == 0:
                    gone.add((name, k))
                elif (name, k) in gone:
                    came_back = True
    assert came_back


def test_the_term_of_the_loss_is_the_distance_from_orthonormal_rows_and_columns():
    search, _ = make_search()
    batch = make_batches()[0]
    distances = []
    for number, adapter in enumerate(search.adapters.values()):
        torch.nn.init.normal_(adapter.A)
        adapter.rank = number % 3  # what is off does not count
        if adapter.rank > 0:
            A, B = adapter.A[: adapter.rank], adapter.B[:, : adapter.rank]
            distances.append((A @ A.T - torch.eye(adapter.rank)).square().sum().sqrt())
            distances.append((B.T @ B - torch.eye(adapter.rank)).square().sum().sqrt())
    assert len(distances) == 8
    expected = loss_fn(search.model, batch) + 0.1 * sum(distances) / 8
    torch.testing.assert_close(search.loss_fn(search.model, batch), expected)


def test_a_run_trains_with_that_term(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    losses = []
    for weight in (0.0, 0.1):
        monkeypatch.setattr(adalora, "ORTHOGONALITY", weight)
        flags = ["--method", "adalora", "--budget", "3000", "--shortcuts", "none"]
        assert run(*flags, "--holdout", "0.2", out=tmp_path / str(weight)) == 0
        losses.append(read_losses(tmp_path / str(weight))[0])
    assert losses[1] > losses[0] + 0.05


@pytest.mark.parametrize("budget", [0, 10**6])
def test_a_budget_of_nothing_or_of_everything_is_kept(budget):
    search, optimizer = make_search(budget)
    for _ in steps_of(search, optimizer, STEPS):
        pass
    assert heterolora.cost(search.adapters) == min(budget, 24 * PRICE)


@pytest.mark.parametrize("method", ["alora", "adalora"])
def test_no_head_is_warmed_up_for_an_allocation_without_a_score(method):
    args = train.parse_args(["--method", method, "--train-limit", "64", "--shortcuts", "none"])
    train.prepare(args)
    assert args.head_warmup == 0


def test_a_run_says_what_it_trained_and_resumes_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    flags = ["--method", "adalora", "--budget", "3000", "--train-limit", "48"]
    flags += ["--max-steps", "12", "--precision", "float32", "--shortcuts", "none"]
    flags += ["--holdout", "0.2", "--max-length", "12"]
    assert train.main([*flags, "--out", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert 2500 < result["params_active"] <= 3000
    assert 4500 <= result["params_ever_trained"] <= 6200
    interrupt_after(5, monkeypatch)
    assert train.main([*flags, "--out", str(tmp_path / "b")]) == 130
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "b")]) == 0
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert (again["dev"], again["ranks"]) == (result["dev"], result["ranks"])

"""RankAdamW against torch.optim.AdamW, on whole parameters and on one parameter for every rank."""

import copy
import io

import pytest
import torch

from extras.adapters import PRoLoRA, SVDLoRA
from extras.part_ranks import RankAdamW, hold_off_ranks, move_ranks
from heterolora import LoRA, set_ranks

LR = 1e-2


def two_adapters():
    """Return {name: LoRA of rank 4}, in float64, with values that are not 0."""
    generator = torch.Generator().manual_seed(0)
    adapters = {"a": LoRA(6, 5, 4, 8.0, generator), "b": LoRA(5, 4, 4, 8.0, generator)}
    for adapter in adapters.values():
        for parameter in adapter.double().parameters():
            parameter.data.normal_(generator=generator)
    return adapters


def parameters_of(adapters):
    return [p for adapter in adapters.values() for p in adapter.parameters()]


def optimizer_of(adapters, kind=RankAdamW, weight_decay=0.1):
    groups = [{"params": parameters_of(adapters), "lr": LR, "weight_decay": weight_decay}]
    return kind(groups, adapters) if kind is RankAdamW else kind(groups)


def train(adapters, optimizer, ranks_by_step, first=0):
    """Take a step for every allocation, with a random loss of which only what is on is a part."""
    for step, ranks in enumerate(ranks_by_step, first):
        generator = torch.Generator().manual_seed(step)
        set_ranks(adapters, ranks)
        optimizer.zero_grad()
        loss = 0.0
        for adapter in adapters.values():
            for parameter, slices in adapter.active(adapter.rank):
                noise = torch.randn(parameter.shape, generator=generator).double()
                if adapter.rank > 0:
                    loss = loss + (parameter * noise)[slices].sum()
        if torch.is_tensor(loss):
            loss.backward()
        optimizer.step()


def random_ranks(steps, choices):
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(choices), (steps // 5, 2), generator=generator).tolist()
    return [{"a": choices[a], "b": choices[b]} for a, b in picks for _ in range(5)]


def test_it_is_adamw_while_modules_are_on_or_off_as_a_whole():
    ours = two_adapters()
    theirs = copy.deepcopy(ours)
    schedule = random_ranks(50, choices=(0, 4))
    train(ours, optimizer_of(ours), schedule)
    train(theirs, optimizer_of(theirs, torch.optim.AdamW), schedule)
    for p, q in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def rank_of(tensor, number, rank):
    """Return a copy of one rank: a row of A, parameter number 0, or a column of B, number 1."""
    part = tensor[rank] if number == 0 else tensor[:, rank]
    return part.detach().clone()


@pytest.mark.parametrize("whole_steps", [0, 10])
def test_every_rank_trains_as_with_an_adamw_of_its_own(whole_steps):
    adapters = two_adapters()
    whole = [{"a": 4, "b": 4}] * whole_steps
    schedule = whole + random_ranks(100, choices=(0, 1, 2, 3, 4))
    ranks = []  # (adapter name, number of the parameter, of the rank, the rank on its own)
    for name, adapter in adapters.items():
        for number, (parameter, _) in enumerate(adapter.active(4)):
            for rank in range(4):
                part = rank_of(parameter, number, rank).requires_grad_()
                ranks.append((name, number, rank, part))
    oracle = torch.optim.AdamW([part for *_, part in ranks], lr=LR, weight_decay=0.1)
    for step, allocation in enumerate(schedule):
        generator = torch.Generator().manual_seed(step)
        noise = {}
        for name, adapter in adapters.items():
            for number, (parameter, _) in enumerate(adapter.active(4)):
                randn = torch.randn(parameter.shape, generator=generator)
                noise[name, number] = randn.double()
        for name, number, rank, part in ranks:
            part.grad = None
            if rank < allocation[name]:
                part.grad = rank_of(noise[name, number], number, rank)
        oracle.step()

    train(adapters, optimizer_of(adapters), schedule)
    for name, number, rank, part in ranks:
        parameter, _ = adapters[name].active(4)[number]
        torch.testing.assert_close(rank_of(parameter, number, rank), part.detach())


def first_step_of_late_ranks(kind):
    """Return its mean length in learning rates, after 1,000 steps of half the module."""
    adapters = two_adapters()
    optimizer = optimizer_of(adapters, kind, weight_decay=0.0)
    train(adapters, optimizer, [{"a": 2}] * 1000)
    parameter, _ = adapters["a"].active(4)[0]
    before = parameter.detach().clone()
    train(adapters, optimizer, [{"a": 4}], first=1000)
    return float((parameter.detach() - before)[2:].abs().mean() / LR)


def test_a_rank_that_comes_on_late_steps_like_a_new_parameter():
    assert first_step_of_late_ranks(RankAdamW) == pytest.approx(1, rel=1e-3)
    assert first_step_of_late_ranks(torch.optim.AdamW) > 2.5


def test_what_is_off_stays_as_it_is_to_the_bit():
    adapters = two_adapters()
    optimizer = optimizer_of(adapters)
    train(adapters, optimizer, [{"a": 4, "b": 4}] * 10)
    parameter, _ = adapters["a"].active(4)[0]
    before = parameter.detach().clone()
    train(adapters, optimizer, [{"a": 3, "b": 1}] * 10)
    assert torch.equal(parameter[3:], before[3:])
    assert not torch.equal(parameter[:3], before[:3])


def test_a_run_that_is_saved_and_loaded_goes_on_the_same():
    adapters = two_adapters()
    optimizer = optimizer_of(adapters)
    schedule = random_ranks(100, choices=(0, 1, 2, 3, 4))
    train(adapters, optimizer, schedule[:50])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(adapters)
    resumed_optimizer = optimizer_of(resumed)
    resumed_optimizer.load_state_dict(torch.load(file))

    train(adapters, optimizer, schedule[50:], first=50)
    train(resumed, resumed_optimizer, schedule[50:], first=50)
    for p, q in zip(parameters_of(adapters), parameters_of(resumed), strict=True):
        assert torch.equal(p, q)


def test_it_goes_on_from_the_state_of_torchs_adamw_and_from_its_own():
    first = two_adapters()
    other = optimizer_of(first, torch.optim.AdamW)
    train(first, other, random_ranks(10, choices=(4,)))
    second = copy.deepcopy(first)
    ours = optimizer_of(second)
    ours.load_state_dict(copy.deepcopy(other.state_dict()))
    third = copy.deepcopy(second)
    again = optimizer_of(third)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    schedule = random_ranks(10, choices=(4,))
    for adapters, optimizer in ((first, other), (second, ours), (third, again)):
        train(adapters, optimizer, schedule)
    for p, q, r in zip(*map(parameters_of, (first, second, third)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert torch.equal(q, r)


def test_a_parameter_that_never_trained_can_be_forgotten_saved_and_loaded():
    adapters = two_adapters()
    optimizer = optimizer_of(adapters)
    optimizer.forget(adapters["a"].active(4)[0][0], slice(1))
    optimizer.load_state_dict(optimizer.state_dict())
    train(adapters, optimizer, random_ranks(5, choices=(4,)))


def test_ranks_move_with_all_their_values_and_moments():
    adapter = SVDLoRA(6, 5, 4, 8.0, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=LR)
    adapter.E.data.normal_()
    adapter(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    before = []
    for parameter in (adapter.A, adapter.E, adapter.B.T):
        before.append(parameter.detach().clone())
    moments = {
        p: dict(state) for p, state in copy.deepcopy(optimizer.state_dict()["state"]).items()
    }
    move_ranks(adapter, [2, 0, 3, 1], optimizer)
    for was, now in zip(before, (adapter.A, adapter.E, adapter.B.T), strict=True):
        assert torch.equal(now, was[[2, 0, 3, 1]])
    for number, parameter in enumerate(adapter.parameters()):
        axis = 1 if parameter is adapter.B else 0
        for name in ("exp_avg", "exp_avg_sq"):
            was = moments[number][name]
            now = optimizer.state[parameter][name]
            assert torch.equal(now, was.index_select(axis, torch.tensor([2, 0, 3, 1])))


def test_a_part_that_is_forgotten_begins_anew_and_the_rest_goes_on():
    adapters = two_adapters()
    optimizer = optimizer_of(adapters)
    train(adapters, optimizer, [{"a": 4, "b": 4}] * 3)
    A = adapters["a"].A
    optimizer.forget(A, 2)
    state = optimizer.state[A]
    assert [state["step"][k].unique().tolist() for k in range(4)] == [[3], [3], [0], [3]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not state[name][2].any() and state[name][[0, 1, 3]].all()


@pytest.mark.parametrize("optimizer_kind", [RankAdamW, torch.optim.AdamW])
def test_a_parameter_with_a_gradient_of_which_nothing_is_on_stays_too(optimizer_kind):
    adapter = PRoLoRA(6, 5, 3, 8.0, torch.Generator().manual_seed(0), unshared=1)
    adapters = {"a": adapter}
    optimizer = optimizer_of(adapters, optimizer_kind)
    for rank in (3, 1, 1):  # with one rank only the unshared one is on
        set_ranks(adapters, {"a": rank})
        optimizer.zero_grad()
        adapter(torch.ones(2, 6)).sum().backward()
        with hold_off_ranks(adapters):
            optimizer.step()
        if rank == 3:
            before = adapter.chunk_A.detach().clone()
    assert torch.equal(adapter.chunk_A, before)

"""Claims about the warm-up before the first score."""

import copy

import pytest
import torch

import data
import heterolora
import train
from extras import warm_up
from extras.runs import Run
from extras.warm_up import first_allocation, mean_scores, warmed_up


@pytest.mark.parametrize("repeat", [0, 1])
@pytest.mark.parametrize("flags", [["--method", "static"], ["--warmup-steps", "4"]])
def test_the_warm_up_trains_what_it_should_and_is_undone(flags, repeat):
    flags = [*flags, "--train-limit", "32", "--batch-size", "8", "--precision", "float32"]
    args = train.parse_args(flags)
    task, tokenizer, model, adapters = train.prepare(args)
    split = data.Split(task.train, tokenizer, 32, model.head[0].weight.device)
    before = copy.deepcopy(model.state_dict())
    with warmed_up(args, model, adapters, split, repeat):
        changed = {
            name for name, value in model.state_dict().items() if (value != before[name]).any()
        }
        loss = train.loss_fn(model, split[list(range(8))])
        loss.backward()
    assert any(name.startswith("head.") for name in changed)
    are_together = "--warmup-steps" in flags
    assert any(".adapter." in name for name in changed) == are_together
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_new_head_of_another_device_is_drawn_on_the_cpu():
    args = train.parse_args(["--method", "head", "--train-limit", "64"])
    _, _, model, _ = train.prepare(args)
    model.draw_head(torch.Generator().manual_seed(0))
    expected = model.head[0].weight.clone()
    model.head.to(torch.float64)  # where a draw of its own would give other numbers
    model.draw_head(torch.Generator().manual_seed(0))
    assert torch.equal(model.head[0].weight, expected.double())
    model.head.to("meta")
    model.draw_head(torch.Generator().manual_seed(0))


def test_without_a_warm_up_nothing_changes():
    args = train.parse_args(["--head-warmup", "0", "--train-limit", "64"])
    task, tokenizer, model, adapters = train.prepare(args)
    split = data.Split(task.train, tokenizer, 32, model.head[0].weight.device)
    before = copy.deepcopy(model.state_dict())
    with warmed_up(args, model, adapters, split):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert heterolora.cost(adapters) == 0


@pytest.mark.parametrize("proxy, is_warmed", [("alignment", False), ("grad-norm", True)])
def test_a_score_that_does_not_see_the_head_waits_for_no_warm_up(monkeypatch, proxy, is_warmed):
    args, search, split = a_search("--proxy", proxy)
    search.proxy = proxy
    calls = []
    train_head = warm_up.train_head
    monkeypatch.setattr(warm_up, "train_head", lambda *flags: calls.append(train_head(*flags)))
    warm_up.first_allocation(args, None, search, split)
    assert bool(calls) == is_warmed


def test_every_joint_warm_up_has_dropout_of_its_own():
    args, search, split = a_search("--warmup-steps", "1")
    states = []
    for repeat in (0, 1):
        with warmed_up(args, search.model, search.adapters, split, repeat):
            states.append(torch.get_rng_state())
    assert not torch.equal(*states)


def test_a_repeat_starts_from_a_new_head():
    args, search, split = a_search("--head-warmup", "0")
    head = search.model.head[0].weight
    before = head.detach().clone()
    with warmed_up(args, search.model, search.adapters, split, repeat=1):
        assert not torch.equal(head, before)
        assert head.std().item() == pytest.approx(before.std().item(), rel=0.05)
    assert torch.equal(head, before)


def test_every_value_is_put_back_after_an_error_too():
    args, search, split = a_search()
    before = copy.deepcopy(search.model.state_dict())
    with pytest.raises(FloatingPointError):
        with warmed_up(args, search.model, search.adapters, split):
            raise FloatingPointError
    after = search.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_warm_up_that_diverges_is_named_and_undone():
    args, search, split = a_search("--warmup-steps", "6", "--lr", "1e18")
    before = copy.deepcopy(search.model.state_dict())
    with pytest.raises(
        FloatingPointError, match="the loss is not finite in the warm-up: try a lower"
    ):
        with warmed_up(args, search.model, search.adapters, split):
            pass
    after = search.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_repeat_sees_other_examples(monkeypatch):
    seen = []
    monkeypatch.setattr(warm_up, "train_head", lambda model, batches, steps: seen.append(batches))
    args, search, split = a_search()
    for repeat in range(2):
        with warmed_up(args, search.model, search.adapters, split, repeat):
            pass
    (first, _), (second, _) = seen[0][0], seen[1][0]  # inputs of the first batch
    assert first[0].shape != second[0].shape or not torch.equal(first[0], second[0])


def a_search(*flags):
    """Return the flags, a search with an encoder of its own, and examples."""
    flags = ["--method", "static", "--train-limit", "64", "--head-warmup", "8", *flags]
    args = train.parse_args([*flags, "--precision", "float32", "--probe-batches", "1"])
    task, tokenizer, model, adapters = train.prepare(args)
    search = heterolora.HeteroLoRA(
        model, adapters, int(args.budget), train.loss_fn, args.proxy, args.allocator, args.seed
    )
    return args, search, data.Split(task.train, tokenizer, 32, model.head[0].weight.device)


def scores_after(args, search, split, repeat):
    """Return the scores of one warm-up, by hand."""
    with warmed_up(args, search.model, search.adapters, split, repeat):
        purpose = f"first probing {repeat}" if repeat else "first probing"
        draws = train.generator(args.seed, purpose)
        return search.score(split.sample(1, args.batch_size, draws))


def test_the_first_allocation_uses_the_mean_score_of_warm_ups_that_differ():
    args, search, split = a_search("--score-repeats", "2")
    first, second = (scores_after(args, search, split, repeat) for repeat in range(2))
    factor = sum(first.values()) / sum(second.values())
    expected = {name: (first[name] + factor * second[name]) / 2 for name in first}
    assert max(abs(first[name] / expected[name] - 1) for name in first) > 0.01
    first_allocation(args, Run(None, is_new=True), search, split)
    assert len(search.history) == 1
    assert search.history[0]["scores"] == pytest.approx(expected, rel=1e-4)
    assert heterolora.cost(search.adapters) == search.history[0]["parameters"] > 0


def test_without_score_repeats_the_scores_are_those_of_one_warm_up():
    args, search, split = a_search()
    expected = scores_after(args, search, split, 0)
    first_allocation(args, Run(None, is_new=True), search, split)
    assert search.history[0]["scores"] == expected


def test_repeats_end_once_the_allocation_stays(capsys):
    args, search, split = a_search("--score-repeats", "9", "--proxy", "alignment-by-type")
    first_allocation(args, Run(None, is_new=True), search, split)
    assert "mean of 2 warm-ups" in capsys.readouterr().out
    assert len(search.history) == 1


def test_mean_scores_take_each_rank_for_itself_and_no_round_outweighs_another():
    small = {"a": [1.0, 3.0], "b": -2.0}  # mean size 2
    large = {"a": [100.0, 0.0], "b": 200.0}  # mean size 100: divide by 50
    assert mean_scores([small, large]) == {"a": [1.5, 1.5], "b": 1.0}
    nothing = {"a": [0.0, 0.0], "b": 0.0}
    assert mean_scores([nothing, nothing]) == nothing


def test_only_a_search_with_a_first_score_can_repeat_it():
    args = train.parse_args(["--method", "lora", "--score-repeats", "2"])
    with pytest.raises(data.InputError, match="no first score"):
        train.prepare(args)

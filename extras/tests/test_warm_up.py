"""Claims about the warm-up before the first score."""

import copy

import pytest
import torch

import data
import heterolora
import train
from extras.warm_up import warmed_up


@pytest.mark.parametrize("flags", [["--method", "static"], ["--warmup-steps", "4"]])
def test_the_warm_up_trains_what_it_should_and_is_undone(flags):
    args = train.parse_args([*flags, "--train-limit", "64", "--precision", "float32"])
    task, tokenizer, model, adapters = train.prepare(args)
    split = data.Split(task.train, tokenizer, 32, "cpu")
    before = copy.deepcopy(model.state_dict())
    with warmed_up(args, model, adapters, split):
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


def test_without_a_warm_up_nothing_changes():
    args = train.parse_args(["--head-warmup", "0", "--train-limit", "64"])
    task, tokenizer, model, adapters = train.prepare(args)
    split = data.Split(task.train, tokenizer, 32, "cpu")
    before = copy.deepcopy(model.state_dict())
    with warmed_up(args, model, adapters, split):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert heterolora.cost(adapters) == 0

"""Measure how fast this machine trains: python -m extras.benchmark [FLAGS OF train.py] --steps N

Four ways take turns on the same batches: plain model.py; with extras/fast_cpu.py; also with only a
quarter of the modules on; and that, while gradients are recorded for a score.
"""

import argparse
import contextlib
import copy
import time

import torch

import data
import heterolora
import train
from data import InputError
from extras.fast_cpu import accelerate, processor_name
from extras.flags import command, number

UNCOUNTED = 3  # first steps of every way: most memory and code is made then
TOTAL = 10**9  # steps of the schedule: the learning rate stays near 0


class Way:
    """One way to train: a model with some of its modules on, recorded by a search or not."""

    def __init__(self, args, model, adapters, every=1, search=None):
        self.model = model.train()
        self.adapters = adapters
        self.optimizer, self.schedule = train.make_optimizer(args, model, adapters, TOTAL)
        self.ranks = {name: adapters[name].max_rank for name in list(adapters)[::every]}
        self.search = search
        self.seconds = 0.0

    def step(self, split, indices):
        """Make one training step -> seconds"""
        heterolora.set_ranks(self.adapters, self.ranks)
        start = time.perf_counter()
        batch = split[indices]
        with self.search.record() if self.search else contextlib.nullcontext():
            train.loss_fn(self.model, batch).backward()
        train.update(self.model, self.adapters, self.optimizer, self.schedule)
        if split.device.type == "cuda":  # which may still be at work
            torch.cuda.synchronize(split.device)
        return time.perf_counter() - start


def benchmark(args, steps):
    """Print the speed of every way. Raises InputError for flags without adapters or recording."""
    task, tokenizer, model, adapters = train.prepare(args)
    if not adapters:
        raise InputError(f"--method {args.method} has no modules to switch: use dynamic")
    if heterolora.PROXIES[args.proxy].measure is None:
        raise InputError(f"--proxy {args.proxy} is not recorded in training: use grad-norm")
    device = model.head[0].weight.device
    plain, plain_adapters = copy.deepcopy((model, adapters))
    swapped = accelerate(model, args.precision) if device.type == "cpu" else "nothing"
    search = heterolora.HeteroLoRA(
        model, adapters, int(args.budget), train.loss_fn, args.proxy, args.allocator, args.seed
    )
    ways = {
        "plain, all on": Way(args, plain, plain_adapters),
        "all on": Way(args, model, adapters),
        "a quarter on": Way(args, model, adapters, every=4),
        "recorded": Way(args, model, adapters, every=4, search=search),
    }
    print(f"machine {processor_name()} | {device} | {torch.get_num_threads()} threads")
    print(f"model   {args.model} in {args.precision} | swapped: {swapped}", flush=True)

    split = data.Split(task.train, tokenizer, args.max_length, device, args.precision)
    order = train.generator(args.seed, "data order")
    batches = data.batches(split.lengths, args.batch_size, order)
    samples = 0
    for i in range(UNCOUNTED + steps):
        indices = batches[i % len(batches)]
        seconds = [way.step(split, indices) for way in ways.values()]
        if i >= UNCOUNTED:
            samples += len(indices)
            for way, spent in zip(ways.values(), seconds, strict=True):
                way.seconds += spent
    for name, way in ways.items():
        ms = 1000 * way.seconds / steps
        rate = samples / way.seconds
        ratio = ways["plain, all on"].seconds / way.seconds
        print(f"{name:13} | {ms:7.1f} ms/step | {rate:7.1f} samples/s | {ratio:.2f} times plain")

    # What one allocation adds to the steps since the one before it.
    interval = max(1, round(args.realloc_every * len(batches)))
    step = ways["a quarter on"].seconds / steps
    recorded_step = ways["recorded"].seconds / steps
    recording = min(args.probe_batches, interval) * (recorded_step - step)
    start = time.perf_counter()
    search.reallocate()
    allocating = time.perf_counter() - start
    share = (recording + allocating) / (interval * step)
    print(f"search        | {share:.1%} of the time that training takes")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="extras.benchmark", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--steps", type=number(int, 0), default=40, help="to measure (40)")
    ours, flags = parser.parse_known_args(argv)
    benchmark(train.parse_args(flags), ours.steps)


if __name__ == "__main__":
    main()

"""Compare our training speed with that of transformers + peft (install both).

    python -m extras.beside_peft [FLAGS OF train.py] --steps N

Both train LoRA of the same rank on q and v, and take turns after every step on the same texts.
Theirs has its weights in float32. Its head reads the first token, as ours does with --pooling cls,
and trains one layer, where ours trains two.
"""

import argparse
import time

import torch

import data
import train
from data import InputError
from extras.benchmark import UNCOUNTED, Way
from extras.checkpoints import find_checkpoint
from extras.fast_cpu import accelerate, processor_name
from extras.flags import command, number

PARTS = 3  # of the steps, for the spread of the ratio
OURS = ["--method", "lora", "--adapter", "lora", "--targets", "q,v", "--shortcuts", "none"]


class Theirs:
    """The usual way to train LoRA: transformers + peft + AdamW. Raises InputError without them."""

    def __init__(self, args, task, device):
        try:
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise InputError(f"{error}: pip install transformers peft") from None
        folder = find_checkpoint(args.model)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [example[0] for example in task.train]
        pairs = None if task.train[0][1] is None else [example[1] for example in task.train]
        self.encoded = self.tokenizer(texts, pairs, truncation=True, max_length=args.max_length)
        self.labels = torch.tensor([example[2] for example in task.train])
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(task.labels)
        )
        lora = {"r": args.rank, "lora_alpha": args.alpha, "target_modules": ["query", "value"]}
        self.model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **lora))
        self.model.float().to(device).train()  # a checkpoint may be in 16 bits
        self.device = device
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.lr)

    def step(self, indices):
        """Make one training step -> seconds"""
        start = time.perf_counter()
        rows = {key: [values[i] for i in indices] for key, values in self.encoded.items()}
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.device)
        loss = self.model(**batch, labels=self.labels[indices].to(self.device)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":  # which may still be at work
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def compare(args, steps):
    """Print the speed of both and the ratio. Raises InputError."""
    task, tokenizer, model, adapters = train.prepare(args)
    device = model.head[0].weight.device
    theirs = Theirs(args, task, device)
    swapped = accelerate(model, args.precision) if device.type == "cpu" else "nothing"
    ours = Way(args, model, adapters)
    print(f"machine {processor_name()} | {device} | {torch.get_num_threads()} threads")
    print(
        f"ours    {args.model} in {args.precision}, {args.pooling} | swapped: {swapped}", flush=True
    )

    split = data.Split(task.train, tokenizer, args.max_length, device, args.precision)
    order = train.generator(args.seed, "data order")
    batches = data.batches(split.lengths, args.batch_size, order)
    steps_made = []  # (samples, seconds of theirs, seconds of ours)
    for i in range(UNCOUNTED + steps):
        indices = batches[i % len(batches)]
        made = (len(indices), theirs.step(indices), ours.step(split, indices))
        if i >= UNCOUNTED:
            steps_made.append(made)
    parts = torch.tensor(steps_made).tensor_split(PARTS)
    samples, their_seconds, our_seconds = torch.stack([part.sum(0) for part in parts], 1)
    for name, seconds in (("theirs", their_seconds), ("ours", our_seconds)):
        rates = ", ".join(f"{rate:.1f}" for rate in samples / seconds)
        print(f"{name:7} | {rates} samples/s")
    ratio = their_seconds / our_seconds
    print(f"ratio   | {ratio.mean():.2f} ± {ratio.std():.2f}")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="extras.beside_peft", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    at_least_one_a_part = number(int, PARTS - 1)
    parser.add_argument("--steps", type=at_least_one_a_part, default=120, help="to measure (120)")
    ours, flags = parser.parse_known_args(argv)
    compare(train.parse_args([*flags, *OURS]), ours.steps)


if __name__ == "__main__":
    main()

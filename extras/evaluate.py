"""Evaluate a finished run: python -m extras.evaluate RUN [--task NAME] [--data-dir DIR]

The task is the run's own, or another of the same form: as many texts, and the same labels. A run
with a held-out part is evaluated on that, also where its task has moved.
"""

import argparse
import os

import data
import train
from data import InputError
from extras import setup
from extras.devices import round_frozen
from extras.fast_cpu import accelerate
from extras.flags import command
from extras.runs import in_words


def evaluate_run(folder, task_name=None, data_dir=None, checkpoint=None):
    """Return {metric: value, ..., "loss": mean} over the dev set. Raises InputError."""
    model = train.load_run(folder, checkpoint)
    if data_dir:
        model.args.data_dir = data_dir
    if task_name:
        name = os.path.basename(os.path.normpath(task_name))
        if name != os.path.basename(model.args.task):
            model.args.holdout = None  # another task has a dev set of its own
        model.args.task = task_name
    name = model.args.task
    task = setup.read_task(model.args)
    texts = 1 if task.dev[0][1] is None else 2
    if list(task.labels) != list(model.labels) or texts != model.texts:
        raise InputError(
            f"{folder} sorts {model.texts} text(s) into {', '.join(model.labels)}; "
            f"{name} has {texts} and {', '.join(task.labels)}"
        )
    # Batches and rounding as in training, so that the run's figures come out again.
    precision = model.args.precision
    split = data.Split(task.dev, model.tokenizer, model.args.max_length, "cpu", precision)
    round_frozen(model.encoder, precision)
    accelerate(model, precision)
    return train.evaluate(model, split, task.metric)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="extras.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--task")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", help="the checkpoint, if it has moved")
    args = parser.parse_args(argv)
    values = evaluate_run(args.run, args.task, args.data_dir, args.model)
    print(f"eval {in_words(values)}")


if __name__ == "__main__":
    main()

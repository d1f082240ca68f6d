"""Classify text with a finished run: python -m extras.predict RUN "One text." ["Its second text."]

Without a text, every line of standard input is one example; a tab stands between two texts. Every
line has its answer, in the same order.
"""

import argparse
import sys

import torch

import data
import train
from data import InputError
from extras.files import say
from extras.flags import command

BATCH = 32  # lines that are classified together; one by one where somebody types them


def predict(model, examples):
    """Return [(label, probability)] of tuples of texts. Raises InputError."""
    encoded = []
    for texts in examples:
        encoded.append(model.tokenizer.encode(*texts, max_length=model.args.max_length))
    with torch.inference_mode():
        logits = model(*data.pad(encoded, model.tokenizer.pad_id))
    probabilities, numbers = logits.softmax(1).max(1)
    if not probabilities.isfinite().all():
        raise InputError("the run gives no finite probability: are its weights damaged?")
    labels = [model.labels[number] for number in numbers]
    return list(zip(labels, probabilities.tolist(), strict=True))


def check(model, texts, place=""):
    """Raise InputError unless an example has as many texts as the training examples."""
    if len(texts) != model.texts:
        raise InputError(
            f"{place}the run wants {model.texts} text(s) in an example, not {len(texts)}"
        )


def examples_of(lines, model):
    """Yield the examples of lines of bytes. Raises InputError with the number of a wrong line."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            texts = text.removesuffix("\n").removesuffix("\r").split("\t")
        except UnicodeDecodeError as error:
            raise InputError(f"line {number}, byte {error.start}: not UTF-8") from None
        check(model, texts, f"line {number}: ")
        yield texts


def in_batches(examples, size):
    """Yield lists of `size` examples. What came before a wrong one is yielded before its error."""
    batch = []
    try:
        for example in examples:
            batch.append(example)
            if len(batch) == size:
                yield batch
                batch = []
    except InputError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="extras.predict", description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("texts", nargs="*", help="one example (default: lines of standard input)")
    parser.add_argument("--model", help="the checkpoint, if it has moved")
    args = parser.parse_args(argv)
    model = train.load_run(args.run, args.model)
    if args.texts:
        check(model, args.texts)
        batches = [[args.texts]]
    else:
        if sys.stdin is None:
            raise InputError("no text is given, and standard input is closed")
        size = 1 if sys.stdin.isatty() else BATCH
        batches = in_batches(examples_of(sys.stdin.buffer, model), size)
    for batch in batches:
        for label, probability in predict(model, batch):
            say(f"label {label} | probability {probability:.4f}")


if __name__ == "__main__":
    main()

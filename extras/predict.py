"""Classify text with a finished run: python -m extras.predict RUN "One text." ["Its second text."]

Without a text, every line of standard input is one example; a tab stands between two texts.
"""

import argparse
import sys

import torch

import data
import train
from data import InputError


def predict(model, texts):
    """Return the label of a tuple of texts and its probability. Raises InputError."""
    if len(texts) != model.texts:
        raise InputError(
            f"the run takes {model.texts} text(s) for an example, and {len(texts)} came"
        )
    encoded = model.tokenizer.encode(*texts, max_length=model.args.max_length)
    with torch.inference_mode():
        logits = model(*data.pad([encoded], model.tokenizer.pad_id))
    probability, number = logits.softmax(1)[0].max(0)
    if not probability.isfinite():
        raise InputError("the run gives no finite probability: are its weights damaged?")
    return model.labels[number], probability.item()


def main(argv=None):
    """Run the command line -> exit status"""
    parser = argparse.ArgumentParser(prog="extras.predict", description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("texts", nargs="*", help="one example (default: lines of standard input)")
    parser.add_argument("--model", help="the checkpoint, if it has moved")
    args = parser.parse_args(argv)
    try:
        model = train.load_run(args.run, args.model)
        examples = [args.texts]
        if not args.texts:
            examples = (line.rstrip("\r\n").split("\t") for line in sys.stdin)
        for example in examples:
            label, probability = predict(model, example)
            print(f"label {label} | probability {probability:.4f}", flush=True)
    except InputError as error:
        print(f"predict: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

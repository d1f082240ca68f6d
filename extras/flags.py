"""What a flag may be: types for argparse. How a command says what is wrong with its input."""

import argparse
import functools
import math
import os
import re
import sys
import warnings

import torch

from data import InputError


def number(kind, above, most=sys.maxsize):
    """Return an argparse type: an int or float over a limit, and at most another."""

    def parse(text):
        value = kind(text)
        if not above < value <= most:
            least = f"at least {above + 1}" if kind is int else f"more than {above}"
            raise argparse.ArgumentTypeError(f"{text}: want {least}, at most {most}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def arguments(argv=None):
    """Return the arguments of a command. Raises InputError for an empty one.

    That comes from a shell variable that is not set, and is never meant.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for place, argument in enumerate(argv, 1):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            raise InputError(f"argument {place} is empty: is a shell variable not set?")
    return argv


def names(text):
    """Split "q,v" into a list; "none" is the empty one."""
    return [] if text == "none" else text.split(",")


def whole_number(text):
    """Turn "12000" or "12,000" into 12000, and any other text into None."""
    if re.fullmatch(r"\d{1,15}|\d{1,3}(,\d{3}){1,4}", text):
        return int(text.replace(",", ""))
    return None


def parse_budget(text, most):
    """Turn "25%" or "0.25", shares of `most`, or "12,000" into parameters. Raises InputError.

    A whole number counts parameters, also 1; a comma is allowed between thousands only.
    """
    budget = whole_number(text)
    if re.fullmatch(r"\d{1,3}(\.\d{1,15})?%", text):
        budget = math.floor(float(text[:-1]) / 100 * most + 1e-6)
    if re.fullmatch(r"\d{0,3}\.\d{1,15}", text):
        budget = math.floor(float(text) * most + 1e-6)
    if budget is None or budget > most:
        allowed = f"25% or 0.25, or a number up to {most:,} parameters"
        raise InputError(f"budget {text!r}: want {allowed}")
    return budget


def command(main):
    """Make main(argv) say in a line what is wrong with its input, and exit with status 2 then.

    A warning is a line too. So is Ctrl-C, with status 130.
    """

    @functools.wraps(main)
    def run(argv=None):
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
        try:
            try:
                main(arguments(argv))
            finally:  # not at the end of Python, where nothing catches an error
                if sys.stdout:
                    sys.stdout.flush()
        except BrokenPipeError:  # who reads the output, such as `head`, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (InputError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    return run

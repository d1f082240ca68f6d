"""What a flag may be: types for argparse, whose errors say what is wanted."""

import argparse
import math
import re
import sys

from data import InputError


def number(kind, above, most=sys.maxsize):
    """Return an argparse type: an int or float over a limit, and at most another."""

    def parse(text):
        value = kind(text)
        if not above < value <= most:
            raise argparse.ArgumentTypeError(f"{text}: want more than {above}, at most {most}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def path(text):
    """Return a name, which may not be empty, as that of an unset variable is."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def names(text):
    """Split "q,v" into a list; "none" is the empty one."""
    return [] if text == "none" else text.split(",")


def parse_budget(text, most):
    """Turn "25%" or "0.25", shares of `most`, or "12,000" into parameters. Raises InputError.

    A whole number counts parameters, also 1; a comma is allowed between thousands only.
    """
    error = InputError(f"budget {text!r}: want 25% or 0.25, or a number up to {most:,} parameters")
    if re.fullmatch(r"\d+|\d{1,3}(,\d{3})+", text):
        budget = int(text.replace(",", ""))
    elif re.fullmatch(r"\d+(\.\d+)?%", text):
        budget = math.floor(float(text[:-1]) / 100 * most + 1e-6)
    elif re.fullmatch(r"\d*\.\d+", text):
        budget = math.floor(float(text) * most + 1e-6)
    else:
        raise error
    if budget > most:
        raise error
    return budget

"""Read the config.json of a Hugging Face checkpoint, and refuse what no encoder can have."""

import dataclasses
import os

from data import InputError
from extras.files import read_json
from model import ACTIVATIONS, EncoderConfig

RANGES = {  # the lowest and highest value of a field; the other whole numbers go from 1 to 10^7
    "num_hidden_layers": (1, 1000),
    "pad_token_id": (0, 10_000_000),
    "hidden_dropout_prob": (0, 0.99),
    "attention_probs_dropout_prob": (0, 0.99),
    "layer_norm_eps": (1e-20, 1),
    "initializer_range": (1e-20, 1),
}


def read_encoder_config(path):
    """Return the EncoderConfig of a config.json, with Hugging Face's defaults for what is left out.

    Raises InputError for a missing file, and for an architecture that Encoder does not compute.
    """
    if not os.path.isfile(path):
        folder = os.path.dirname(path)
        raise InputError(f"{folder}: no Hugging Face checkpoint: there is no config.json in it")
    given = read_json(path)
    if "model_type" not in given:
        raise InputError(f"{path}: no model_type: not the config.json of a BERT or RoBERTa")
    if given.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{path}: position_embedding_type: only 'absolute' is supported")
    for field in ("is_decoder", "add_cross_attention"):
        if given.get(field, False):
            raise InputError(f"{path}: {field} is true: only encoders are supported")
    is_roberta = given["model_type"] == "roberta"
    fields = {"vocab_size": 50265, "pad_token_id": 1} if is_roberta else {}
    for field in dataclasses.fields(EncoderConfig):
        if field.name in given:
            fields[field.name] = given[field.name]
    config = EncoderConfig(**fields)
    check_config(path, config)
    return config


def check_config(path, config):
    """Raise InputError for a value that no encoder can have."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = (int, float) if field.type is float else (field.type,)
        if type(value) not in kind:
            raise InputError(f"{path}: {field.name} {value!r}: want a {field.type.__name__}")
        low, high = RANGES.get(field.name, (1, 10_000_000))
        if field.type is not str and not low <= value <= high:  # NaN is in no range
            raise InputError(f"{path}: {field.name} {value}: want {low} to {high}")
    if config.model_type not in ("bert", "roberta"):
        raise InputError(f"{path}: model_type {config.model_type!r}: want bert or roberta")
    if config.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"{path}: hidden_act {config.hidden_act!r}: want one of {known}")
    D, H = config.hidden_size, config.num_attention_heads
    if D % H:
        raise InputError(f"{path}: hidden_size {D} is not a multiple of num_attention_heads {H}")
    P, pad = config.max_position_embeddings, config.pad_token_id
    if config.model_type == "roberta" and P <= pad + 1:  # where its positions begin
        raise InputError(f"{path}: pad_token_id {pad} leaves none of the {P} positions")

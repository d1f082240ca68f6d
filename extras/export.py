"""Write a finished run as an ordinary Hugging Face checkpoint, as a PEFT adapter, or as both.

    python -m extras.export RUN --merge DIR    # LoRA folded into the weights
    python -m extras.export RUN --peft DIR     # LoRA beside the weights of the checkpoint

With --pooling cls the head is that of Hugging Face's classifiers. They know no other pooling: with
mean it is in a file beside, head.safetensors (0.weight, 0.bias, then tanh, 3.weight, 3.bias).
"""

import argparse
import dataclasses
import json
import os
import shutil

import torch

import train
from data import InputError
from extras.checkpoints import hf_name, write_checkpoint, write_safetensors
from extras.files import cache_path, new_folder, read_json, write
from extras.flags import command
from extras.plan import exact_patterns
from heterolora import LoRA, LoRALinear, LoRAShortcut

HEADS = {  # number of a linear in our head -> its name in the family's classifier
    "bert": {"0": "bert.pooler.dense", "3": "classifier"},
    "roberta": {"0": "classifier.dense", "3": "classifier.out_proj"},
}
HEAD_MODULES = {"bert": ["classifier", "pooler"], "roberta": ["classifier"]}
TOKENIZER_FILES = ("vocab.", "merges.", "tokenizer", "special_tokens")  # how their names begin


def full_name(classifier, name):
    """Return Hugging Face's name of a part of the encoder, in a classifier or in a bare model."""
    prefix = f"{classifier.config.model_type}." if classifier.pooling == "cls" else ""
    return prefix + hf_name(name)


def add_head(classifier, tensors):
    """Add the head to tensors {full name: tensor}, if Hugging Face's classifiers have it."""
    if classifier.pooling == "cls":
        for name, tensor in classifier.head.state_dict().items():
            number, last = name.split(".")
            tensors[f"{HEADS[classifier.config.model_type][number]}.{last}"] = tensor


def write_head_apart(classifier, folder):
    """Write head.safetensors, if Hugging Face's classifiers do not have the head."""
    if classifier.pooling != "cls":
        write_safetensors(os.path.join(folder, "head.safetensors"), classifier.head.state_dict())


@torch.no_grad()
def merged_weight(linear):
    """Return W + dW (d_out, d_in) of a LoRALinear: a plain linear with it computes the same.

    Raises InputError for an adapter that is no linear map.
    """
    W = linear.host.weight
    identity = torch.eye(W.shape[1], device=W.device)
    dW = linear.adapter(identity).T  # adapters map rows: row i of the result is column i of dW
    x = torch.randn(8, W.shape[1], device=W.device)
    expected = x @ dW.T
    if (linear.adapter(x) - expected).norm() > 1e-3 * expected.norm():
        kind = type(linear.adapter).__name__
        raise InputError(f"--merge writes weights, and {kind} is no linear map: use the run itself")
    return (W + dW).to(W.dtype)


def merged_state(encoder):
    """Return the state dict of a plain encoder that computes what this one does, adapters included.

    Connections have no weights to fold an adapter into: theirs must be off.
    """
    state = {}
    for name, tensor in encoder.state_dict().items():
        if ".adapter." not in name:
            state[name.replace(".host.", ".")] = tensor
    for name, module in encoder.named_modules():
        if isinstance(module, LoRALinear) and module.adapter.rank > 0:
            state[f"{name}.weight"] = merged_weight(module)
    return state


def save_merged(classifier, folder):
    """Write a new Hugging Face folder: the checkpoint's config.json and tokenizer, new weights."""
    checkpoint = classifier.encoder.folder
    config = read_json(os.path.join(checkpoint, "config.json"))
    config.pop("dtype", None)  # the newer name of torch_dtype
    config |= dataclasses.asdict(classifier.config) | {"torch_dtype": "float32"}
    kind = "Model"
    if classifier.pooling == "cls":
        kind = "ForSequenceClassification"
        config.pop("num_labels", None)  # of another classifier; id2label tells it
        config["problem_type"] = "single_label_classification"
        config["id2label"] = dict(enumerate(classifier.labels))
        config["label2id"] = {label: number for number, label in enumerate(classifier.labels)}
    config["architectures"] = [classifier.config.model_type.capitalize() + kind]
    state = merged_state(classifier.encoder)
    tensors = {full_name(classifier, name): tensor for name, tensor in state.items()}
    add_head(classifier, tensors)
    with new_folder(folder) as new:
        write_checkpoint(new, config, tensors)
        write_head_apart(classifier, new)
        for name in os.listdir(checkpoint):
            path = os.path.join(checkpoint, name)
            if name.startswith(TOKENIZER_FILES) and os.path.isfile(path):
                shutil.copyfile(path, os.path.join(new, name))


def save_peft(classifier, folder):
    """Write a new folder with the LoRA modules that are on, as Hugging Face's PEFT reads it.

    Ranks and alphas may differ from module to module.
    """
    on = {full_name(classifier, name): a for name, a in classifier.adapters.items() if a.rank > 0}
    ranks, alphas = exact_patterns(on)
    tensors = {}
    for module, adapter in on.items():
        A, B = [parameter[slices] for parameter, slices in adapter.active(adapter.rank)]
        tensors[f"{module}.lora_A.weight"] = A
        tensors[f"{module}.lora_B.weight"] = B
    downloads = os.path.join(os.path.abspath(cache_path("hub")), "")
    hub_id_or_path = os.path.abspath(classifier.encoder.folder).removeprefix(downloads)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": hub_id_or_path,
        "target_modules": sorted(on),
        "r": max(ranks.values()),
        "rank_pattern": ranks,
        "lora_alpha": max(alphas.values()),
        "alpha_pattern": alphas,
    }
    if classifier.pooling == "cls":
        modules = HEAD_MODULES[classifier.config.model_type]
        config |= {"task_type": "SEQ_CLS", "modules_to_save": modules}
    add_head(classifier, tensors)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    with new_folder(folder) as new:
        write(os.path.join(new, "adapter_config.json"), json.dumps(config, indent=1))
        write_safetensors(os.path.join(new, "adapter_model.safetensors"), tensors)
        write_head_apart(classifier, new)


def check_adapters(classifier, for_peft):
    """Raise InputError for adapters that the new folders cannot hold."""
    on = {name: adapter for name, adapter in classifier.adapters.items() if adapter.rank > 0}
    for name, adapter in on.items():
        if isinstance(classifier.encoder.get_submodule(name), LoRAShortcut):
            advice = "train with --shortcuts none, or use the run itself (train.load_run)"
            raise InputError(f"the shortcut {name} is on, and other formats have none: {advice}")
        if for_peft and type(adapter) is not LoRA:
            raise InputError(f"--peft writes LoRA, not {type(adapter).__name__}: use --merge")
    if for_peft and not on:
        raise InputError("--peft writes LoRA, and none is on: use --merge")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="extras.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder of a finished run (--out of train.py)")
    parser.add_argument("--merge", metavar="DIR", help="new folder for an ordinary checkpoint")
    parser.add_argument("--peft", metavar="DIR", help="new folder for a PEFT adapter")
    parser.add_argument("--model", help="the checkpoint, if it has moved")
    args = parser.parse_args(argv)
    folders = [os.path.abspath(folder) for folder in (args.merge, args.peft) if folder]
    if not folders:
        raise InputError("give --merge DIR, --peft DIR, or both")
    if len(folders) > 1:
        merged, peft = [os.path.join(folder, "") for folder in folders]
        if merged.startswith(peft) or peft.startswith(merged):
            raise InputError("give --merge and --peft different folders, none in the other")
    for folder in folders:
        if os.path.exists(folder):
            raise InputError(f"{folder} is there already: give a new folder")
    classifier = train.load_run(args.run, args.model)
    check_adapters(classifier, for_peft=bool(args.peft))
    where = "" if classifier.pooling == "cls" else "; the head is in head.safetensors"
    if args.merge:
        save_merged(classifier, args.merge)
        print(f"{args.merge}: an ordinary checkpoint{where}")
    if args.peft:
        save_peft(classifier, args.peft)
        print(f"{args.peft}: a PEFT adapter{where}")


if __name__ == "__main__":
    main()

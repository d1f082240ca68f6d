"""Train the small encoder that ships in builtin/: python -m extras.make_builtin NEW_FOLDER

Masked language modelling from scratch (Devlin et al. 2018, without next-sentence prediction). Two
things make it work in 80 seconds: positions start as sinusoids (Vaswani et al. 2017), and a
replaced word is one that follows the same word elsewhere, so that only the meaning gives it away
(as in ELECTRA, Clark et al. 2020). Seeded, but another processor gives slightly other weights.
"""

import argparse
import os
import random
import string
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from extras.checkpoints import save_encoder
from extras.flags import command
from extras.language import LEXICON, Language, concepts, participle
from extras.tokenizers import WordPiece
from model import Encoder, EncoderConfig

TEXTS = 40_000
STEPS = 2400
BATCH_SIZE = 32
LR = 2e-3
PREDICTED = 0.3  # share of the words that the encoder has to predict
MASKED, KEPT = 0.6, 0.1  # shares of these that it sees masked, and as they are; others are replaced
CHOICES = 512  # replacements to choose from, for every word before


def corpus(size, seed=1):
    """Return (text, second text or None) to train an encoder on. Most are pairs much alike."""
    language = Language(random.Random(f"corpus {seed}"))
    texts = []
    for number in range(size):
        if number % 12 == 0:
            texts.append(language.sentiment(language.rng.randrange(2)))
        elif number % 12 == 1:
            texts.append((language.sentence(language.event(near=True)), None))
        else:
            texts.append(language.paraphrase(language.chance(0.8)))
    return texts


def vocabulary():
    """Return the tokens in the order of their ids: special ones, characters, and words."""
    words = set()
    for kind in LEXICON:
        for word in " ".join(sum(concepts(kind), [])).split():
            inflected = {"person": [word + "s"], "verb": [word + "s", participle(word)]}
            words |= {word, *inflected.get(kind, [])}
    characters = sorted(string.ascii_lowercase + string.digits + string.punctuation)
    endings = ["##" + character for character in characters]
    words = sorted(words - set(characters))
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *endings, *words]


def initialise(encoder):
    """Draw the weights. Positions are sinusoids."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.06)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
    n, D = encoder.position.weight.shape
    frequency = 1000 ** (-torch.arange(0, D, 2) / D)  # (D/2,)
    angle = torch.arange(n)[:, None] * frequency  # (n, D/2)
    encoder.position.weight.data = 0.1 * torch.cat([angle.sin(), angle.cos()], 1)


def make_replacements(sequences, vocab_size, mask_id, first_word):
    """Return (vocab_size, CHOICES): for each token, words that follow it in the sequences."""
    followers = [[] for _ in range(vocab_size)]
    for ids, _ in sequences:
        for before, word in zip(ids[:-1], ids[1:], strict=True):
            if word >= first_word:
                followers[before].append(word)
    rows = []
    for words in followers:
        words = torch.tensor(words or [mask_id])
        rows.append(words[torch.randint(len(words), (CHOICES,))])
    return torch.stack(rows)


def corrupt(input_ids, replacements, mask_id, first_word):
    """input_ids (B, T) -> what the encoder sees (B, T), and where it has to predict (B, T)"""
    picked = (torch.rand(input_ids.shape) < PREDICTED) & (input_ids >= first_word)
    fate = torch.rand(input_ids.shape)
    before = input_ids.roll(1, 1)
    replaced = replacements[before, torch.randint(CHOICES, input_ids.shape)]
    seen = torch.where(picked & (fate >= MASKED + KEPT), replaced, input_ids)
    seen = torch.where(picked & (fate < MASKED), mask_id, seen)
    return seen, picked


def pretrain(config, tokenizer, texts):
    """Return an Encoder trained to predict words. Prints the mean loss every 200 steps."""
    torch.manual_seed(0)
    encoder = Encoder(config)
    initialise(encoder)
    transform = nn.Linear(config.hidden_size, config.hidden_size)
    bias = nn.Parameter(torch.zeros(config.vocab_size))

    sequences = [tokenizer.encode(*text) for text in texts]
    lengths = [len(ids) for ids, _ in sequences]
    mask_id = tokenizer.mask_id
    longer = [token for token in tokenizer.vocab if token.isalpha() and len(token) > 1]
    first_word = tokenizer.vocab[longer[0]]  # special tokens and characters come before it
    replacements = make_replacements(sequences, config.vocab_size, mask_id, first_word)

    parameters = [*encoder.parameters(), *transform.parameters(), bias]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        LR,
        total_steps=STEPS,
        pct_start=0.05,
        anneal_strategy="linear",
        cycle_momentum=False,  # or it would change beta1 too
    )
    start = time.perf_counter()
    queue = []
    losses = []
    for step in range(1, STEPS + 1):
        queue = queue or data.batches(lengths, BATCH_SIZE, torch.default_generator)
        batch = [sequences[i] for i in queue.pop()]
        input_ids, attention_mask, token_type_ids = data.pad(batch, config.pad_token_id)
        seen, picked = corrupt(input_ids, replacements, mask_id, first_word)
        hidden = encoder(seen, attention_mask, token_type_ids)[picked]  # (words picked, D)
        logits = F.linear(F.gelu(transform(hidden)), encoder.word.weight, bias)
        loss = F.cross_entropy(logits, input_ids[picked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 200 == 0 or step == STEPS:
            mean = sum(losses) / len(losses)
            seconds = time.perf_counter() - start
            print(f"step {step:5d}/{STEPS} | mean loss {mean:.3f} | {seconds:.0f} s", flush=True)
            losses.clear()
    return encoder


def make(folder):
    """Train the encoder and write it as a Hugging Face folder with float16 weights.

    Raises InputError if the folder is there already.
    """
    if os.path.exists(folder):
        raise data.InputError(f"{folder} is there already: give a new folder")
    tokens = vocabulary()
    config = EncoderConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokenizer = WordPiece({token: i for i, token in enumerate(tokens)})
    encoder = pretrain(config, tokenizer, corpus(TEXTS))
    texts = {"vocab.txt": "\n".join(tokens) + "\n"}
    save_encoder(encoder, folder, dtype=torch.float16, texts=texts)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="extras.make_builtin", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a new one")
    args = parser.parse_args(argv)
    make(args.folder)


if __name__ == "__main__":
    main()

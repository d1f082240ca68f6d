"""Train the small encoder that ships in builtin/: python -m extras.make_builtin NEW_FOLDER

Masked language modelling from scratch (Devlin et al. 2018, without next-sentence prediction) on
40,000 texts of the built-in language. Two things make it work in 80 seconds: positions start as
sinusoids (Vaswani et al. 2017), and a replaced word is one that follows the same word elsewhere, so
that only the meaning gives it away (as in ELECTRA, Clark et al. 2020). It is seeded, but processors
round differently: another one gives slightly other weights. That is why the weights are shipped.
"""

import itertools
import random
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from extras.checkpoints import save_encoder
from extras.language import FUNCTION_WORDS, LEXICON, Language, participle
from extras.tokenizers import WordPiece
from model import Encoder, EncoderConfig

TEXTS = 40_000
STEPS = 2400
BATCH_SIZE = 32
LR = 2e-3
MASK = 0.3  # share of the words that are predicted; of these 60 % masked, 30 % replaced, 10 % kept
CHOICES = 512  # replacements to choose from, for every word before


def vocabulary():
    """Return the tokens in the order of their ids: special ones, characters, and words."""
    words = FUNCTION_WORDS.split()
    for kind in LEXICON.values():
        for concept in kind:
            for synonym in concept:
                words += synonym.split()
    for concept in LEXICON["person"] + LEXICON["verb"]:
        words += [word + "s" for word in concept]
    for concept in LEXICON["verb"]:
        words += [participle(word) for word in concept]
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    endings = ["##" + character for character in characters]
    words = sorted(set(words) - set(characters))
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *endings, *words]


def corpus(size, seed=1):
    """Return text without labels: single sentences, and pairs that resemble each other."""
    language = Language(random.Random(f"corpus {seed}"))
    kinds = itertools.cycle(["sentiment", "event"] + ["pair"] * 10)
    texts = []
    for kind in itertools.islice(kinds, size):
        if kind == "sentiment":
            texts.append(language.sentiment(language.rng.randrange(2)))
        elif kind == "event":
            texts.append((language.sentence(language.event(near=True)), None))
        else:
            texts.append(language.paraphrase(language.rng.random() < 0.8))
    return texts


def initialise(encoder):
    """Draw the weights. Positions are sinusoids."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.06)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
    n, D = encoder.position.weight.shape
    angle = torch.arange(n)[:, None] * 1000 ** (-torch.arange(0, D, 2) / D)  # (n, D/2)
    encoder.position.weight.data = 0.1 * torch.cat([angle.sin(), angle.cos()], 1)


def make_replacements(sequences, vocab_size, mask_id, first_word):
    """Return (vocab_size, CHOICES) words that follow each word somewhere in the sequences."""
    followers = [[] for _ in range(vocab_size)]
    for ids, _ in sequences:
        for before, word in zip(ids, ids[1:], strict=False):
            if word >= first_word:
                followers[before].append(word)
    rows = []
    for words in followers:
        words = torch.tensor(words or [mask_id])
        rows.append(words[torch.randint(len(words), (CHOICES,))])
    return torch.stack(rows)


def corrupt(input_ids, replacements, mask_id, first_word):
    """input_ids (B, T) -> corrupted ids (B, T) and where a word is to be predicted (B, T)"""
    picked = (torch.rand(input_ids.shape) < MASK) & (input_ids >= first_word)
    fate = torch.rand(input_ids.shape)
    before = input_ids.roll(1, 1)
    replaced = replacements[before, torch.randint(CHOICES, input_ids.shape)]
    corrupted = torch.where(picked & (fate >= 0.7), replaced, input_ids)
    return torch.where(picked & (fate < 0.6), mask_id, corrupted), picked


def pretrain(config, tokenizer, texts, steps=STEPS):
    """Return an Encoder trained to predict masked words, and print its loss."""
    torch.manual_seed(0)
    sequences = [tokenizer.encode(*text) for text in texts]
    is_word = [token.isalpha() and len(token) > 1 for token in tokenizer.vocab]
    first_word = is_word.index(True)
    encoder = Encoder(config)
    initialise(encoder)
    transform = nn.Linear(config.hidden_size, config.hidden_size)
    bias = nn.Parameter(torch.zeros(config.vocab_size))
    replacements = make_replacements(sequences, config.vocab_size, tokenizer.mask_id, first_word)

    parameters = [*encoder.parameters(), *transform.parameters(), bias]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=steps, pct_start=0.05, anneal_strategy="linear"
    )
    lengths = [len(ids) for ids, _ in sequences]
    queue = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        queue = queue or data.batches(lengths, BATCH_SIZE, torch.default_generator)
        batch = [sequences[i] for i in queue.pop()]
        input_ids, attention_mask, token_type_ids = data.pad(batch, config.pad_token_id)
        corrupted, picked = corrupt(input_ids, replacements, tokenizer.mask_id, first_word)
        hidden = encoder(corrupted, attention_mask, token_type_ids)[picked]  # (words picked, D)
        logits = F.linear(F.gelu(transform(hidden)), encoder.word.weight, bias)
        loss = F.cross_entropy(logits, input_ids[picked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}/{steps} | loss {loss.item():.3f} | {seconds:.0f} s", flush=True)
    return encoder


def main(folder, steps=STEPS):
    """Train the encoder and write it as a Hugging Face folder with float16 weights."""
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
    encoder = pretrain(config, tokenizer, corpus(TEXTS), steps)
    texts = {"vocab.txt": "\n".join(tokens) + "\n"}
    save_encoder(encoder, folder, torch.float16, texts)


if __name__ == "__main__":
    main(sys.argv[1])

#!/usr/bin/env python3
"""Trains the embedded base's tokenizer: byte-level BPE, lossless for any UTF-8.

It sees the King James Bible without the chapters held out for validation: the
base model then has met every token that it will ever be given.

    tokenizer.py OUT    writes OUT/tokenizer.json and its two companions
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import kjv

END = "<|endoftext|>"


def texts(fraction):
    for book, chapter, verses in kjv.chapters():
        if not kjv.held_out(book, chapter, fraction):
            yield " ".join(verses)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--held-out", type=float, default=0.02, help="fraction of the chapters")
    parser.add_argument("--max-length", type=int, default=512, help="the model's context")
    options = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(options.held_out), trainer)

    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.out / "tokenizer.json"))
    special = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": options.max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **special,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (options.out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{options.out}/tokenizer.json: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()

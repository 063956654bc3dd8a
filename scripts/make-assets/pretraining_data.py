#!/usr/bin/env python3
"""Writes the pretraining text: the King James Bible as passages of whole verses.

Each row is {"text": ...}: consecutive verses of one book, as many as give at
most `--max-tokens` tokens; a space between verses, a line feed between chapters.
About 2 % of the chapters are held out for validation.

    pretraining_data.py OUT --tokenizer assets/base/tokenizer.json
"""

import argparse
import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer

import kjv


def passages(chapters, tokenizer, max_tokens):
    """Greedy: a passage takes verses, across chapters of its book, until the next does not fit."""
    for _, book in itertools.groupby(chapters, key=lambda chapter: chapter[0]):
        passage = ""
        for _, _, verses in book:
            for number, verse in enumerate(verses):
                longer = verse if not passage else passage + (" " if number else "\n") + verse
                if passage and len(tokenizer.encode(longer).ids) > max_tokens:
                    yield passage
                    longer = verse
                passage = longer
        yield passage


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=255, help="per row, without the end token")
    parser.add_argument("--held-out", type=float, default=0.02, help="fraction of the chapters")
    options = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    options.out.mkdir(parents=True, exist_ok=True)
    chapters = kjv.chapters()
    for name, wanted in (("train", False), ("valid", True)):
        chosen = [c for c in chapters if kjv.held_out(c[0], c[1], options.held_out) == wanted]
        rows = list(passages(chosen, tokenizer, options.max_tokens))
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        lengths = [len(tokenizer.encode(row).ids) for row in rows]
        print(
            f"{path}: {len(chosen)} chapters, {len(rows)} rows, {sum(lengths)} tokens "
            f"(longest row {max(lengths)}), {sum(map(len, rows))} characters"
        )


if __name__ == "__main__":
    main()

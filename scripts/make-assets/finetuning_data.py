#!/usr/bin/env python3
"""Writes the fine-tuning dataset from Ambrose Bierce's "The Devil's Dictionary".

The text (public domain, published 1906 and 1911) is read from the Debian
package `dict-devil`. Each entry becomes one row:

    {"prompt": "Abdication, n.", "completion": " An act whereby a sovereign ..."}

The verses that illustrate many entries are left out, emphasis marks and
editorial brackets are removed, and a definition longer than `--max-words` ends
at the last whole sentence that fits.

    finetuning_data.py OUT    writes OUT/train.jsonl and OUT/valid.jsonl
"""

import argparse
import gzip
import hashlib
import json
import re
from pathlib import Path

SOURCE = Path("/usr/share/dictd/devil.dict.dz")
PART_OF_SPEECH = r"n\.pl|n|adj|adv|v\.t|v\.i|v|pp|p\.p|pro|pron"
ENTRY = re.compile(rf"([A-Z][A-Za-z' \-]*?)(?: \([^)]*\))?, ({PART_OF_SPEECH})\.,? +")

# Rows that turn on a people or race are left out, as is what is no definition.
LEFT_OUT = re.compile(
    r"nigger|negro|mulatto|african|aborigin|\bJew|hebrew|chinese|\bindians?\b|red-skin|^see |^and n\.", re.IGNORECASE
)


def title_case(headword):
    """APRIL FOOL -> April Fool, MAN-OF-WAR -> Man-of-War; CAT O' NINE TAILS keeps its apostrophe."""
    small = {"a", "an", "and", "at", "by", "in", "of", "on", "or", "the", "to"}
    words = re.split(r"([ -])", headword.lower())
    return "".join(w if i and w in small else w[:1].upper() + w[1:] for i, w in enumerate(words))


def paragraphs(text):
    """Prose paragraphs: runs of lines, unindented, between blank lines. Verse is indented."""
    for block in re.split(r"\n[ \t]*\n", text):
        if block and not block.startswith((" ", "\t")):
            # A paragraph's continuation may hold a further, indented paragraph without a blank line.
            yield re.split(r"\n {4,}", block)[0]


def sentences(text):
    """The source ends a sentence with two spaces, or at the end of a line."""
    marked = re.sub(r"([.!?][\"')]*)(?: {2,}|\s*\n)(?=[\"'(]*[A-Z])", "\\1\0", text)
    return [re.sub(r"\s+", " ", piece).strip() for piece in marked.split("\0")]


def clean(text):
    text = re.sub(r"\[[^\]]*\]|\{|\}|_", "", text)
    text = re.sub(r"\(\s*\)", "", text)
    return text.strip()


def definition(text, max_words):
    """The entry's opening sentences, as many as fit, or None if the first does not."""
    kept, count = [], 0
    for sentence in sentences(clean(text)):
        words = len(sentence.split())
        if count + words > max_words or not sentence.endswith((".", "!", "?", '."', "?\"", "!\"", ".)")):
            break
        if re.search(r"\b(follows|as follows|following lines|thus)\b[^.]*\.$", sentence):
            break
        kept.append(sentence)
        count += words
    return " ".join(kept) or None


def rows(source, max_words):
    text = gzip.decompress(source.read_bytes()).decode("ascii")
    seen, result = set(), []
    for block in paragraphs(text):
        match = ENTRY.match(block)
        if not match or match[1] != match[1].upper().replace(" OR ", " or "):
            continue
        body = definition(block[match.end():], max_words)
        prompt = f"{title_case(match[1])}, {match[2]}."
        if body is None or body in seen or prompt in seen or len(body.split()) < 2:
            continue
        if LEFT_OUT.search(body) or LEFT_OUT.search(prompt):
            continue
        seen.update((body, prompt))
        result.append({"prompt": prompt, "completion": f" {body}"})
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--max-words", type=int, default=80)
    parser.add_argument("--valid", type=int, default=60, help="rows held out for validation")
    options = parser.parse_args()

    everything = rows(options.source, options.max_words)
    # Held out by a hash of the prompt: stable when rows come or go, and no random state.
    by_hash = sorted(everything, key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    held_out = {row["prompt"] for row in by_hash[: options.valid]}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (
        ("train", [row for row in everything if row["prompt"] not in held_out]),
        ("valid", [row for row in everything if row["prompt"] in held_out]),
    ):
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
        words = sum(len(row["completion"].split()) for row in chosen)
        print(f"{path}: {len(chosen)} rows, {words} words, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""The King James Bible as the Debian package `bible-kjv` prints it, by chapter.

The text (public domain) is in `bible-kjv-text`; the program `bible` of
`bible-kjv` decompresses it. Shared by the other scripts of this folder.
"""

import hashlib
import re
import subprocess

VERSE = re.compile(r"(\d?[A-Z][A-Za-z]*)(\d+):(\d+) (.*)")


def chapters():
    """[(book, chapter, [verse text, ...]), ...] in the Bible's order; no verse numbers in the text."""
    printed = subprocess.run(
        ["bible", "-f", "Gen1:1-Rev22:21"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        encoding="ascii",
    ).stdout
    result = []
    for line in printed.splitlines():
        match = VERSE.fullmatch(line)
        if match is None:
            raise SystemExit(f"bible printed a line that is no verse: {line!r}")
        book, chapter, text = match[1], int(match[2]), re.sub(r"\s+", " ", match[4]).strip()
        if not result or result[-1][:2] != (book, chapter):
            result.append((book, chapter, []))
        result[-1][2].append(text)
    return result


def held_out(book, chapter, fraction):
    """Whether a chapter is kept for validation: by a hash of its name, so no random state is needed."""
    digest = hashlib.sha256(f"{book} {chapter}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64

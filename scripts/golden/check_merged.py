#!/usr/bin/env python3
"""Loads a full (for instance merged) model folder in transformers and compares logits.

    check_merged.py MODEL LOGITS [--tolerance 1e-4]

LOGITS is a safetensors file with `input_ids` [b, t] and `logits` [b, t, vocab],
as candlewick computed them. `--key` names another tensor, such as
`merged_logits` of a golden file. Exit code 1 beyond the tolerance.
"""

import argparse

from compare import arguments, compare, load_base


def main():
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("logits", help="safetensors with input_ids and logits")
    options = parser.parse_args()
    compare(load_base(options.model), options)


if __name__ == "__main__":
    main()

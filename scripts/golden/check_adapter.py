#!/usr/bin/env python3
"""Loads a base model and an adapter folder in Python PEFT and compares logits.

    check_adapter.py BASE ADAPTER LOGITS [--tolerance 1e-4]

LOGITS is a safetensors file with `input_ids` [b, t] and `logits` [b, t, vocab],
as candlewick computed them with the same adapter. `--key` names another tensor,
such as `adapter_logits` of a golden file. Exit code 1 beyond the tolerance.
"""

import argparse

from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights

from compare import arguments, compare, load_base


def main():
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("base", help="folder of the base model")
    parser.add_argument("adapter", help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("logits", help="safetensors with input_ids and logits")
    options = parser.parse_args()

    model = PeftModel.from_pretrained(load_base(options.base), options.adapter).eval()
    # PEFT only warns when a file's tensors match nothing, and the adapter then does nothing.
    there = load_peft_weights(options.adapter, device="cpu")
    loaded = {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".default." in name}
    for name in sorted(there.keys() | loaded.keys()):
        if name not in there or name not in loaded:
            raise SystemExit(f"{name}: only in the {'file' if name in there else 'PEFT model'}")
        if not there[name].equal(loaded[name].to(there[name].dtype)):
            raise SystemExit(f"{name}: PEFT holds other values than the file")
    print(f"adapter: {len(there)} tensors, all in place")
    compare(model, options)


if __name__ == "__main__":
    main()

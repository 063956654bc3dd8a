"""What check_adapter.py and check_merged.py share."""

import sys

import peft
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def arguments(parser):
    parser.add_argument("--key", default="logits", help="the tensor to compare with (default: logits)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference (default: 1e-4)")
    return parser


def load_base(folder):
    """The model in float32 with eager attention. A weight that is missing or left over is an error."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise SystemExit(f"{folder}: {kind.replace('_', ' ')}: {sorted(report[kind])}")
    return model.eval()


def compare(model, options):
    file = load_file(options.logits)
    for key in ("input_ids", options.key):
        if key not in file:
            raise SystemExit(f"{options.logits} has no tensor {key!r}, it has {sorted(file)}")
    expected = file[options.key].float()
    with torch.no_grad():
        got = model(input_ids=file["input_ids"].long()).logits
    if got.shape != expected.shape:
        raise SystemExit(f"logits have shape {list(got.shape)}, the file's {list(expected.shape)}")
    difference = (got - expected).abs().max().item()
    print(
        f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, safetensors {safetensors.__version__}"
    )
    print(f"{type(model).__name__}: logits {list(got.shape)}, largest magnitude {expected.abs().max():.4f}")
    print(f"max abs difference {difference:.3e} (tolerance {options.tolerance:.0e})")
    # Written so that a NaN fails.
    if not difference <= options.tolerance:
        raise SystemExit("the logits differ")
    print("ok")

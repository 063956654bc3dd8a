#!/usr/bin/env python3
"""Writes the golden files: tiny random models, what transformers computes with
them, and what twenty steps of PEFT LoRA with torch's AdamW make of an adapter.

    make_golden.py crates/candlewick/tests/golden

Everything is float32 on one CPU thread with eager attention. The README beside
the golden files says what each file holds and which versions wrote it.
"""

import argparse
import copy
import json
import platform
import shutil
from pathlib import Path

import peft
import safetensors
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 64
STEPS = 20
IGNORED = -100
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
)
ONE_LAYER = {**SHAPE, "num_hidden_layers": 1}
LLAMA3_ROPE = {
    # Head size 8 at theta 10000 has the wavelengths 6.3, 63, 628 and 6283: one kept, one between, two scaled.
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False, rms_norm_eps=1e-6),
    "llama3": LlamaConfig(**ONE_LAYER, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-6, head_dim=12),
    "mistral": MistralConfig(**ONE_LAYER, tie_word_embeddings=False, rms_norm_eps=1e-5, sliding_window=None),
}
SHARDED = {"qwen3": "24KB"}
CASES = {
    # name: (model, LoraConfig arguments, gradient norm limit)
    "llama-all-linear": ("llama", dict(target_modules="all-linear"), None),
    "llama-qv-rslora": ("llama", dict(target_modules=["q_proj", "v_proj"], use_rslora=True), 1.0),
    "qwen2-all-linear": ("qwen2", dict(target_modules="all-linear"), 1.0),
    "qwen2-qv": ("qwen2", dict(target_modules=["q_proj", "v_proj"]), None),
}
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.01


def randomise(model, generator):
    """Draws every parameter, norm weights and biases too, so that each one matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "embed_tokens" in name:
                # A tied embedding is the head as well: smaller, so that logits stay near 1.
                parameter.copy_((0.2 if model.config.tie_word_embeddings else 0.5) * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def config_as_of_v4(folder):
    """Rewrites config.json's rope and dtype keys as transformers 4 wrote them: most published models have these."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def greedy(model, prompt, count):
    """The `count` tokens of highest logit, one by one, through the key-value cache, and the narrowest lead of one."""
    ids, cache, chosen, margin = prompt, None, [], float("inf")
    with torch.no_grad():
        for _ in range(count):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, top = out.past_key_values, out.logits[:, -1].topk(2)
            margin = min(margin, (top.values[:, 0] - top.values[:, 1]).min().item())
            ids = top.indices[:, :1]
            chosen.append(ids)
    return torch.cat(chosen, 1), margin


def make_model(name, config, root):
    folder = root / name
    generator = torch.Generator().manual_seed(1000 + sorted(MODELS).index(name))
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
    randomise(model, generator)
    model.save_pretrained(folder, max_shard_size=SHARDED.get(name, "1GB"))
    if name == "llama3":
        config_as_of_v4(folder)

    model = load(folder)
    input_ids = torch.randint(1, VOCAB, (2, 17), generator=generator)
    prompt = torch.randint(1, VOCAB, (1, 5), generator=generator)
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
        exact = load(folder, torch.float64)(input_ids=input_ids).logits
    tokens, margin = greedy(model, prompt, 24)
    assert margin > 1e-3, f"{name}: a near tie in the greedy tokens, choose another seed"
    save_file(
        {"input_ids": input_ids, "logits": logits, "prompt_ids": prompt, "greedy_ids": tokens},
        folder / "expected.safetensors",
    )
    error = (logits - exact).abs().max().item()
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count} parameters, logits within {logits.abs().max():.3f}, "
          f"{error:.1e} from float64, narrowest greedy lead {margin:.4f}")


def batches(generator):
    """STEPS batches of 3 rows: sequences that count upwards, the first 1 to 3 tokens not counted, right padding."""
    ids = torch.zeros(STEPS, 3, 12, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for step in range(STEPS):
        for row in range(3):
            draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
            length, start, masked = draw(5, 13), draw(1, VOCAB), draw(1, 4)
            if row == 0:
                length = 12
            sequence = 1 + (start + torch.arange(length)) % (VOCAB - 1)
            ids[step, row, :length] = sequence
            labels[step, row, masked:length] = sequence[masked:]
    targets = torch.full_like(labels, IGNORED)
    targets[:, :, :-1] = labels[:, :, 1:]
    return ids, labels, targets


def train(model, ids, targets, limit):
    """Losses before each step, and the gradients' norms before clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY
    )
    losses, norms = [], []
    model.train()
    for step in range(STEPS):
        logits = model(input_ids=ids[step]).logits
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), targets[step].reshape(-1), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf"))
        losses.append(loss.item())
        norms.append(norm.item())
        optimizer.step()
    model.eval()
    return losses, norms


def save_adapter(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set in PEFT, in no stable order
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def adapter_tensors(model):
    return {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}


def make_case(name, root):
    base, lora, limit = CASES[name]
    base_folder, folder = root / base, root / "lora" / name
    seed = 2000 + sorted(CASES).index(name)
    ids, labels, targets = batches(torch.Generator().manual_seed(seed))

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **lora)
    model = get_peft_model(load(base_folder), config)
    model.peft_config["default"].base_model_name_or_path = base
    assert all(p.dtype == torch.float32 for p in model.parameters())
    save_adapter(model, folder / "adapter_init")
    losses, norms = train(model, ids, targets, limit)
    save_adapter(model, folder / "adapter_final")

    # The same in float64: how far rounding alone carries the trajectory.
    exact = PeftModel.from_pretrained(
        load(base_folder, torch.float64), folder / "adapter_init", is_trainable=True, autocast_adapter_dtype=False
    )
    for parameter in exact.parameters():
        parameter.data = parameter.data.double()
    exact_losses, _ = train(exact, ids, targets, limit)
    loss_drift = max(abs(a - b) / abs(b) for a, b in zip(losses, exact_losses))
    ours, theirs = adapter_tensors(model), adapter_tensors(exact)
    tensor_drift = max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)
    element_drift = max(((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()).item() for n in theirs)

    probe = load_file(base_folder / "expected.safetensors")["input_ids"]
    with torch.no_grad():
        adapted = model(input_ids=probe).logits
        merged = model.merge_and_unload()(input_ids=probe).logits
    save_file(
        {"input_ids": probe, "adapter_logits": adapted, "merged_logits": merged},
        folder / "expected.safetensors",
    )
    save_file({"input_ids": ids, "labels": labels, "targets": targets}, folder / "batches.safetensors")
    trajectory = {
        "base": base,
        "steps": STEPS,
        "optimizer": "AdamW",
        "learning_rate": LEARNING_RATE,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": WEIGHT_DECAY,
        "max_gradient_norm": limit,
        "losses": losses,
        "gradient_norms": norms,
        "losses_float64": exact_losses,
    }
    (folder / "trajectory.json").write_text(json.dumps(trajectory, indent=2) + "\n")
    print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, gradient norms {min(norms):.2f} to {max(norms):.2f}; "
          f"float32 against float64: losses {loss_drift:.1e}, tensors {tensor_drift:.1e} (norm) "
          f"{element_drift:.1e} (largest element); merged against adapter {(merged - adapted).abs().max():.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="the folder of the golden files; its models and lora/ are replaced")
    options = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}, safetensors {safetensors.__version__}")
    for name, config in MODELS.items():
        shutil.rmtree(options.out / name, ignore_errors=True)
        make_model(name, config, options.out)
    shutil.rmtree(options.out / "lora", ignore_errors=True)
    for name in CASES:
        make_case(name, options.out)


if __name__ == "__main__":
    main()

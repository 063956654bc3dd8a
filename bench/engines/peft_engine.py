"""transformers and PEFT: LoRA training steps of a model with random weights."""

import signal
import time

import common
import peft
import torch
import transformers

transformers.logging.set_verbosity_error()
SEED = 0
CLIP = 1.0


def too_long(*_):
    raise TimeoutError("the first step took too long, compiling included")


class Engine:
    def hello(self, device, threads):
        self.device = device
        torch.set_num_threads(threads)
        return {
            "is": "hello",
            "engine": "peft",
            "variants": ["eager", "compiled", "liger"],
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
            "threads": torch.get_num_threads(),
            "allocator": "PyTorch's",
        }

    def model(self, training):
        options = dict(training["config"])
        kind = options.pop("model_type")
        config, model = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        }[kind]
        dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
        dtype = dtypes[training["dtype"]]
        torch.manual_seed(SEED)
        # As from_pretrained would have them: drawn in what they are stored in, and then widened.
        stored = training.get("stored")
        torch.set_default_dtype(dtypes[stored or training["dtype"]])
        with torch.device(self.device):
            model = model(config(**options, use_cache=False))
        if stored:
            model = model.to(dtype)
        torch.set_default_dtype(torch.float32)
        lora = peft.LoraConfig(
            r=training["rank"],
            lora_alpha=training["alpha"],
            lora_dropout=training["dropout"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(model, lora).train()

    def train(self, training, variant):
        if variant == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        model = self.model(training)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=training["learning_rate"], fused=self.device == "cuda")
        forward = torch.compile(model) if variant == "compiled" else model
        shape = (training["batch"], training["tokens"])
        ids = torch.randint(0, training["config"]["vocab_size"], shape).to(self.device)
        cuda = self.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds, losses = [], []
        limit, begun = training["limit_seconds"], time.perf_counter()
        signal.signal(signal.SIGALRM, too_long)
        signal.setitimer(signal.ITIMER_REAL, training["first_step_seconds"])
        for step in range(training["warmup"] + training["steps"]):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            loss = loss.item()
            if cuda:
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            signal.setitimer(signal.ITIMER_REAL, 0)
            if step >= training["warmup"] or took > limit:
                seconds.append(took)
            losses.append(loss)
            if time.perf_counter() - begun > limit and seconds:
                break
        reply = {"is": "trained", "step_seconds": seconds, "losses": losses}
        if cuda:
            free, total = torch.cuda.mem_get_info()
            reply["peak_device_bytes"] = torch.cuda.max_memory_allocated()
            reply["driver_device_bytes"] = total - free
        return reply


if __name__ == "__main__":
    common.serve(Engine())

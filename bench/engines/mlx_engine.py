"""MLX: lazy, so that what it computed when is what `mx.eval` asked for."""

import time

import common
import mlx.core as mx
import mlx.nn as nn


def operation(case, eps, scaling):
    """The operation as MLX's users write it; its arguments are named as the case's inputs."""

    def lora_delta(x, a, b):
        return ((x @ a.T) @ b.T) * scaling

    def attention(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")

    return {
        "attention": attention,
        # `precise` sums in f32; without it a 16-bit row sums to something else.
        "softmax": lambda x: mx.softmax(x, axis=-1, precise=True),
        "rms_norm": lambda x, w: mx.fast.rms_norm(x, w, eps),
        "layer_norm": lambda x, w, b: mx.fast.layer_norm(x, w, b, eps),
        # MLX computes the angles itself; the case's tables hold the same ones.
        "rope": lambda x, cos, sin: mx.fast.rope(
            x, x.shape[-1], traditional=False, base=10000.0, scale=1.0, offset=0
        ),
        "silu_mul": lambda gate, up: nn.silu(gate) * up,
        "gelu_mul": lambda gate, up: nn.gelu_approx(gate) * up,
        "cross_entropy": lambda x, targets: nn.losses.cross_entropy(x, targets, reduction="mean"),
        "frozen_linear": lambda x, w: x @ w.T,
        "lora_delta": lora_delta,
        "lora_linear": lambda x, w, a, b: x @ w.T + lora_delta(x, a, b),
    }[case["op"]]


class Copy:
    """One set of buffers, and the call on them."""

    def __init__(self, case, function, tensors):
        self.mode = case["mode"]
        self.tensors = {name: mx.array(tensor) + 0 for name, tensor in tensors.items()}
        self.g = self.tensors.pop("g", None)
        mx.eval(self.tensors, [] if self.g is None else self.g)
        self.names = common.tracked(case)
        rest = {name: tensor for name, tensor in self.tensors.items() if name not in self.names}
        self.function = lambda *inputs: function(**dict(zip(self.names, inputs)), **rest)
        self.inputs = [self.tensors[name] for name in self.names]

    def call(self):
        """The outputs, not yet computed."""
        if self.mode == "forward":
            return {"y": self.function(*self.inputs)}
        cotangent = mx.array(1.0, dtype=self.inputs[0].dtype) if self.g is None else self.g
        (y,), gradients = mx.vjp(lambda *inputs: [self.function(*inputs)], self.inputs, [cotangent])
        return {"y": y, **{"d" + name: gradient for name, gradient in zip(self.names, gradients)}}


class Engine:
    def hello(self, device, threads):
        mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
        notes = ["TF32 off"] if device == "cuda" else ["MLX chooses its threads"]
        return {
            "is": "hello",
            "engine": "mlx",
            "variants": ["mlx"],
            "versions": {"mlx": mx.__version__},
            "threads": threads,
            "allocator": "MLX's",
            "notes": notes + [f"device {mx.default_device()}"],
        }

    def prepare(self, case, variant, eps, scaling):
        if case["mode"] == "backward":
            raise common.Unsupported("a backward pass alone: MLX's transforms have both")
        self.copies, self.last = [], None
        self.case, self.function = case, operation(case, eps, scaling)

    def inputs(self, path, copies, warm):
        tensors = mx.load(path)
        self.copies = [Copy(self.case, self.function, tensors) for _ in range(copies)]
        if warm:
            for copy in self.copies:
                mx.eval(copy.call())

    def ready(self, way, calls):
        raise common.Unsupported("MLX has no clock on the device")

    def time(self, way, samples, calls):
        times, at, copies, last = [], 0, self.copies, None
        for _ in range(samples):
            start = time.perf_counter()
            if way == "synced":
                for _ in range(calls):
                    last = copies[at].call()
                    mx.eval(last)
                    at = (at + 1) % len(copies)
            elif way == "pipelined":
                queued = []
                for _ in range(calls):
                    queued.append(copies[at].call())
                    at = (at + 1) % len(copies)
                mx.eval(queued)
                last = queued[-1]
            else:
                for _ in range(calls):
                    last = copies[at].call()
                    at = (at + 1) % len(copies)
                mx.eval(last)
            times.append((time.perf_counter() - start) * 1e6)
        self.last = last
        return {"is": "times", "samples_us": times}

    def output(self, path, rows):
        chosen = {}
        for name, tensor in self.last.items():
            if name in rows:
                tensor = tensor.reshape(-1, tensor.shape[-1])[mx.array(rows[name])]
            chosen[name] = tensor
        mx.save_safetensors(path, chosen)

    def limits(self):
        return {"is": "limits"}


if __name__ == "__main__":
    common.serve(Engine())

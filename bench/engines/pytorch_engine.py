"""PyTorch: eager, compiled, and on a GPU either one replayed as a CUDA graph."""

import time

import common
import safetensors.torch
import torch
import torch.nn.functional as F


def operation(case, eps, scaling):
    """The operation as PyTorch's users write it; its arguments are named as the case's inputs."""

    def rope(x, cos, sin):
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def rms_norm(x, w):
        return F.rms_norm(x, x.shape[-1:], w, eps)

    def layer_norm(x, w, b):
        return F.layer_norm(x, x.shape[-1:], w, b, eps)

    def lora_delta(x, a, b):
        return F.linear(F.linear(x, a), b) * scaling

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {
        "attention": attention,
        "softmax": lambda x: F.softmax(x, -1),
        "rms_norm": rms_norm,
        "layer_norm": layer_norm,
        "rope": rope,
        "silu_mul": lambda gate, up: F.silu(gate) * up,
        "gelu_mul": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        "cross_entropy": lambda x, targets: F.cross_entropy(x, targets),
        "frozen_linear": lambda x, w: F.linear(x, w),
        "lora_delta": lora_delta,
        "lora_linear": lambda x, w, a, b: F.linear(x, w) + lora_delta(x, a, b),
    }[case["op"]]


class Copy:
    """One set of buffers, and the call on them. New numbers are copied into the same buffers, as graphs demand."""

    def __init__(self, case, function, tensors, device):
        self.mode = case["mode"]
        self.function = function
        self.tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        self.g = self.tensors.pop("g", None)
        self.names = common.tracked(case) if self.mode != "forward" else []
        for name in self.names:
            self.tensors[name].requires_grad_()
        self.y = None

    def fill(self, tensors):
        with torch.no_grad():
            for name, tensor in tensors.items():
                (self.g if name == "g" else self.tensors[name]).copy_(tensor)

    def forward(self):
        return self.function(**self.tensors)

    def gradients(self, y, retain=False):
        inputs = [self.tensors[name] for name in self.names]
        gradients = torch.autograd.grad(y, inputs, self.g, retain_graph=retain)
        return {"d" + name: gradient for name, gradient in zip(self.names, gradients)}

    def call(self):
        if self.mode == "forward":
            with torch.no_grad():
                return {"y": self.forward()}
        if self.mode == "backward":
            return self.gradients(self.y, retain=True)
        y = self.forward()
        return {"y": y, **self.gradients(y)}


class Engine:
    name = "pytorch"

    def variants(self):
        return ["eager", "compiled"]

    def hello(self, device, threads):
        self.device = device
        torch.set_num_threads(threads)
        notes = []
        if device == "cuda":
            self.synchronize = torch.cuda.synchronize
            notes = [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", "TF32 off"]
        else:
            self.synchronize = lambda: None
            notes = [f"oneDNN and {torch.backends.cpu.get_cpu_capability()}"]
        return {
            "is": "hello",
            "engine": self.name,
            "variants": self.variants(),
            "versions": {"torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "allocator": "PyTorch's",
            "notes": notes,
        }

    def prepare(self, case, variant, eps, scaling):
        self.copies, self.graphs, self.last = [], None, None
        self.case = case
        self.function = self.choose(case, variant, eps, scaling)

    def choose(self, case, variant, eps, scaling):
        function = operation(case, eps, scaling)
        if variant == "compiled":
            torch.compiler.reset()
            function = torch.compile(function, dynamic=False)
        return function

    def inputs(self, path, copies, warm):
        tensors = safetensors.torch.load_file(path)
        if len(self.copies) != copies:
            self.copies = [Copy(self.case, self.function, tensors, self.device) for _ in range(copies)]
        else:
            for copy in self.copies:
                copy.fill(tensors)
        for copy in self.copies:
            if copy.mode == "backward":
                copy.y = copy.forward()
            if warm:
                copy.call()
        self.synchronize()

    def time(self, way, samples, calls):
        if way == "graph":
            return self.time_graph(samples, calls)
        times, at, copies, last = [], 0, self.copies, None
        for _ in range(samples):
            start = time.perf_counter()
            if way == "synced":
                for _ in range(calls):
                    last = copies[at].call()
                    at = (at + 1) % len(copies)
                    self.synchronize()
            else:
                for _ in range(calls):
                    last = copies[at].call()
                    at = (at + 1) % len(copies)
                self.synchronize()
            times.append((time.perf_counter() - start) * 1e6)
        self.last = last
        return {"is": "times", "samples_us": times}

    def ready(self, way, calls):
        """Captures a sample's calls as a graph; fresh inputs go into the buffers that it knows."""
        if self.device != "cuda":
            raise common.Unsupported("graphs are CUDA's")
        if self.graphs is not None and self.graphs[0] == calls:
            return
        self.graphs = self.last = None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for copy in self.copies:
                copy.call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for at in range(calls):
                last = self.copies[at % len(self.copies)].call()
        self.graphs = (calls, graph, last)
        graph.replay()
        self.synchronize()

    def time_graph(self, samples, calls):
        """GPU time of a graph that holds as many calls as a sample, by the GPU's own clock."""
        _, graph, self.last = self.graphs
        times = []
        for _ in range(samples):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return {"is": "times", "samples_us": times}

    def output(self, path, rows):
        chosen = {}
        for name, tensor in self.last.items():
            tensor = tensor.detach()
            if name in rows:
                index = torch.tensor(rows[name], device=tensor.device)
                tensor = tensor.reshape(-1, tensor.shape[-1])[index]
            chosen[name] = tensor.contiguous().cpu()
        safetensors.torch.save_file(chosen, path)

    def limits(self):
        rates = {}
        shape = (8192, 4096, 4096) if self.device == "cuda" else (4096, 1024, 1024)
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            m, k, n = shape
            a, b = torch.randn(m, k, device=self.device, dtype=dtype), torch.randn(n, k, device=self.device, dtype=dtype)
            F.linear(a, b)
            best = float("inf")
            enough = time.perf_counter() + 0.6
            while time.perf_counter() < enough:
                self.synchronize()
                start = time.perf_counter()
                for _ in range(4):
                    F.linear(a, b)
                self.synchronize()
                best = min(best, (time.perf_counter() - start) / 4)
            rates[name] = 2 * m * k * n / best
        return {"is": "limits", "product_operations_per_second": rates}


if __name__ == "__main__":
    common.serve(Engine())

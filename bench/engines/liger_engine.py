"""Liger: PyTorch with Triton kernels, on a GPU, for the operations that it has."""

from importlib.metadata import version

import common
import pytorch_engine
from liger_kernel.transformers import functional as liger


def operation(case, eps):
    """Liger's function for the case. Those that write gradients over their arguments get a copy of them."""
    copies = case["mode"] != "forward"

    def own(x):
        return x.clone() if copies else x

    functions = {
        "softmax": lambda x: liger.liger_softmax(x),
        "rms_norm": lambda x, w: liger.liger_rms_norm(x, w, eps, in_place=False),
        "layer_norm": lambda x, w, b: liger.liger_layer_norm(x, w, b, eps),
        "silu_mul": lambda gate, up: liger.liger_swiglu(own(gate), own(up)),
        "gelu_mul": lambda gate, up: liger.liger_geglu(own(gate), own(up)),
        "cross_entropy": lambda x, targets: liger.liger_cross_entropy(own(x), targets),
    }
    if case["op"] not in functions:
        raise common.Unsupported(f"Liger has no {case['op']} that leaves its arguments alone")
    return functions[case["op"]]


class Engine(pytorch_engine.Engine):
    name = "liger"

    def variants(self):
        return ["liger"]

    def hello(self, device, threads):
        if device != "cuda":
            raise common.Unsupported("Liger needs a GPU")
        hello = super().hello(device, threads)
        hello["versions"]["liger-kernel"] = version("liger-kernel")
        hello["notes"].append(
            "silu_mul, gelu_mul and cross_entropy write gradients over their arguments; here they get copies, "
            "which is in their times"
        )
        return hello

    def choose(self, case, variant, eps, scaling):
        if case["mode"] == "backward":
            raise common.Unsupported("a backward pass made twice: Liger's writes over what it saved")
        return operation(case, eps)


if __name__ == "__main__":
    common.serve(Engine())

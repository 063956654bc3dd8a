"""The other end of the runner's protocol (bench/src/protocol.rs), for engines in Python."""

import json
import os
import sys
import traceback

# Nothing but answers may reach the standard output that the runner reads.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Unsupported(Exception):
    """This engine has nothing for that case or way."""


def tracked(case):
    """The names of the inputs that get a gradient."""
    return {
        "attention": ["q", "k", "v"],
        "softmax": ["x"],
        "rms_norm": ["x", "w"],
        "layer_norm": ["x", "w", "b"],
        "rope": ["x"],
        "silu_mul": ["gate", "up"],
        "gelu_mul": ["gate", "up"],
        "cross_entropy": ["x"],
        "frozen_linear": ["x"],
        "lora_delta": ["x", "a", "b"],
        "lora_linear": ["x", "a", "b"],
    }[case["op"]]


def serve(engine):
    """Answers requests with the engine's methods of the same names until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(engine, request.pop("do"))(**request) or {"is": "done"}
        except Unsupported as reason:
            reply = {"is": "unsupported", "reason": str(reason)}
        except Exception as error:  # an engine's failure is the runner's to report
            traceback.print_exc()
            reply = {"is": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
        _answers.write(json.dumps(reply) + "\n")
        _answers.flush()

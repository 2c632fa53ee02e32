"""The sequence memories token by token, one row and one head, from the interface of associative memory alone."""

import torch
import torch.nn.functional as F
from nlscale_kernels.associative import MOMENTUM, Associative, Gates, State, mlp, square
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.self_modifying import Memories
from torch import Tensor

TITANS = Associative(mlp, square, MOMENTUM)


def titans_row(
    net: Net, head: int, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, starts: Tensor, chunk: int
) -> Tensor:
    """Readings (T, K) of one head over one row; gates (3, T): rate, momentum, keep. Gradients and readings at anchors."""
    initial = TITANS.begin({"up": net.up[0, head, 0], "down": net.down[0, head, 0]})
    state = anchor = initial
    outputs = []
    for t in range(len(q)):
        if t % chunk == 0:
            anchor = state
        if starts[t]:
            state = anchor = initial
        outputs.append(TITANS.read(anchor, q[t]))
        state = TITANS.write(state, k[t], v[t], Gates(gates[0, t], gates[2, t], gates[1, t]), at=anchor)
    return torch.stack(outputs)


class Five:
    """Self-modifying Titans of one head, exactly as eqs. 83-93 (corrected) say, momentum by the house's rule for W2."""

    def __init__(self, memories: Memories, head: int, biases: tuple[float, float, float]) -> None:
        names = (("key", "value"), ("rate", "keep"), ("main",))
        self.initial = {
            name: {"up": net.up[0, head, place], "down": net.down[0, head, place]}
            for net, group in zip(memories, names, strict=True)
            for place, name in enumerate(group)
        }
        self.biases = biases

    @staticmethod
    def say(name: str, weights: dict[str, Tensor], z: Tensor) -> Tensor:
        said = weights["down"] @ F.silu(weights["up"] @ z)
        return said if name in ("rate", "keep") else z + said

    def row(self, x: Tensor, q: Tensor, starts: Tensor, chunk: int) -> Tensor:
        """Outputs (T, K), without momentum; all memories share one chunk."""
        now = anchor = {name: State(w, {}) for name, w in self.initial.items()}
        outputs = []
        for t in range(len(x)):
            if t % chunk == 0:
                anchor = now
            if starts[t]:
                now = anchor = {name: State(w, {}) for name, w in self.initial.items()}
            said = {name: self.say(name, anchor[name].weights, x[t]) for name in ("key", "value", "rate", "keep")}
            k, v = said["key"] / said["key"].norm(), said["value"]
            rate = self.biases[2] * torch.sigmoid(said["rate"] + self.biases[0])[0]
            keep = torch.sigmoid(said["keep"] + self.biases[1])[0]
            outputs.append(self.say("main", anchor["main"].weights, q[t]))
            moved = {}
            for name, state in now.items():
                target = self.say(name, anchor[name].weights, v)
                leaves = {n: w.detach().requires_grad_() for n, w in anchor[name].weights.items()}
                loss = 0.5 * (self.say(name, leaves, k) - target).square().sum()
                g = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
                up, down = state.weights["up"], state.weights["down"]
                eye = torch.eye(len(k), dtype=k.dtype)
                moved[name] = State(
                    {
                        "up": up @ (keep * eye - rate * torch.outer(k, k)) - rate * g["up"],
                        "down": keep * down - rate * g["down"],
                    },
                    {},
                )
            now = moved
        return torch.stack(outputs)

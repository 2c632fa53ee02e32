"""The sequence memories token by token, one row and one head, from the interface of associative memory alone."""

import torch
from nlscale_kernels.associative import MOMENTUM, Associative, Gates, mlp, square
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.mlp_memory.reference import ACTIVATIONS
from nlscale_kernels.self_modifying import Memories
from torch import Tensor

TITANS = Associative(mlp, square, MOMENTUM)


def of(activation: str) -> Associative:
    """Titans whose memory has other units."""

    def answer(weights: dict[str, Tensor], z: Tensor) -> Tensor:
        return z + weights["down"] @ ACTIVATIONS[activation](weights["up"] @ z)

    return Associative(answer, square, MOMENTUM)


def titans_row(
    net: Net,
    head: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    starts: Tensor,
    chunk: int,
    memory: Associative = TITANS,
) -> Tensor:
    """Readings (T, K) of one head over one row; gates (3, T): rate, momentum, keep. Gradients and readings at anchors."""
    initial = memory.begin({"up": net.up[0, head, 0], "down": net.down[0, head, 0]})
    state = anchor = initial
    outputs = []
    for t in range(len(q)):
        if t % chunk == 0:
            anchor = state
        if starts[t]:
            state = anchor = initial
        outputs.append(memory.read(anchor, q[t]))
        state = memory.write(state, k[t], v[t], Gates(gates[0, t], gates[2, t], gates[1, t]), at=anchor)
    return torch.stack(outputs)


class Five:
    """Self-modifying Titans of one head, exactly as eqs. 83-93 (corrected) say, momentum by the house's rule for W2."""

    def __init__(
        self,
        memories: Memories,
        head: int,
        biases: tuple[float, float, float],
        erase: bool = True,
        still: str = "",
        unit_values: bool = True,
        clip: float = 0.0,
        activation: str = "silu",
        per_layer: bool = False,
        taught: bool = False,
    ) -> None:
        """`erase`: whether writes erase along their key; `still`: a memory that is never written; else as in `Gates`."""
        names = (("key", "value", "query"), ("rate", "keep"), ("main",))
        self.initial = {
            name: {"up": net.up[0, head, place], "down": net.down[0, head, place]}
            for net, group in zip(memories, names, strict=True)
            for place, name in enumerate(group[: net.up.shape[2]])
        }
        self.biases, self.erase, self.unwritten, self.unit_values = biases, erase, still, unit_values
        self.per_layer, self.taught = per_layer, taught
        self.clip, self.units = clip or float("inf"), ACTIVATIONS[activation]

    def say(self, name: str, weights: dict[str, Tensor], z: Tensor) -> Tensor:
        said = weights["down"] @ self.units(weights["up"] @ z)
        return said if name in ("rate", "keep") else z + said

    def row(self, x: Tensor, q: Tensor, starts: Tensor, chunks: tuple[int, int], share: Tensor | None = None) -> Tensor:
        """Outputs (T, K); chunks of the makers and of the main memory; `share`: momentum (T,), None: none."""
        size = {name: chunks[1 if name == "main" else 0] for name in self.initial}
        share = torch.zeros(len(x), dtype=x.dtype) if share is None else share

        def fresh(name: str) -> dict[str, Tensor]:
            weights = self.initial[name]
            speeds = {f"{part}.{n}": torch.zeros_like(w) for n, w in weights.items() for part in ("speed", "learnt")}
            return weights | speeds | {"kept": weights["down"]}

        now = {name: fresh(name) for name in self.initial}
        anchor, means, outputs = dict(self.initial), {name: [] for name in now}, []
        for t in range(len(x)):
            for name in now:
                if t % size[name] == 0:
                    anchor[name], means[name] = {n: now[name][n] for n in ("up", "down")}, []
                    now[name]["kept"] = now[name]["down"]
                if starts[t]:
                    now[name], anchor[name], means[name] = fresh(name), self.initial[name], []
                means[name].append(share[t])
            said = {name: self.say(name, anchor[name], x[t]) for name in ("key", "value", "rate", "keep")}
            k, v = said["key"] / said["key"].norm(), said["value"]
            v = v / v.norm() if self.unit_values else v
            rate = self.biases[2] * torch.sigmoid(said["rate"] + self.biases[0])[0]
            keep = torch.sigmoid(said["keep"] + self.biases[1])[0]
            if "query" in now:
                made = self.say("query", anchor["query"], x[t])
                q = q.index_copy(0, torch.tensor([t]), (made / made.norm())[None])
            outputs.append(self.say("main", anchor["main"], q[t]))
            for name, state in now.items():
                if name != self.unwritten:
                    self.write(name, state, anchor[name], (k, v), (rate, keep, share[t]))
                    if (t + 1) % size[name] == 0:
                        self.end(state, torch.stack(means[name]).mean())
        return torch.stack(outputs)

    def write(
        self,
        name: str,
        state: dict[str, Tensor],
        anchor: dict[str, Tensor],
        pair: tuple[Tensor, Tensor],
        gates: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """One token's, whose gates are rate, share kept and momentum."""
        (k, v), (rate, keep, share) = pair, gates
        g = self.slope(name, anchor, k, self.say(name, anchor, v))
        inputs = {"up": self.erase * torch.outer(k, k)}
        if self.per_layer:  # W1 as W2, along its own input
            u = self.units(anchor["up"] @ k)
            inputs["down"] = torch.outer(u, u) / u.square().sum()
        for n, along in inputs.items():
            turn = keep * torch.eye(len(along), dtype=k.dtype) - rate * along
            state[n], state[f"learnt.{n}"] = state[n] @ turn, state[f"learnt.{n}"] @ turn - rate * g[n]
        if not self.per_layer:  # W1's momentum goes from token to token
            state["speed.down"] = share * state["speed.down"] - rate * g["down"]
            state["down"], state["kept"] = keep * state["down"] + state["speed.down"], keep * state["kept"]

    def end(self, state: dict[str, Tensor], mean: Tensor) -> None:
        """A chunk's: momentum of what erases goes from chunk to chunk, and what is added stays within a norm."""
        for n in ("up", "down") if self.per_layer else ("up",):
            moved = mean * state[f"speed.{n}"] + state[f"learnt.{n}"]
            state[f"speed.{n}"] = moved * min(1.0, self.clip / float(moved.norm()))
            state[n], state[f"learnt.{n}"] = state[n] + state[f"speed.{n}"], 0 * moved
        if not self.per_layer:
            added = state["down"] - state["kept"]
            share = min(1.0, self.clip / float(added.norm()))
            state["down"], state["speed.down"] = state["kept"] + share * added, share * state["speed.down"]

    def slope(self, name: str, weights: dict[str, Tensor], k: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Autograd's gradient of half the squared error, the target as given; `taught`: differentiable in turn."""
        each = {n: weights[n] for n in ("up", "down")}
        if self.taught:
            return torch.func.grad(lambda w: 0.5 * (self.say(name, w, k) - target).square().sum())(each)
        leaves = {n: w.detach().requires_grad_() for n, w in each.items()}
        loss = 0.5 * (self.say(name, leaves, k) - target).square().sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

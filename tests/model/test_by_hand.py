"""Every memory by hand, a head and a row at a time: the papers' formulas, softmax written out, memories token by token."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.associative import Gates
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.self_modifying import Memories
from torch import Tensor

from nlscale.config.run import Run
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.kernels.oracles import TITANS, Five, titans_row
from tests.tiny import tiny

CHUNKS = [
    "model.layers=1",
    "model.linear.chunk=4",
    "model.written.chunk=4",
    "model.titans.chunk=4",
    "model.self_modifying.chunk=2",
]
CHUNKS += ["model.self_modifying.maker_chunk=4", "model.window=5"]
PLACES = torch.arange(16)


class Layer:
    """A mixer's weights by name, and what every mixer does with them."""

    def __init__(self, run: Run, weights: dict[str, Tensor], starts: Tensor) -> None:
        self.w, self.model, self.starts, self.document = weights, run.model, starts, starts.cumsum(0)
        self.heads, self.width = run.model.heads, run.model.head_width

    def below(self, prefix: str) -> "Layer":
        """One half of a mixer of two."""
        found = object.__new__(Layer)
        found.__dict__ |= self.__dict__ | {
            "w": {n.removeprefix(prefix): w for n, w in self.w.items() if n.startswith(prefix)}
        }
        return found

    def rms(self, z: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return gain * z / (z.square().mean(-1, keepdim=True) + self.model.norm_eps).sqrt()

    def of(self, name: str, head: int) -> Tensor:
        """The rows of a head."""
        return self.w[name].chunk(self.heads)[head]

    def part(self, x: Tensor, name: str, head: int) -> Tensor:
        """A projection of the normed input, convolved over its document where it has taps: (T, f)."""
        z = self.rms(x, self.w["norm.weight"]) @ self.of(f"{name}.weight", head).T
        if f"convolution.{name}" not in self.w:
            return z
        taps, rows = self.of(f"convolution.{name}", head), []
        for t in range(len(z)):
            known = [j for j in range(taps.shape[1]) if t >= j and self.document[t - j] == self.document[t]]
            rows.append(F.silu(sum(taps[:, j] * z[t - j] for j in known)))
        return torch.stack(rows)

    def gate(self, x: Tensor, name: str, head: int) -> Tensor:
        return torch.sigmoid(self.part(x, name, head)[:, 0] + self.w[f"{name}.bias"][head])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sees: Callable[[int, int], bool], learned: str, head: int
    ) -> Tensor:
        """Each token over what it sees, and over learned tokens where there are any."""
        ahead = [self.of(f"{learned}.{name}", head) for name in "kv"] if f"{learned}.k" in self.w else [q[:0], q[:0]]
        said = []
        for t in range(len(q)):
            seen = [i for i in range(len(k)) if sees(t, i)]
            keys, values = torch.cat([ahead[0], k[seen]]), torch.cat([ahead[1], v[seen]])
            said.append(torch.softmax(keys @ q[t] / self.width**0.5, 0) @ values)
        return torch.stack(said)

    def window(self, t: int, i: int) -> bool:
        """Whether token t sees token i of its row."""
        return 0 <= t - i < (self.model.window or 16) and bool(self.document[t] == self.document[i])

    def turned(self, z: Tensor, places: Tensor = PLACES) -> Tensor:
        """Rotary positions (Su et al., 2021), from tables in float32."""
        frequency = self.model.rope_base ** (-torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        angle = torch.outer(places.double(), frequency)
        (a, b), cosine, sine = z.chunk(2, -1), angle.cos().float().double(), angle.sin().float().double()
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)

    def both(self, y: Tensor, recalled: Tensor, head: int) -> Tensor:
        """What attention gives, gated by what the memory says."""
        gains = (self.w[f"gain.{name}"][head] for name in ("attention", "memory"))
        return self.rms(y, next(gains)) * F.silu(self.rms(recalled, next(gains)))

    def finish(self, x: Tensor, said: list[Tensor], normed: bool = True) -> Tensor:
        """x + out(each head's, normed and gated)."""
        said = [self.rms(o) for o in said] if normed else said
        gates = [F.silu(self.part(x, "gate", h)) if "gate.weight" in self.w else 1.0 for h in range(self.heads)]
        return x + torch.cat([o * g for o, g in zip(said, gates, strict=True)], -1) @ self.w["out.weight"].T


def one(z: Tensor) -> Tensor:
    return z / (z.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def matrix(layer: Layer, x: Tensor) -> Tensor:
    said, erases = [], layer.model.mixer == "delta"
    for h in range(layer.heads):
        q, k, v = (layer.part(x, name, h) for name in "qkv")
        rate, keep = layer.model.linear.rate * layer.gate(x, "rate", h), layer.gate(x, "keep", h)
        M = initial = layer.of("memory.start", h)
        rows = []
        for t, key in enumerate(one(k)):
            M = initial if layer.starts[t] else M
            M = keep[t] * M + rate[t] * torch.outer(v[t] - (M @ key if erases else 0), key)
            rows.append(M @ q[t] / layer.width**0.5)
        said.append(torch.stack(rows))
    return layer.finish(x, said)


def written(layer: Layer, x: Tensor) -> Tensor:
    """Attention, then a matrix that the row writes (eq. 69)."""
    said, settings = [], layer.model.written
    for h in range(layer.heads):
        q, k, v = (layer.part(x, name, h) for name in "qkv")
        y = layer.attend(layer.turned(q), layer.turned(k), v, layer.window, "persistent", h)
        W = slow = layer.of("memory.slow", h)
        rate, rows = settings.rate * layer.gate(x, "rate", h), []
        for t, key in enumerate(one(k)):
            W = slow if layer.starts[t] else W
            W = W + rate[t] * torch.outer(v[t] - (W @ key if settings.rule == "delta" else 0), key)
            rows.append(W @ y[t])
        said.append(torch.stack(rows))
    return layer.finish(x, said, normed=False)


def gates_of(layer: Layer, x: Tensor, h: int) -> Tensor:
    rate = layer.model.titans.rate * layer.gate(x, "rate", h)
    return torch.stack([rate, layer.gate(x, "momentum", h), layer.gate(x, "keep", h)])


def recalled(layer: Layer, x: Tensor, h: int) -> Tensor:
    """What the memory, alone, says to the queries."""
    q, k, v = (layer.part(x, name, h) for name in "qkv")
    net = Net(*(layer.w[f"memory.main.{n}"].unflatten(0, (layer.heads, -1))[None, :, None] for n in ("up", "down")))
    return titans_row(net, h, one(q), one(k), v, gates_of(layer, x, h), layer.starts, 4)


def titans(layer: Layer, x: Tensor) -> Tensor:
    return layer.finish(x, [recalled(layer, x, h) for h in range(layer.heads)])


def titans_mag(layer: Layer, x: Tensor) -> Tensor:
    said = []
    for h in range(layer.heads):
        q, k, v = (layer.part(x, f"attention_{name}", h) for name in "qkv")
        y = layer.attend(layer.turned(q), layer.turned(k), v, layer.window, "persistent", h)
        said.append(layer.both(y, recalled(layer, x, h), h))
    return layer.finish(x, said)


def titans_mal(layer: Layer, x: Tensor) -> Tensor:
    x, layer, said = titans(layer.below("recall."), x), layer.below("attend."), []
    for h in range(layer.heads):
        q, k, v = (layer.part(x, name, h) for name in "qkv")
        said.append(layer.attend(layer.turned(q), layer.turned(k), v, layer.window, "persistent", h))
    return layer.finish(x, said, normed=False)


def titans_mac(layer: Layer, x: Tensor) -> Tensor:
    said = []
    for h in range(layer.heads):
        initial = TITANS.begin({n: layer.of(f"memory.main.{n}", h) for n in ("up", "down")})
        inside = {
            name: layer.of(f"memory.{name}", h).T for name in ("context_k", "context_v", "read_q", "write_k", "write_v")
        }
        gates, state, rows = gates_of(layer, x, h), initial, []
        for first in range(0, len(x), 4):
            here, places = slice(first, first + 4), torch.arange(4)
            begun = layer.document[here] > layer.document[first] - layer.starts[first].long()
            anchors = [initial if fresh else state for fresh in begun]
            q, k, v, ask = (layer.part(x, name, h)[here] for name in ("q", "k", "v", "recall"))
            heard = torch.stack([TITANS.read(anchor, z) for anchor, z in zip(anchors, one(ask), strict=True)])

            def sees(t: int, i: int, document: Tensor = layer.document[here]) -> bool:
                return i % 4 <= t and bool(document[t] == document[i % 4])

            keys = torch.cat([layer.turned(heard @ inside["context_k"], places), layer.turned(k, places)])
            values = torch.cat([heard @ inside["context_v"], v])
            y = layer.attend(layer.turned(q, places), keys, values, sees, "persistent", h)
            answer = [TITANS.read(anchor, z) for anchor, z in zip(anchors, one(y @ inside["read_q"]), strict=True)]
            rows.append(layer.both(y, torch.stack(answer), h))
            for t, (key, value) in enumerate(zip(one(y @ inside["write_k"]), y @ inside["write_v"], strict=True)):
                rate, momentum, keep = gates[:, first + t]
                state = initial if layer.starts[first + t] else state
                state = TITANS.write(state, key, value, Gates(rate, keep, momentum), at=anchors[t])
        said.append(torch.cat(rows))
    return layer.finish(x, said)


def self_modifying(layer: Layer, x: Tensor) -> Tensor:
    def net(*names: str) -> Net:
        stacks = ([layer.w[f"memory.{n}.{w}"].unflatten(0, (layer.heads, -1)) for n in names] for w in ("up", "down"))
        return Net(*(torch.stack(each, 1)[None] for each in stacks))

    memories, said = Memories(net("key", "value"), net("rate", "keep"), net("main")), []
    for h in range(layer.heads):
        biases = float(layer.w["rate.bias"][h]), float(layer.w["keep.bias"][h]), layer.model.self_modifying.rate
        five, momentum = Five(memories, h, biases), layer.gate(x, "momentum", h)
        said.append(five.row(layer.part(x, "input", h), one(layer.part(x, "q", h)), layer.starts, (4, 2), momentum))
    return layer.finish(x, said)


HANDS = {"linear": matrix, "delta": matrix, "titans": titans, "titans_mag": titans_mag, "titans_mal": titans_mal}
HANDS |= {"written": written, "titans_mac": titans_mac, "self_modifying": self_modifying}


def compared(run: Run) -> tuple[float, float]:
    """By how much a mixer differs from its form by hand, and how much it adds."""
    model = parallelize(run, join(run.parallel, run.cluster, 0), torch.float64)
    torch.manual_seed(0)
    weights = {}
    with torch.no_grad():
        for leaf in model.leaves:
            if ".mix." in leaf.name:
                plain = torch.ones_like if "norm" in leaf.name or "gain" in leaf.name else torch.zeros_like
                leaf.value.copy_(plain(leaf.value) + 0.4 * torch.randn_like(leaf.value))
                weights[leaf.name.split(".mix.")[1]] = leaf.value.detach().clone()
        x, starts = torch.randn(16, 2, 32, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.bool)
        starts[0, [0, 6]] = starts[1, [3, 8, 9]] = True
        said, _ = model.chunks[0].blocks[0].mix(x, model.chunks[0].scene(starts))
    rows = [HANDS[run.model.mixer](Layer(run, weights, starts[row]), x[:, row]) for row in range(2)]
    return float((said - torch.stack(rows, 1)).abs().max()), float((said - x).abs().max())


@pytest.mark.parametrize("mixer", [*HANDS, "self_modifying-gate"])
def test_a_mixer_is_what_its_paper_says(mixer: str) -> None:
    """With documents that begin inside chunks, a window, learned tokens and gains of any size."""
    name, _, gate = mixer.partition("-")
    run = tiny(*CHUNKS, f"model.mixer={name}", *(["model.self_modifying.gate=true"] if gate else []))
    ((apart, added),) = ranks(1, compared, run)
    assert apart < 1e-10 and added > 0.1


def learnt(run: Run) -> dict[str, float]:
    """The largest gradient of each of a mixer's weights, from what the memory says."""
    model = parallelize(run, join(run.parallel, run.cluster, 0), torch.float64)
    torch.manual_seed(0)
    leaves = [leaf for leaf in model.leaves if ".mix." in leaf.name]
    x, nowhere = torch.randn(16, 2, 32, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.bool)
    with torch.no_grad():
        for leaf in leaves:
            leaf.value.copy_(0.4 * torch.randn_like(leaf.value))
    said, _ = model.chunks[0].blocks[0].mix(x, model.chunks[0].scene(nowhere))
    weights = list(dict.fromkeys(leaf.parameter for leaf in leaves))
    slopes = dict(zip(weights, torch.autograd.grad(said.square().sum(), weights, allow_unused=True), strict=True))
    found = {}
    for leaf in leaves:
        slope = slopes[leaf.parameter]
        own = torch.zeros(1) if slope is None else leaf.of(slope)
        found[leaf.name.split(".mix.")[1]] = float(own.abs().max())
    return found


@pytest.mark.parametrize("mixer", ["titans", "titans_mag", "titans_mal", "titans_mac"])
def test_row_14_titans_that_are_not_taught_through_writes(mixer: str) -> None:
    """What makes keys, values and gates of writes learns nothing, all else does (the paper's ablation)."""
    run = [*CHUNKS, f"model.mixer={mixer}"]
    ((taught,), (ablated,)) = (ranks(1, learnt, tiny(*run, *more)) for more in ([], ["model.titans.taught=false"]))
    writes = ["rate.weight", "momentum.weight", "keep.weight", "rate.bias", "momentum.bias", "keep.bias"]
    own = ["k.weight", "v.weight", "convolution.k", "convolution.v"]
    writes += ["memory.write_k", "memory.write_v"] if mixer == "titans_mac" else own
    writes = [f"recall.{name}" if mixer == "titans_mal" else name for name in writes]
    assert all(taught[name] > 1e-6 for name in taught)
    assert {name for name, slope in ablated.items() if slope == 0} == {*writes}

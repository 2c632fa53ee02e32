"""GPUs that clusters have and plans speak of: vendors' figures, and the shares of them that a plan counts on."""

from dataclasses import dataclass

from nlscale.config.errors import require


@dataclass(frozen=True)
class Device:
    """One GPU and its place in a cluster. Bytes, bytes a second, operations a second."""

    name: str
    memory: float
    flops: float  # dense bf16
    flops_fp32: float
    bandwidth: float  # of its memory
    link: float  # to another GPU of its node, one way
    network: float  # to another node, one way, its share
    host: float = 50e9  # to the host's memory, one way
    node: int = 8  # GPUs of a node
    beside: float = 250e9  # memory of the host, its share: 2 TB of a node of eight

    @property
    def host_room(self) -> float:
        """Bytes that may lie in host memory between saves: while one is written, as much again is copied there."""
        return ROOM * self.beside / 2


MIB = 2**20
# Memory as the driver tells it (nvidia-smi's memory.total), the rest from vendors' data sheets; `network` is 400 Gb/s a GPU,
# half of it beside A100.
DEVICES = {
    each.name: each
    for each in (
        Device("a100", 81920 * MIB, 312e12, 19.5e12, 2.0e12, 300e9, 25e9),
        Device("h100", 81559 * MIB, 989e12, 67e12, 3.35e12, 450e9, 50e9),
        Device("h200", 143771 * MIB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
        Device("b200", 183359 * MIB, 2250e12, 80e12, 8.0e12, 900e9, 50e9),
    )
}
# What a plan counts on, of a vendor's figure. Assumptions until a plan is held against a run on that GPU.
PRODUCTS, SCORES, MEMORIES = 0.68, 0.50, 0.25  # of the peak: weights' products, attention's, memories'
STREAM, WIRE = 0.80, 0.75  # of memory's bandwidth and of links
ROOM = 0.92  # of the memory: the rest is the driver's, NCCL's, and what lies between allocations


def device(name: str, said: str = "--gpu") -> Device:
    """A GPU by its name; raises UserError with the names there are."""
    require(name in DEVICES, f"{said} {name}: known are {', '.join(DEVICES)}")
    return DEVICES[name]

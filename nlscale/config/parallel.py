"""The layout: how many ranks share one replica of the model."""

from dataclasses import dataclass
from math import gcd

from nlscale.config.errors import require


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Degrees of model parallelism; data parallelism is what remains of the world."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # chunks of layers a stage (interleaved 1F1B)
    context: int = 1  # ranks that share the tokens of each row
    sequence: bool = False  # activations between tensor-parallel layers are split along the sequence

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "context"):
            require(getattr(self, name) >= 1, f"parallel.{name}={getattr(self, name)} must be at least 1")
        require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline of 2 or more",
        )
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence=true needs parallel.tensor of 2 or more: it splits activations over those ranks",
        )

    @property
    def ranks(self) -> int:
        """Ranks that hold one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def stages(self) -> int:
        """Chunks of layers, over all pipeline ranks."""
        return self.pipeline * self.virtual_pipeline

    @property
    def said(self) -> str:
        """The degrees, in words."""
        around = f" x parallel.context={self.context}" if self.context > 1 else ""
        return f"parallel.tensor={self.tensor} x parallel.pipeline={self.pipeline}{around}"

    @property
    def worlds(self) -> str:
        """How many ranks hold whole replicas, in words."""
        return f"{', '.join(str(self.ranks * count) for count in (1, 2, 4))} ... ranks"

    def narrower(self, world: int) -> dict[str, int | bool]:
        """What is other in a layout that a world holds whole: each degree a part of what it is."""
        other: dict[str, int | bool] = {}
        for name in ("tensor", "context", "pipeline"):
            degree = gcd(world, getattr(self, name))
            world //= degree
            if degree != getattr(self, name):
                other[name] = degree
        if other.get("tensor") == 1 and self.sequence:
            other["sequence"] = False
        if other.get("pipeline") == 1 and self.virtual_pipeline > 1:
            other["virtual_pipeline"] = 1
        return other

"""The machines: what ranks find there, and what `nlscale submit` asks Slurm for. One file of configs/cluster a cluster."""

import re
from dataclasses import dataclass, field

from nlscale.config.devices import DEVICES, device
from nlscale.config.errors import positive, require

WORD = re.compile(r"[\w.,:;@%/=+*&|()#\[\]-]*")  # what Slurm takes without quotes
TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")
MEMORY = re.compile(r"(\d+[KMGT]?)?")
SECRET = re.compile(r"(key|token|secret|password|passphrase|credentials?)$", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z_]\w*")
ALIKE = 0.98  # of a GPU's memory


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The kind of machine. Memory in GiB, times in seconds where nothing else is said."""

    nproc: int | None = None  # ranks that `nlscale train` starts on this machine; unset: what the layout needs
    threads: int | None = None  # of one rank on a CPU; unset: cores shared evenly
    timeout: int = 600  # seconds until a collective that waits is given up
    watchdog: float = (
        600.0  # seconds without a step after which every rank's stacks are written and the job ends; 0: never
    )
    lease: float = 60.0  # seconds without a sign of life after which another host's hold on a run folder is over
    gather: float = 600.0  # seconds in which every rank must have come; who has not is named

    gpus: int = 0  # of a node; 0: ranks compute on its cores
    gpu: str = ""  # which one (config/devices.py): `check` and `plan` go by it, and nodes are held to its memory
    tasks: int | None = None  # ranks of a node; unset: one a GPU, or one
    cores: int | None = None  # of a rank (Slurm's CPUs); unset: Slurm's default
    memory: str = ""  # of a node, as Slurm writes it; 0: all of it
    scratch: str = ""  # folder on a node's own disk for temporary files; unset: TMPDIR
    least_free: float = 1.0  # GiB that scratch and the run folder must have free
    least_write: float = 1.0  # MiB a second that a write to both must reach
    write: float = 500.0  # MiB a second that a node is taken to write checkpoints with, by `nlscale check`
    least_gpu_memory: float = 0.0  # GiB that each GPU must have; 0: nearly what cluster.gpu has
    skew: float = 2.0  # seconds by which a node's clock may differ from the first node's

    partition: str = ""
    account: str = ""
    quality: str = ""  # Slurm's --qos
    constraint: str = ""
    time: str = "1-00:00:00"  # limit of one job: days-hours:minutes:seconds, or seconds (what YAML makes of 12:00:00)
    lead: int = 300  # seconds before that at which ranks are told to save
    exclusive: bool = True  # whole nodes
    options: list[str] = field(default_factory=list)  # any further option of sbatch, such as --mail-type=FAIL

    bind: str = ""  # srun's --cpu-bind
    container: str = ""  # image of the ranks, for srun's --container-image (pyxis)
    mounts: list[str] = field(default_factory=list)  # of the container
    python: str = ""  # interpreter of the ranks; unset: the one that submits
    setup: list[str] = field(default_factory=list)  # lines of shell before anything starts, such as module load cuda
    environment: dict[str, str] = field(default_factory=dict)  # of the ranks: NCCL, the fabric

    attempts: int = 3  # crashes that got no further than the same checkpoint, after which the run is given up
    failures: int = 2  # of a node, after which the run's next attempts leave it out

    def __post_init__(self) -> None:
        for name in self.environment:
            require(
                not SECRET.search(name),
                f"cluster.environment.{name} would be written to the job script, config.yaml and checkpoints; ranks have "
                "the environment that the job was submitted from",
            )
        if self.gpu:
            device(self.gpu, "cluster.gpu")
        least = ("least_free", "least_write", "least_gpu_memory")
        for name in ("watchdog", "lease", "gather", "gpus", "lead", *least):
            require(getattr(self, name) >= 0, f"cluster.{name}={getattr(self, name)} must not be negative")
        counts = ("attempts", "failures", "skew", "write", "tasks", "cores", "nproc", "threads", "timeout")
        positive("cluster", **{name: getattr(self, name) for name in counts})
        for name in ("partition", "account", "quality", "constraint", "bind", "container"):
            self.check(f"cluster.{name}", getattr(self, name), WORD, "without spaces or quotes")
        for name in ("options", "mounts"):
            for value in getattr(self, name):
                self.check(f"cluster.{name}", value, WORD, "without spaces or quotes")
        self.check("cluster.time", self.time, TIME, "seconds, hours:minutes:seconds or days-hours")
        self.check("cluster.memory", self.memory, MEMORY, "a number with K, M, G or T")
        for name, value in self.environment.items():
            self.check("cluster.environment", name, NAME, "a variable's name")
            require("\n" not in value, f"cluster.environment.{name} has more than one line")
        require(
            not self.container or bool(self.python),
            "cluster.container has an interpreter of its own: cluster.python=python3, or its path in the image",
        )
        require(
            not self.gpus or self.ranks <= self.gpus,
            f"cluster.tasks={self.tasks} ranks cannot have one of {self.gpus} GPUs a node each; "
            f"cluster.tasks={self.gpus} would work",
        )

    @staticmethod
    def check(name: str, value: str, pattern: re.Pattern[str], wanted: str) -> None:
        """Raises UserError unless `value` is of the pattern: it becomes a line of the job script."""
        require(pattern.fullmatch(value) is not None, f"{name}={value!r} must be {wanted}")

    @staticmethod
    def least_lead(save: float, step: float) -> float:
        """Seconds that `lead` must be: the save under way and the last one, the step under way and the next."""
        return 2 * save + 2 * step

    @property
    def gpu_memory(self) -> float:
        """GiB that each GPU must have; 0: nobody says. Drivers differ a little in what they keep for themselves."""
        return self.least_gpu_memory or (ALIKE * DEVICES[self.gpu].memory / 2**30 if self.gpu else 0.0)

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.tasks or self.gpus or 1

    @property
    def limit(self) -> int:
        """Seconds that one job may take."""
        days, _, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        hours, minutes, seconds = (*parts, 0, 0)[:3] if days else (0, 0, *parts)[-3:]
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds

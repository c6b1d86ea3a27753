"""The package: `pip install -e .` is all that sampling, training and conversion need; torch comes with `[test]`."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="sdv_jax",
    version="0.1.0",
    description="Subject-driven video generation: CogVideoX and Wan with reference images, in JAX and Flax NNX",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text()
    if pathlib.Path("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["sdv_jax", "sdv_jax.*"]),
    entry_points={"console_scripts": ["sdv = sdv_jax.cli:main"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12,<0.13",
        "grain>=0.2.18",
        "ml_collections>=1.1",
        "absl-py>=2.1",
        "einops>=0.8",
        "jaxtyping>=0.3",
        "numpy>=2.0",
        "safetensors>=0.5",
        "transformers>=5.0,<6",  # only its tokenizer; transformers brings no torch
        "sentencepiece>=0.2",  # tokenizers published as spiece.model
        "ftfy>=6.3",  # cleans prompts as Wan's were
        "av>=17.0",
        "pillow>=11.0",
        "tensorflow-datasets>=4.9.9",  # the layout of prepared data; read and written without tensorflow
        "array_record>=0.8",
        "pyarrow>=18.0",  # parquet files of published data sets
        "tqdm>=4.66",
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "beartype>=0.19",
            "torch==2.13.0",
            "diffusers==0.42.*",
            "peft>=0.17",
            "accelerate>=1.0",
        ],
        "gpu": ["jax[cuda13]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
    },
)

"""The Wan family: causal 3-D VAE (2.1 or 2.2), UMT5 text encoder, diffusion transformer (A14B: two of them).

The contract of a family: `VARIANTS` (name -> config), `build` (config -> transformer), `SHARDING` (path table) and
`LORA_TARGETS`; `family.py` binds them to checkpoints, pipeline and training.
"""

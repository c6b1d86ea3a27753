"""Model families, one folder each. A family is a module with `VARIANTS`, `build`, `SHARDING` and `LORA_TARGETS`."""

"""The rooms behind the scripts, from the ground up: core, options and config, data, sharding, memory, model, training,
folders, inference, export. See docs/architecture.md."""

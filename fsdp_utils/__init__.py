"""The rooms behind the scripts, from the ground up: core, options and config, data, sharding, memory, model, training,
folders, inference, export. See docs/architecture.md."""

import logging

# each process would say, as if it were an error, that an optional kernel of bitsandbytes' is not installed
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)

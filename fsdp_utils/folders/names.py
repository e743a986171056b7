"""The names of what lies in a saved folder."""

from fsdp_utils.core.folders import TEMPLATES
from methods.llama_pro import EXPANDED_LAYERS_FILE

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "bitsandbytes", "hqq", "peft", "accelerate", "datasets", "safetensors")
DESCRIPTIONS = (EXPANDED_LAYERS_FILE, "generation_config.json", "config.json", "adapter_config.json")
ADAPTER_FOLDER = "adapter"  # where an exported model folder keeps the adapter that belongs to it
OF_AN_EXPORT = ("fidelity.json", "chat_template.jinja")
OWN_FILES = {RUN_FILE, "metrics.jsonl"}  # what a run without --save_model leaves behind
MARKS = {RUN_FILE, "adapter_config.json", "config.json"}  # of a folder that may be overwritten
FOLDERS = (ADAPTER_FOLDER, TEMPLATES)  # of an older result
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"

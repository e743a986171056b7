"""The names of what lies in a saved folder."""

from fsdp_utils.core.folders import DIVERGED_FILE, METRICS_FILE, REPORT_FILE, RUN_FILE, TEMPLATES
from fsdp_utils.training.sinks import TENSORBOARD
from methods.adapter import ADAPTER_CONFIG
from methods.llama_pro import EXPANDED_LAYERS_FILE

CARD = "README.md"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"  # where an exported model folder keeps the adapter that belongs to it
GENERATION_CONFIG = "generation_config.json"
DESCRIPTIONS = (EXPANDED_LAYERS_FILE, GENERATION_CONFIG, "config.json", ADAPTER_CONFIG)
OF_AN_EXPORT = ("fidelity.json",)
GGUF_FILE = "model.gguf"  # an export that is this file alone
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (  # patterns
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE),
    *("chat_template.json", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json", "tokenization_*.py"),
)
# what a run without --save_model leaves behind
OWN_FILES = {RUN_FILE, METRICS_FILE, DIVERGED_FILE, REPORT_FILE, TENSORBOARD}
MARKS = {RUN_FILE, ADAPTER_CONFIG, "config.json"}  # of a folder that may be overwritten
FOLDERS = (ADAPTER_FOLDER, TEMPLATES)  # of an older result
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"  # of a checkpoint; written last
STATE_FILE = "state.json"
TRAINED_FILE = "trained.safetensors"  # what trains, where that is not a whole model
MODEL_WEIGHTS = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
PACKAGES = ("torch", "transformers", "bitsandbytes", "hqq", "peft", "accelerate", "datasets", "safetensors")

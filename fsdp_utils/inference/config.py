"""The flags of evaluate.py."""

import os
from dataclasses import dataclass, field

from fsdp_utils.core.flags import flag, section
from fsdp_utils.options import DTYPES, EVAL_TYPES


@dataclass
class EvalConfig:
    """The settings of one evaluation; see `python evaluate.py --help`."""

    _model: str = section("model")
    model: str = flag("demo", "folder or hub name of a base model, run or export; `demo` is the built-in base model")
    trust_remote_code: bool = flag(False, "run the code that its folder brings (auto_map in its documents)")
    eval_type: str = flag("auto", "read --model as this, not as what it is", choices=("auto", *EVAL_TYPES))
    dtype: str = flag("auto", "storage and compute precision; auto: as trained", choices=("auto", *DTYPES))
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))
    backend: str = flag("hf", "vllm: needs requirements-vllm.txt, and weights it can serve", choices=("hf", "vllm"))
    max_model_len: int = flag(0, "with --backend vllm: longest prompt and answer; 0: the model's", minimum=0)
    gpu_memory_utilization: float = flag(0.0, "with --backend vllm: share to take; 0: vLLM's", minimum=0, maximum=1)
    server: str | None = flag(None, "address of an OpenAI-compatible server that answers; --model writes the prompts")
    served_model_name: str | None = flag(None, "with --server that serves several models: the one to ask")

    _questions: str = section("questions")
    dataset: str = flag("orca_math", "orca_math, demo, a local file or a set of the hub: questions or chats")
    dataset_split: str = flag("validation", "split of a hub set or folder that has several")
    dataset_config: str | None = flag(None, "configuration of a hub set that has several")
    columns: str | None = flag(None, "what columns are called in the data: question=prompt,answer=response")
    prompt_template: str | None = flag(None, "file with the prompt, columns in braces; not given: that of training")
    prompt: str = flag("auto", "auto: as trained; chat: by the chat template", choices=("auto", "plain", "chat"))
    samples: int = flag(500, "the first so many of the validation set", minimum=1)
    n_shots: int = flag(0, "solved questions of the training split before each question", minimum=0)

    _generation: str = section("generation")
    batch_size: int = flag(32, "questions at a time, of each process; halved where it does not fit", minimum=1)
    max_new_tokens: int = flag(512, "longest answer in tokens", minimum=1)
    temperature: float = flag(0.0, "0: greedy", minimum=0.0)
    seed: int = flag(42, "of the choice of shots and of sampling", minimum=0, maximum=2**63)

    _output: str = section("output")
    output_file: str = flag("evaluation.json", "settings, score, and every question with its answer")
    overwrite: bool = flag(False, "replace --output_file, and forget an interrupted evaluation")

    _launch: str = section("launch without torchrun")
    world_size: int = flag(-1, "processes when started by plain `python`; -1: one per visible GPU", minimum=-1)
    master_addr: str = flag("localhost", "address of process 0")
    master_port: str = flag("12355", "port of process 0")

    explicit_flags: frozenset = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self):
        if (self.backend == "vllm" or self.server) and self.world_size < 1:
            self.world_size = 1  # vLLM starts its own processes, a server has them

    @property
    def reading(self) -> str | None:
        """--eval_type, or None to take the folder as what it is."""
        return None if self.eval_type == "auto" else self.eval_type

    def errors(self) -> list[str]:
        """One line for each flag that cannot work beside the others."""
        found = []
        if 0 < self.temperature < 0.01:
            found.append(f"--temperature {self.temperature}: logits divided by it overflow; pass 0 for greedy answers")
        several = self.world_size > 1 or "WORLD_SIZE" in os.environ
        if self.backend == "vllm" and several:
            found.append("--backend vllm: starts its own processes; run one, without torchrun and --world_size")
        return found + self._server_errors(several)

    def _server_errors(self, several: bool) -> list[str]:
        """The same of --server and --backend."""
        wrong = self.server is not None and not self.server.startswith(("http://", "https://"))
        table = [
            (wrong, f"--server {self.server}: is no address; give one as http://localhost:8000"),
            (self.server and several, "--server: is asked by one process; run without torchrun and --world_size"),
            (self.server and self.backend != "hf", f"--server with --backend {self.backend}: give one of the two"),
            (self.server and self.reading, f"--eval_type {self.eval_type}: a --server has its weights; leave it away"),
            (self.served_model_name and not self.server, "--served_model_name: is of a --server; give that too"),
        ]
        own = dict(max_model_len=self.max_model_len, gpu_memory_utilization=self.gpu_memory_utilization)
        given = [(name, value) for name, value in own.items() if value and self.backend != "vllm"]
        found = [f"--{name} {value}: is of --backend vllm; pass that, or leave it away" for name, value in given]
        return [words for holds, words in table if holds] + found

"""Tiny models and data of the tasks beside language modelling."""

import json
import random
from pathlib import Path

import torch
from tiny import SHAPE, byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    ModernBertConfig,
    PegasusConfig,
    RobertaConfig,
    T5Config,
    T5GemmaConfig,
    T5GemmaModuleConfig,
)

IDS = dict(vocab_size=300, bos_token_id=256, eos_token_id=257, pad_token_id=258)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ENCODER = dict(
    **IDS, **NO_DROPOUT, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=512,
)  # fmt: skip
BART = dict(
    **IDS, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
    encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=512, dropout=0.0,
    decoder_start_token_id=257, forced_eos_token_id=257, scale_embedding=True,
)  # fmt: skip
ENCODERS = {
    "roberta": lambda: RobertaConfig(**ENCODER),
    "bert": lambda: BertConfig(**ENCODER),
    "distilbert": lambda: DistilBertConfig(
        **IDS, dim=64, hidden_dim=128, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "deberta": lambda: DebertaV2Config(
        **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        pooler_hidden_size=64, norm_rel_ebd="layer_norm", share_att_key=True, position_buckets=32,
        max_relative_positions=64,
    ),
    "modernbert": lambda: ModernBertConfig(
        **IDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, cls_token_id=256, sep_token_id=257, global_attn_every_n_layers=2,
        local_attention=16,
    ),
}  # fmt: skip
DECODERS = {"llama_base": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False)}
SEQ2SEQ = {
    "t5": lambda: T5Config(
        **{**IDS, "pad_token_id": 258}, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=258, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ),
    "bart": lambda: BartConfig(**BART),
    "pegasus": lambda: PegasusConfig(**BART),
}  # fmt: skip
GEMMA = dict(**SHAPE | IDS, head_dim=16)
CLASSIFYING = {  # encoders with a decoder that become classifiers here
    "t5gemma": lambda: T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**GEMMA), decoder=T5GemmaModuleConfig(**GEMMA), vocab_size=300
    ),
}
BUILT_BY = (
    dict.fromkeys(ENCODERS, AutoModelForMaskedLM)
    | dict.fromkeys(DECODERS, AutoModelForCausalLM)
    | dict.fromkeys(SEQ2SEQ | CLASSIFYING, AutoModelForSeq2SeqLM)
)


def make_task_model(folder, family: str, *, seed: int = 0) -> Path:
    """Writes a random tiny model, with the head that it is pretrained with, and its tokenizer."""
    torch.manual_seed(seed)
    model = BUILT_BY[family].from_config((ENCODERS | DECODERS | SEQ2SEQ | CLASSIFYING)[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 257)]
    )
    tokenizer.save_pretrained(folder)
    if family == "bert":  # whose texts of a pair have types
        path, names = Path(folder) / "tokenizer_config.json", ["input_ids", "token_type_ids", "attention_mask"]
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(model_input_names=names)))
    return Path(folder)


def write_rows(path, rows: list[dict]) -> Path:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def labelled_rows(samples: int = 24, *, seed: int = 0, pairs: bool = False) -> list[dict]:
    """Texts that say their own label, of very different lengths."""
    draw = random.Random(seed)
    words = {"sports": "goal team", "world": "land vote", "tech": "chip code"}
    rows = []
    for _ in range(samples):
        name = draw.choice(sorted(words))
        text = " ".join(draw.choice(words[name].split()) for _ in range(draw.randint(1, 8)))
        rows.append(dict(text=text, label=name) | (dict(text_pair=text[::-1]) if pairs else {}))
    return rows


def source_rows(samples: int = 24, *, seed: int = 0) -> list[dict]:
    """Words, and the same ones backwards."""
    draw = random.Random(seed)
    texts = ["".join(draw.choice("abcd ") for _ in range(draw.randint(2, 24))).strip() or "a" for _ in range(samples)]
    return [dict(source=text, target=text[::-1]) for text in texts]

#!/bin/sh
# Train, evaluate, export in every format and evaluate each, on the built-in demo: six minutes on two CPU cores.
#
#     sh scripts/demo.sh [FOLDER]        (default: output/demo; must not exist)
set -eu
out=${1:-output/demo}
evaluate() { python evaluate.py --dataset demo --samples 200 --max_new_tokens 64 --model "$1" --output_file "$out/$2.json"; }

begun=$(date +%s)
mkdir -p "$(dirname "$out")" && mkdir "$out"
evaluate demo base
torchrun --nproc_per_node 2 train.py --model_name demo --dataset demo --train_type bnb_dora --precision fp32 \
    --use_cpu_offload false --use_gradient_checkpointing false --lora_alpha 64 --lora_dropout 0 --lr 2e-3 --wd 0 \
    --lr_scheduler linear --batch_size 8 --context_length 128 --save_model true --output_dir "$out/run"
evaluate "$out/run" run
for type in merged bnb_nf4 bnb_dora w4a16; do
    python prepare_weights.py --model "$out/run" --save_dir "$out/$type" --infer_type $type
    evaluate "$out/$type" $type
done
echo "whole sequence: $(($(date +%s) - begun)) s"
python - "$out" <<'TABLE'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
print("| model | exact match | 95 % interval | seconds | weights, MB | KL to trained | same top-1 |\n|---" * 1 + "|---" * 6 + "|")
for name in ("base", "run", "merged", "bnb_nf4", "bnb_dora", "w4a16"):
    score = json.loads((out / f"{name}.json").read_text())
    folder = out / name if (out / name).exists() else Path("demo/model")
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
    report = folder / "fidelity.json"
    close = json.loads(report.read_text())["exported"] if report.exists() else None
    low, high = score["interval_95"]
    closeness = f"{close['kl']:.1e} | {close['top1_agreement']:.1%}" if close else "|"
    print(f"| {name} | {score['score']:.3f} | {low:.3f} to {high:.3f} | {score['seconds']:.0f} | {size:.2f} | {closeness} |")
TABLE

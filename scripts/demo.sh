#!/bin/sh
# Train on the built-in demo, evaluate, export in every format, evaluate each: minutes on two CPU cores.
#
#     sh scripts/demo.sh [FOLDER]        output/formats by default; it must not exist
set -eu
out=${1:-output/formats}
evaluate() {
    python evaluate.py --model "$1" --dataset demo --samples 200 --max_new_tokens 64 --output_file "$out/$2.json"
}

begun=$(date +%s)
mkdir -p "$(dirname "$out")" && mkdir "$out"
torchrun --nproc_per_node 2 train.py --config recipes/demo.yaml --output_dir "$out/run"
evaluate demo base
evaluate "$out/run" run
for type in merged bnb_nf4 bnb_dora w4a16; do
    python prepare_weights.py --model "$out/run" --infer_type $type --save_dir "$out/$type"
    evaluate "$out/$type" $type
done
echo "all of it: $(($(date +%s) - begun)) s"
python - "$out" <<'TABLE'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
print("| | exact match | 95 % interval | seconds | weights, MB | KL to trained | same top-1 |\n" + "|---" * 7 + "|")
for name in ("base", "run", "merged", "bnb_nf4", "bnb_dora", "w4a16"):
    score, folder = json.loads((out / f"{name}.json").read_text()), out / name
    (low, high), report = score["interval_95"], folder / "fidelity.json"
    size = sum(p.stat().st_size for p in (folder if folder.exists() else pathlib.Path("demo/model")).rglob("*.safetensors"))
    near = json.loads(report.read_text())["exported"] if report.exists() else None
    near = f"{near['kl']:.1e} | {near['top1_agreement']:.1%}" if near else "|"
    print(f"| {name} | {score['score']:.3f} | {low:.3f} to {high:.3f} | {score['seconds']:.0f} | {size / 1e6:.2f} | {near} |")
TABLE

"""Show whether a change of the code changes what is computed, by digests of the debug runs' checkpoints and metrics.

    python benchmarks/digests.py --root OTHER_CHECKOUT --out before.json
    python benchmarks/digests.py --against before.json

Each objective is trained through three phases with each compression, with an EMA and gradient accumulation, on
synthetic sounds. Weights, EMA, optimiser state and metrics (without times) are compared byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COMPRESSIONS = ("frame_shift", "pool_mean", "pool_max", "patch")
TIMES = ("train_seconds", "clips_per_second", "data_wait")


def main() -> int:
    """Returns 1 if a digest differs from the one in `--against`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the checkout whose code runs")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.json")
    parser.add_argument("--against", type=Path, default=None, metavar="FILE.json")
    parser.add_argument("--only", default="", help="only the configs whose name contains this")
    arguments = parser.parse_args()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        sounds = Path(folder) / "sounds"
        code = "from ssl_c2f.data.synthetic import write_dataset as w; from pathlib import Path; " \
               f"w(Path({str(sounds)!r}), clips_per_class=5, seconds=1.0)"
        run(arguments.root, "-c", code)
        configs = sorted((REPOSITORY / "configs/debug").glob("*.yaml"))
        for config in (file for file in configs if arguments.only in file.stem):
            for compression in COMPRESSIONS:
                name = f"{config.stem}/{compression}"
                command = "train" if config.stem.startswith("supervised") else "pretrain"
                run_dir = Path(folder) / name
                limit = 8 if config.stem == "views" else 5  # views compares all clips of a batch: no accumulation
                run(arguments.root, "-m", "ssl_c2f", command, str(config), f"data.root={sounds}", f"run_dir={run_dir}",
                    f"compression={compression}", "ema=0.9", f"train.max_batch_per_device={limit}")
                found |= {f"{name}/{file}": digest for file, digest in digests(run_dir).items()}
                print(name, len(found), "digests", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if not arguments.against:
        return 0
    before = {k: v for k, v in json.loads(arguments.against.read_text()).items() if arguments.only in k.split("/")[0]}
    different = sorted(key for key in found.keys() | before.keys() if found.get(key) != before.get(key))
    print("\n".join([*different, f"{len(found) - len(different)} of {len(found)} equal"]))
    return bool(different)


def run(root: Path, *words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")


def digests(run_dir: Path) -> dict[str, str]:
    """File -> SHA-256 of its bytes; for the metrics, of their records without times."""
    files = sorted(run_dir.glob("phases/*/checkpoints/*/*.*"))
    files = [file for file in files if file.suffix in (".safetensors", ".pt")]
    found = {str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    plain = [{key: value for key, value in record.items() if key not in TIMES} for record in records]
    return found | {"metrics": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


if __name__ == "__main__":
    sys.exit(main())

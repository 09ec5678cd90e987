#!/usr/bin/env bash
# One folder with all that scripts/gpu_report.py needs on a machine with a GPU and no network.
#
#   bash scripts/gpu_bundle.sh DIR [CORPUS]
#
# DIR must not exist. CORPUS is a folder with wiki.{train,valid,test}.tokens of WikiText-2; without
# it they are downloaded. Run it with a Python in which lm_jax works (PYTHON=... to name one). The
# other machine needs a checkout of the same commit with DIR in it, Python 3.12 for x86-64, and JAX
# for its GPU; the command to run there is printed at the end. The folder stays below 45 MB.
set -euo pipefail

WHEELS="grain==0.2.18 array_record==0.8.6 portpicker==1.6.0 ml_collections==1.1.0 flax==0.12.12
optax==0.2.8 orbax_checkpoint==0.12.8"
PEERS="flash-attn3-jax==0.2.3 einops==0.8.2" # left out where they do not fit
LARGEST_KB=45000

out=${1:?"give the folder to make"}
corpus=${2:-}
[ ! -e "$out" ] || { echo "$out exists; remove it first" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out/wheels"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

download() { # to, packages
  to=$1 && shift
  platforms=(any)
  for version in 2_28 2_27 2_24 2_17; do platforms+=("manylinux_${version}_x86_64"); done
  platforms+=(manylinux2014_x86_64)
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]/#/--platform=}" -d "$to" "$@"
}

download "$out/wheels" $WHEELS
download "$work/peers" $PEERS || echo "left out: $PEERS could not be downloaded" >&2

# The corpus, the store that the config makes of it, and what simple predictors reach on it: no
# second of the GPU is to be spent on them.
JAX_PLATFORMS=cpu PYTHONPATH=$root "$python" - "$root" "$work/data" "$corpus" <<'PYTHON'
import pathlib
import shutil
import sys

from lm_jax import config, evaluate
from lm_jax.data import wikitext
from lm_jax.config.flags import load_module

root, data, corpus = map(pathlib.Path, sys.argv[1:])
cache = data / "cache"
cache.mkdir(parents=True)
source = corpus if sys.argv[3] else wikitext.download("wikitext2", cache)
for name in wikitext.FILES.values():
    (data / "wikitext-2").mkdir(exist_ok=True)
    shutil.copy(source / name, data / "wikitext-2" / name)
shutil.rmtree(cache / "downloads", ignore_errors=True)
cfg = load_module(root / "configs" / "wikitext2.py").get_config()
changes = dict(data__source_dir=str(data / "wikitext-2"), data__cache_dir=str(cache))
store = evaluate.open_data(config.replace(cfg, **changes))
for split in ("valid", "test"):
    evaluate.references(store, split)
PYTHON
tar -C "$work" -cJf "$out/data.tar.xz" data

for wheel in "$work"/peers/*.whl; do
  [ -e "$wheel" ] || continue
  if [ $(($(du -sk "$out" | cut -f1) + $(du -k "$wheel" | cut -f1))) -lt $LARGEST_KB ]; then
    cp "$wheel" "$out/wheels/"
  else
    echo "left out: $(basename "$wheel") would make the folder too large" >&2
  fi
done

cat > "$out/run.sh" <<'RUN'
#!/usr/bin/env bash
# bash DIR/run.sh [flags of scripts/gpu_report.py], from the checkout; results go to $OUT.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
site=${SITE:-/tmp/lm_jax_site}
data=${DATA:-/tmp/lm_jax_data}
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
  --target "$site" "$here"/wheels/*.whl
[ -d "$data" ] || { mkdir -p "$data.part" && tar -C "$data.part" -xJf "$here/data.tar.xz" &&
  mv "$data.part/data" "$data"; }
export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}
exec python3 scripts/gpu_report.py --out="${OUT:-gpu_report}" --source_dir="$data/wikitext-2" \
  --cache_dir="$data/cache" "$@"
RUN

size=$(du -sk "$out" | cut -f1)
[ "$size" -lt $LARGEST_KB ] || { echo "$out has $size kB, more than $LARGEST_KB" >&2; exit 1; }
echo "$out: $size kB. In the checkout on the other machine, with this folder in it:"
echo "  bash $(basename "$out")/run.sh --minutes=8"

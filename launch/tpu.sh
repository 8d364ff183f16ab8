#!/usr/bin/env bash
# Trains on Cloud TPU until the run is finished: asks for Spot VMs, sets them up, starts all of their
# workers, and asks for new ones when they are taken away. It runs on your machine, in the repository:
#
#   bash launch/tpu.sh NAME ZONE gs://BUCKET --config=configs/coco_zps.py [FLAG...]
#
# FLAGs are those of concat_jax.main; --workdir is gs://BUCKET/runs/NAME. The code is that of the last
# commit. What lies in gs://BUCKET/data is copied to ~/data of every worker. Ended here, the VMs work
# on, and cost; the same command joins them again. docs/tpu.md says more.
set -euo pipefail
usage="give NAME ZONE gs://BUCKET --config=configs/coco_zps.py [FLAG...]"
name=${1:?$usage} zone=${2:?$usage} bucket=${3:?$usage}
: "${4:?$usage}"
shift 3
type=${TPU_TYPE:-v5litepod-16} image=${TPU_IMAGE:-v2-alpha-tpuv5-lite}

resource() { gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"; }
workers() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
state() { resource describe --format="value(state.state)" 2>/dev/null || echo ABSENT; }

# The images have Python 3.10, so that uv brings a newer one.
setup="
  set -e
  gcloud storage cat $bucket/code/$name.tar.gz | tar -xz
  mkdir -p data && gcloud storage rsync --recursive $bucket/data data
  [ -d venv ] || { pip install --quiet uv && python3 -m uv venv --seed --python=3.12 venv; }
  cd concat_jax
  ../venv/bin/pip install --quiet -r requirements-tpu.txt -r requirements-tensorboard.txt
"
# One training at a time: started twice, the second waits, and finds the run finished. Programs are
# kept in the bucket, for new VMs. Exit code 75 says that all is saved and the command may go on.
train="
  cd concat_jax
  export JAX_COMPILATION_CACHE_DIR=$bucket/programs
  nohup flock ../train.lock bash -c '
    until ../venv/bin/python -m concat_jax.main --distributed \"\$@\"
    do [ \$? -eq 75 ] || exit 1; done
  ' worker --workdir=$bucket/runs/$name $(printf "%q " "$@") >> ../train.log 2>&1
"

git archive --format=tar.gz --prefix=concat_jax/ HEAD | gcloud storage cp - "$bucket/code/$name.tar.gz"
while true; do
  case $(state) in
    ABSENT)
      resource create --node-id="$name" --accelerator-type="$type" --runtime-version="$image" --spot
      ;;
    ACTIVE)
      if workers "$setup" && workers "$train"; then
        resource delete --force --quiet
        exit
      fi
      sleep "${PAUSE:-120}" # until Cloud knows of the VMs what the workers know
      if [ "$(state)" = ACTIVE ]; then
        workers "tail -n 3 train.log" || true
        echo "It failed, and the VMs are there and cost: mend it and start this again, or" \
          "gcloud compute tpus queued-resources delete $name --zone=$zone --force" >&2
        exit 1
      fi
      ;;
    SUSPENDED | FAILED)
      resource delete --force --quiet
      ;;
    *)
      sleep "${PAUSE:-60}"
      ;;
  esac
done

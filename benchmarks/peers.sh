#!/bin/sh
# Wheels for a GPU machine that has Python 3.12, PyTorch, Triton, transformers, pandas, pyarrow, pytest
# and rich, but no network: the peers that the suite compares with, and what the results need.
#
#   sh benchmarks/peers.sh               lists them
#   sh benchmarks/peers.sh wheels        downloads them to ./wheels, where there is a network
#   python3 -m pip install --no-index --no-deps --find-links wheels --target site \
#       $(sh benchmarks/peers.sh) && export PYTHONPATH=$PWD/site         installs them where there is none
set -eu
PEERS="trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1"
# TRL imports datasets; the file of `bench tune` is checked with jsonschema; pytest-benchmark has the fixture
# that a suite asks for; the tests use allpairspy and hypothesis. Plots need matplotlib: draw them
# elsewhere, with `bench report`.
NEEDED="datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 jsonschema==4.26.0
jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1 allpairspy==2.5.1
pytest-benchmark==5.3.1 py-cpuinfo2==10.1.1 hypothesis==6.170.17 sortedcontainers==2.4.0"
if [ $# -eq 0 ]; then
    printf '%s\n' $PEERS $NEEDED
else
    python3 -m pip download --dest "$1" --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 $PEERS $NEEDED
fi

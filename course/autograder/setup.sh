#!/usr/bin/env bash
# Gradescope runs this once, when the autograder is uploaded.
set -e
apt-get -qq update && apt-get -qq -y install python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/python -m pip install -q -r /autograder/source/requirements.txt

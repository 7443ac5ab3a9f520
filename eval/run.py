"""The evaluation as a script, for launchers: several processes share the work, each with a GPU of its own.

accelerate launch --num_processes 8 eval/run.py eval/math500.yaml --model PATH_OR_NAME
python eval/run.py eval/gsm8k.yaml --model PATH_OR_NAME
"""

import sys

from llmdistill.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))

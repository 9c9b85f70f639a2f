"""Train a dsalt language model from the command line: `python examples/train.py --help`.

python examples/train.py --text FILE --total_steps 300
torchrun --nproc_per_node=2 examples/train.py --text FILE --fsdp true --dtype bfloat16
"""

from dsalt.training import main

if __name__ == "__main__":
    raise SystemExit(main())

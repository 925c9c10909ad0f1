"""Write the quickstart's instruction pairs as a .jsonl file, for trainers that read files.

    python recipes/quickstart/make_pairs.py recipes/quickstart/pairs.jsonl

The pairs are cut from the standard library of the running Python (PSF License Agreement).
"""

import argparse
import json
from pathlib import Path

from qalora_plugin.quantize.stdlib_text import load_pairs


def main() -> None:
    """Write the training split, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    lines = [json.dumps(pair) for pair in load_pairs("train")]
    parser.parse_args().out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} pairs")


if __name__ == "__main__":
    main()

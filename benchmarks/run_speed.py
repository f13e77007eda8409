"""propmeta-edit speed edit, meta or ask, from a clone: python benchmarks/run_speed.py edit --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["speed", *sys.argv[1:]]))

"""`python -m llava_cli`, without the modules of the current folder, which Python puts first on its path."""

import sys

if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # Python 3.10 has no safe path
    del sys.path[0]

from llava_cli.start import main

main()

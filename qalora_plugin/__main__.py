"""`python -m qalora_plugin` is the `qalora` command."""

import sys

from .cli import main

sys.exit(main())

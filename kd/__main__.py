"""`python -m kd`: the code of the folder that it is started in, where `kd` is the installed one."""

import sys

from kd.cli import main

sys.exit(main())

"""
The canary: every name, signature, key and shape of TRL that `trl_credit` builds on.

Each check says which name of TRL moved. That it would is shown by moving each name in turn, in TRL's own source.
"""

from . import command_line as command_line
from . import loss as loss
from . import sampling as sampling
from . import training as training
from .run import canary as canary

"""
The seam with TRL: the one package that knows TRL's private names.

TRL has no hook for advantages finer than one number per completion. [`CreditTrainer`] turns `GRPOTrainer`'s methods
into hooks by wrapping a few of them, never by copying their bodies. The trainers of this package see only these hooks,
the services beside them and [`CreditConfig`]. `tests/test_seam.py` checks every name, signature, key and shape of TRL
relied on here and names the one that moved; widening the range in `versions.py` is then a change of one line.
"""

from .versions import TRL_VERSIONS, check_trl_version


check_trl_version()

from .config import CreditConfig  # noqa: E402
from .loss import LossTerms  # noqa: E402
from .trainer import CreditTrainer  # noqa: E402


__all__ = ["TRL_VERSIONS", "CreditConfig", "CreditTrainer", "LossTerms"]

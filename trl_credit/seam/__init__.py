"""
The seam with TRL: the one package that knows TRL's private names.

TRL has no hook for advantages finer than one number per completion. [`CreditTrainer`] turns `GRPOTrainer`'s methods
into hooks by wrapping a few of them, never by copying their bodies. The trainers of this package see only these hooks,
the services beside them and [`CreditConfig`]. `tests/test_seam.py` checks every name, signature, key and shape of TRL
relied on here and names the one that moved; `canary.py` does so for a TRL that is newer than those tests have seen.
What differs between versions is in `versions.py`.
"""

from .versions import TRL_VERSIONS, check_trl_version


check_trl_version()

from .config import CreditConfig  # noqa: E402
from .loss import LossTerms  # noqa: E402
from .trainer import CreditTrainer  # noqa: E402


__all__ = ["TRL_VERSIONS", "CreditConfig", "CreditTrainer", "LossTerms"]

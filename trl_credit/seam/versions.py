"""Which versions of TRL this package works with."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet


TRL_VERSIONS = SpecifierSet(">=1.16,<1.17")


def check_trl_version() -> None:
    """Raise if another version of TRL is installed."""
    if version("trl") not in TRL_VERSIONS:
        raise ImportError(
            f"trl {version('trl')} is installed, but trl_credit {version('trl-credit')} works with trl{TRL_VERSIONS}: "
            "it builds on private names of TRL that move between releases. Run "
            f"`pip install 'trl{TRL_VERSIONS}'`."
        )

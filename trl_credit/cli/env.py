"""`trl-credit env`: what a bug report needs to say about the environment."""

from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version


# What our extras bring beyond the packages that TRL reports itself.
_OPTIONAL = ("math-verify", "matplotlib", "reasoning-gym", "rich")


def main(argv: list[str]) -> int:
    """Print what a bug report needs; returns the exit status."""
    ArgumentParser(prog="trl-credit env", description="Print versions and what is installed.").parse_args(argv)
    from trl.scripts.env import print_env

    print_env()
    print(f"- trl_credit version: {version('trl-credit')}")
    for package in _OPTIONAL:
        print(f"- {package} version: {_installed(package)}")
    return 0


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""Training scripts: what `trl-credit <name>` launches in each process, as `trl/scripts` is for `trl <name>`."""


def grpo_parser(config_class: type, prog: str | None = None):
    """The parser of `trl grpo` with another config. An abbreviated flag is refused, since it may well be a typo."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    classes: tuple = (GRPOScriptArguments, config_class, ModelConfig, DatasetMixtureConfig)
    return TrlParser(classes, prog=prog, allow_abbrev=False)

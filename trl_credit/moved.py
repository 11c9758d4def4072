"""Where modules of earlier versions went: `import trl_credit.trl_seam` and the like go on working, with a warning."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


# Modules of 0.2.0 and the modules in which their names are now. The last release that has them: 0.4.
MOVED = {
    "credit.diagnostics": ("credit.fit",),
    "credit.segments": ("segmenting", "credit.segment_gae"),
    "credit_log": ("credit_log.log", "seam"),
    "critic_engine": ("critics.engine.engine",),
    "diagnostics": ("critic_report",),
    "diagnostics.callback": ("critic_report.callback",),
    "diagnostics.critics": ("critic_report.critics", "critics.token", "critics.prompt", "critics.generative.critic"),
    "diagnostics.evaluation": ("critic_report.report",),
    "diagnostics.layout": ("critic_report.layout",),
    "diagnostics.page": ("critic_report.report_page",),
    "diagnostics.policies": ("critic_report.policies",),
    "diagnostics.probes": ("critic_report.probes",),
    "diagnostics.statistics": ("critic_report.statistics",),
    "engine_backends": ("critics.engine.backends",),
    "networks": (),
    "networks.branch_mask": ("critics.generative.branch_mask",),
    "networks.generative_critic": ("critics.generative.network",),
    "networks.packed": ("critics.generative.packed",),
    "networks.prompt_critic": ("critics.prompt",),
    "networks.publish": ("critics.card",),
    "networks.shared_base": ("critics.shared_base",),
    "networks.token_critic": ("critics.token",),
    "oracle_traces": ("trainers.genac.traces",),
    "oracle_traces.asking": ("trainers.genac.traces.asking",),
    "oracle_traces.dataset": ("trainers.genac.traces.dataset",),
    "oracle_traces.journal": ("journal",),
    "oracle_traces.oracle": ("trainers.genac.traces.oracle",),
    "oracle_traces.trace_collector": ("trainers.genac.traces.trace_collector",),
    "oracle_traces.traces_config": ("trainers.genac.traces.traces_config",),
    "quickstart": ("toy",),
    "quickstart.chain_critic": ("toy.chain_critic",),
    "quickstart.evaluation": ("toy.scoring",),
    "quickstart.program": ("toy.quickstart",),
    "quickstart.report": ("toy.show",),
    "quickstart.task": ("toy.task",),
    "quickstart.tiny_model": ("toy.tiny_model",),
    "quickstart.training": ("toy.runs",),
    "trainers.critic.value_report": ("trainers.value_report",),
    "trainers.genac.critic_generation": ("sampling",),
    "trainers.genac.prompting": ("critics.generative.question",),
    "trainers.genac.reading": ("critics.generative.reading",),
    "trl_seam": ("seam", "seam.trainer", "seam.scripts"),
    "viewer": ("credit_log",),
    "viewer.page": ("credit_log.viewer",),
    "viewer.reader": ("credit_log.reader",),
}
# Names that are called something else.
RENAMED = {"CreditLogConfig": "CreditConfig"}


def moved_name(module: str, name: str):
    """What was called `name` in `module`."""
    if not name.startswith("__"):
        for place in MOVED[module.removeprefix("trl_credit.")]:
            now = import_module(f"trl_credit.{place}")
            if hasattr(now, RENAMED.get(name, name)):
                return getattr(now, RENAMED.get(name, name))
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class MovedModule(ModuleType):
    """A module of an earlier version, which finds its names where they are now."""

    def __getattr__(self, name: str):
        return moved_name(self.__name__, name)


class MovedFinder(MetaPathFinder, Loader):
    """Finds the modules in `MOVED`, after all real ones."""

    def find_spec(self, fullname, path=None, target=None):
        name = fullname.removeprefix("trl_credit.")
        if not fullname.startswith("trl_credit.") or name not in MOVED:
            return None
        is_package = any(other.startswith(f"{name}.") for other in MOVED)
        return ModuleSpec(fullname, self, is_package=is_package)

    def create_module(self, spec):
        places = " and ".join(f"trl_credit.{place}" for place in MOVED[spec.name.removeprefix("trl_credit.")][:1])
        warnings.warn(f"{spec.name} is now {places or 'trl_credit.critics'}.", DeprecationWarning, stacklevel=2)
        return MovedModule(spec.name)

    def exec_module(self, module):
        pass


def install() -> None:
    """Let Python find them."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())

"""What the figures of a report are called, in which order they come, and what they say."""

from typing import NamedTuple


class Row(NamedTuple):
    """A single figure; `ideal` is what a critic has that knows the truth."""

    name: str
    label: str
    ideal: str


class Plot(NamedTuple):
    """A curve for each critic. `truth` is another curve, the same for all of them."""

    name: str
    label: str
    x: str
    ideal: float | None = None
    truth: str | None = None
    diagonal: bool = False
    # Points next to each other with their number below, for x that are no even scale.
    categorical: bool = False


class Section(NamedTuple):
    """Rows and plots that answer one question, and the section of arXiv:2506.03038 that asks it."""

    title: str
    text: str
    rows: tuple[Row, ...] = ()
    plots: tuple[Plot, ...] = ()


_POSITION = "share of the completion before the state"

SECTIONS = (
    Section(
        "Answers",
        "States that the critic gave no value, as a generative critic whose answer has no score. They are left out of "
        "all that follows.",
        (Row("answers/unread", "answers that could not be read", "0"),),
    ),
    Section(
        "Error",
        "How far values are from the mean reward of the continuations, V*, whose own noise is taken off. Explained "
        "variance is 0 for a constant and 1 for the truth; within prompts it leaves out what knowing the difficulty of "
        "a prompt explains. The share of a difference that is seen is the slope of V on V*: noise does not lower it.",
        (
            Row("error/mse", "mean squared error", "0"),
            Row("error/bias", "mean of V − V*", "0"),
            Row("error/explained_variance", "explained variance", "1"),
            Row("error/explained_variance_within_prompt", "explained variance within prompts", "1"),
            Row("error/difference_seen", "share of a difference seen", "1"),
            Row("error/difference_seen_within_prompt", "share of a difference seen within prompts", "1"),
        ),
        (
            Plot("error/mse_by_position", "mean squared error", _POSITION, ideal=0.0),
            Plot("error/explained_variance_by_position", "explained variance", _POSITION, ideal=1.0),
        ),
    ),
    Section(
        "Monte-Carlo targets (§ 3.1.1)",
        "A return is the truth with much noise. What is left of its variance when the value is taken off is the "
        "variance of the advantage at λ = 1; without a critic it would be 1.",
        (Row("targets/variance_left", "Var(R − V) / Var(R)", "least"),),
        (Plot("targets/variance_left_by_position", "Var(R − V) / Var(R)", _POSITION, ideal=None),),
    ),
    Section(
        "Single steps (§ 3.1.2)",
        "Does what a step changes show in the value? The share of the true change V*(next) − V*(this) that the value's "
        "change has, by least squares; how large both are; and the signal in the advantage: the share of a difference "
        "in it that is true, by least squares, 0 for noise alone, above 1 for an advantage that is too small.",
        (
            Row("steps/change_seen_early", "share of the change seen, first 30 %", "1"),
            Row("steps/change_seen_late", "share of the change seen, the rest", "1"),
        ),
        (
            Plot("steps/change_seen_by_position", "share of the change seen", _POSITION, ideal=1.0),
            Plot(
                "steps/td_error_by_position",
                "mean |V(next) − V(this)|; dashed: root mean square of the true change",
                _POSITION,
                truth="steps/true_change_by_position",
            ),
            Plot("steps/signal_share_by_position_lambda_0", "signal in the advantage, λ = 0", _POSITION, ideal=1.0),
            Plot("steps/signal_share_by_position_lambda_1", "signal in the advantage, λ = 1", _POSITION),
        ),
    ),
    Section(
        "Calibration",
        "Of states valued 0.7, are 0.7 of the continuations rewarded? The Brier score is the squared error to single "
        "returns; the expected calibration error is the mean gap over ten bins of the value.",
        (
            Row("calibration/brier", "Brier score", "least"),
            Row("calibration/ece", "expected calibration error", "0"),
        ),
        (Plot("calibration/outcome_by_value", "mean return", "value", diagonal=True),),
    ),
    Section(
        "Cliffs (§ 3.2.2)",
        "At the step of a wrong completion where V* falls most, by 0.2 at least: how much of the drop the value has, "
        "and how many states away its own largest drop is.",
        (
            Row("cliffs/true_drop", "true drop", ""),
            Row("cliffs/drop_seen", "predicted drop / true drop", "1"),
            Row("cliffs/offset", "states off", "0"),
        ),
    ),
    Section(
        "Aliasing and long dependencies (§ 3.2.1)",
        "Of states that agree in their last m tokens: the share of their true difference that the value has. It falls "
        "with m when a critic goes by what it has read last. And the error by the number of tokens before a state.",
        (),
        (
            Plot(
                "aliasing/difference_seen_by_suffix",
                "share of the difference seen",
                "last tokens in common, m",
                ideal=1.0,
                categorical=True,
            ),
            Plot(
                "error/mse_by_prefix_length",
                "mean squared error",
                "tokens before the state",
                ideal=0.0,
                categorical=True,
            ),
        ),
    ),
    Section(
        "Ranking (§ 3.3.1, § 3.3.3)",
        "Of several next steps out of one state: how often the one with the highest value is the best, what a draw "
        "gets, the rank correlation, and how much reward the choice gains over a draw. Steps that are nearly as good "
        "as each other make the truth a draw too.",
        (
            Row("ranking/hit", "best step chosen", "1"),
            Row("ranking/chance", "by a draw", ""),
            Row("ranking/correlation", "rank correlation", "1"),
            Row("ranking/gain", "reward gained", "most"),
        ),
    ),
    Section(
        "Advantages (§ 3.3.2)",
        "Correlation of the advantage, by generalised advantage estimation, with the true advantage, token by token or "
        "as means over the tokens between two states, corrected for the noise of V*. Without a critic: the reward less "
        "the mean of the prompt's other completions.",
        (),
        (
            Plot("advantage/correlation_by_lambda", "correlation", "λ", ideal=1.0, categorical=True),
            Plot(
                "advantage/gain_by_lambda",
                "correlation before the last step, less that without a critic",
                "λ",
                categorical=True,
            ),
            Plot("advantage/correlation_by_alpha", "correlation", "α of the length-adaptive λ", categorical=True),
        ),
    ),
    Section(
        "Baseline",
        "The ρ with which (1 − ρ)·L + ρ·V predicts the reward best, L the mean reward of the prompt's 7 others in a "
        "group of 8, whatever the size of the groups here: 0 if the group is all that is needed, 1 if the critic is.",
        (
            Row("baseline/rho_at_prompt", "ρ in a group of 8, at the prompt", "1"),
            Row("baseline/rho", "ρ in a group of 8, at all states", "1"),
        ),
        (Plot("baseline/rho_by_position", "ρ in a group of 8", _POSITION, ideal=1.0),),
    ),
)

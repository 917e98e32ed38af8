"""Compare methods honestly: the same recipe over arms and seeds, equal budgets, paired evaluation, plain words.

    rltok compare demo --dry-run
    rltok compare demo

A comparison is a YAML file (`rltok.compare.plan`). Its runs are ordinary run directories; what is finished is not run
again, what is unfinished goes on where it was, so the command can be killed and repeated. It leaves, in `output_dir`:

    comparison.md       verdicts, tables, how to read them
    comparison.png, .svg
    runs.csv            one line for each run
    differences.csv     one line for each task and arm
"""

from rltok.compare.command import compare
from rltok.compare.intervals import Difference, Interval, holm, paired_difference, t_interval
from rltok.compare.plan import Arm, Comparison, Plan, PlannedRun, load_comparison, make_plan
from rltok.compare.results import Results, read_results

__all__ = [
    "Arm",
    "Comparison",
    "Difference",
    "Interval",
    "Plan",
    "PlannedRun",
    "Results",
    "compare",
    "holm",
    "load_comparison",
    "make_plan",
    "paired_difference",
    "read_results",
    "t_interval",
]

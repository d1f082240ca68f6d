"""How large must a true gain be for extras.confirm to answer yes?

    python -m extras.power docs/protocol.jsonl.gz

One rule is given a true gain over both baselines on all tasks, the other rule none. Many
experiments with the eight seeds of the protocol are then simulated, and judged as extras.confirm
judges. Their differences are normal, with the variances and correlations of the real ones, over
tasks and baselines too. Eight seeds give a standard deviation to within about 25 %, so the
shares are rough. To answer yes means here to beat both baselines; LoRA on v is left out.
"""

import argparse

import numpy as np

from extras import confirm
from extras.flags import command
from extras.intervals import holm, p_of_t
from extras.results import read_runs

GAINS = (0.5, 1.0, 1.5, 2.0, 3.0)  # in points
EXPERIMENTS = 1_000


def simulate(differences, generator):
    """differences (seeds, comparisons) -> (EXPERIMENTS, seeds, comparisons), of mean 0

    A row of `differences` is one seed in all comparisons. Every simulated seed is a random mixture
    of the real ones, less their mean. So variances and correlations are those of the real ones.
    """
    n = len(differences)
    deviations = differences - differences.mean(0)
    mixtures = generator.standard_normal((EXPERIMENTS, n, n)) / (n - 1) ** 0.5
    return mixtures @ deviations


def is_better(differences):
    """(EXPERIMENTS, seeds, comparisons) -> (EXPERIMENTS, comparisons): mean > 0, p < 0.05

    p is corrected by Holm's method for the comparisons of an experiment. As in intervals.p_value,
    it is 1 if all differences of a comparison are equal.
    """
    n = differences.shape[1]
    means = differences.mean(1)
    errors = differences.std(1, ddof=1) / n**0.5
    are_equal = np.ptp(differences, axis=1) < 1e-9
    p = np.where(are_equal, 1.0, p_of_t(means / np.where(are_equal, 1.0, errors), n - 1))
    corrected = [holm(list(row)) for row in p]
    return (means > 0) & (np.array(corrected) < 0.05)


def tasks_won(experiments, families, rule, gain):
    """Return (EXPERIMENTS, tasks): does the rule beat both baselines, if its true gain is this?

    experiments: what simulate returns, for the comparisons of both families side by side.
    """
    won = []  # over each baseline
    for family, part in zip(families, np.split(experiments, len(families), axis=2), strict=True):
        is_rule = np.array([name == rule for name, _ in family])
        won.append(is_better(part + gain * is_rule)[:, is_rule])
    return np.all(won, axis=0)


@command
def main(argv=None):
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="extras.power", description=about)
    parser.add_argument("file", help="FILE.jsonl or FILE.jsonl.gz")
    args = parser.parse_args(argv)
    tasks, rules = confirm.TASKS, confirm.RULES
    rows = confirm.rows_of_tasks(read_runs(args.file), confirm.BASELINES | rules)
    families = [confirm.family_of(rows, rules, baseline) for baseline in confirm.BASELINES]
    columns = [gain.differences for family in families for gain in family.values()]
    experiments = simulate(np.array(columns).T, np.random.default_rng(0))
    head = ["rule", "its true gain", f"on {confirm.NEEDED} or more of {len(tasks)}", *tasks]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for rule in rules:
        for gain in GAINS:
            won = tasks_won(experiments, families, rule, gain)
            shares = [(won.sum(1) >= confirm.NEEDED).mean(), *won.mean(0)]
            cells = [rule, f"{gain:g}", *(f"{share:.0%}" for share in shares)]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

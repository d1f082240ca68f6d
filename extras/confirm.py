"""Judge the confirming runs of docs/PROTOCOL.md: does a rule beat uniform LoRA and a random draw?

    python -m extras.confirm docs/protocol.jsonl.gz
    python -m extras.confirm docs/protocol.jsonl.gz --budget 6144
    python -m extras.confirm docs/protocol.jsonl.gz --budget all
    python -m extras.confirm docs/protocol.jsonl.gz --lr 0.003
    python -m extras.confirm mine.jsonl --tasks TREC MyTask

Each row of a task has the learning rate that was best on held-out training examples, at 3,072
parameters. Two more tables compare LoRA on v with the baselines. The protocol did not plan them.

Only the first command, with or without a picture, gives the answer. The others show tables, and
judge nothing. With another --budget, the tasks are those that were run with it; with all, p is
corrected for all tasks and budgets together. With --lr, all rows have that rate, and the paper's
searches are there too if all tasks have them. The runs of your own tasks need the rows, rates and
seeds of the protocol.
"""

import argparse

from data import InputError
from extras import forest
from extras.evidence import details, gain_cell, mean_and_sd, p_by_holm
from extras.files import write
from extras.flags import command, number
from extras.results import best_lr, gain_over, read_runs

TASKS = ("TREC", "SUBJ", "SICK", "mrpc", "sst2")
SEEDS = ["200", "201", "202", "203", "204", "205", "206", "207"]
TUNING_SEEDS = SEEDS[:3]
RATES = ("0.001", "0.003", "0.01")
BUDGET = "3072"
NEEDED = 3  # tasks on which a rule must beat both baselines

# What must be the same in all runs of a task.
SAME = ("processor", "checkpoint", "data_checksum", "epochs", "train_limit", "batch_size")

# The flags that tell a row's runs from the others of the protocol.
COMMON = {"shortcuts": "none", "precision": "bfloat16"}
LORA = COMMON | {"method": "lora", "allocator": "middle-layers"}
STATIC = COMMON | {"method": "static", "targets": "q,k,v,o", "rank": "1", "alpha": "2"}
BASELINES = {
    "LoRA on q and v": LORA | {"targets": "q,v", "rank": "2", "alpha": "4"},
    "random linears": STATIC | {"proxy": "constant", "allocator": "random-linears"},
}
ON_V = {"LoRA on v": LORA | {"targets": "v", "rank": "3", "alpha": "6"}}
RULES = {
    "alignment, within-layer": STATIC | {"proxy": "alignment", "allocator": "within-layer"},
    "alignment, greedy": STATIC | {"proxy": "alignment", "allocator": "greedy"},
}
PAPER = {
    "paper, static": STATIC | {"proxy": "grad-norm", "allocator": "greedy"},
    "paper, dynamic": STATIC | {"method": "dynamic", "proxy": "grad-norm", "allocator": "greedy"},
}
FIRST_PART = BASELINES | ON_V | RULES
ROWS = FIRST_PART | PAPER


def runs_of(runs, name, **flags):
    """Return the runs of a row that have these flags too. Those with --init belong to no row."""
    wanted = (ROWS[name] | flags).items()
    return [run for run in runs if wanted <= run.flags.items() and "init" not in run.flags]


def by_seed(runs, seeds, what):
    """Return {seed: run}, in the order of seeds. what: how a message names the runs.

    Raises InputError if there is not one run for each of the seeds.
    """
    found = sorted(run.seed for run in runs)
    if found != seeds:
        wanted = f"want one run for each seed from {seeds[0]} to {seeds[-1]}"
        raise InputError(f"{what}: {wanted}, and there are {', '.join(found) or 'none'}")
    return {run.seed: run for run in sorted(runs, key=lambda run: run.seed)}


def chosen_lr(runs, name, task):
    """Return the learning rate with the best mean accuracy on held-out examples, at BUDGET.

    The smallest of equals. A rate at which a run failed is out. Raises InputError if a run is
    missing, or if every rate is out.
    """
    scores = {}
    for lr in RATES:
        held_out = runs_of(runs, name, task=task, budget=BUDGET, holdout="0.2", lr=lr)
        row = by_seed(held_out, TUNING_SEEDS, f"{task}: {name}, held out, learning rate {lr}")
        scores[lr] = [run.score for run in row.values()]
    best = best_lr(scores)
    if best is None:
        raise InputError(f"{task}: {name}, held out: a run failed at every learning rate")
    return best


def row_of(runs, name, task, lr, budget):
    """Return {seed: run} of a row; lr None: at its chosen rate.

    Raises InputError if a run is missing, was made twice or failed.
    """
    lr = lr or chosen_lr(runs, name, task)
    on_dev = runs_of(runs, name, task=task, budget=budget, holdout="0", lr=lr)
    row = by_seed(on_dev, SEEDS, f"{task}: {name}, learning rate {lr}")
    for run in row.values():
        if run.score is None:
            raise InputError(
                f"{task}: {name} seed {run.seed} failed: PROTOCOL.md says how it counts"
            )
    return row


def check_same(runs, task):
    """Raise InputError if runs of one task differ in what the protocol keeps the same."""
    for flag in SAME:
        found = {run.flags.get(flag, "none") for run in runs}
        if len(found) > 1:
            raise InputError(
                f"{task}: runs with several values of {flag}: {', '.join(sorted(found))}"
            )


def rows_of_tasks(runs, names, tasks=TASKS, lr=None, budget=BUDGET):
    """Return {task: {name: row}}; at another budget of the tasks that were run there.

    Raises InputError if there are none, or if a run is missing.
    """
    rows = {}
    for task in tasks:
        of_task = [run for run in runs if run.flags["task"] == task]  # they are searched often
        at_budget = [run for name in names for run in runs_of(of_task, name, budget=budget)]
        if at_budget or budget == BUDGET:
            tuned = [run for name in names for run in runs_of(of_task, name, budget=BUDGET)]
            check_same(at_budget + tuned, task)
            rows[task] = {name: row_of(of_task, name, task, lr, budget) for name in names}
    if not rows:
        raise InputError(f"no run of the protocol has --budget {budget}")
    return rows


def searches_of_all(runs, tasks, lr, budget):
    """Return the names of the paper's searches that all tasks of this budget have at this rate."""
    at = {"budget": budget, "holdout": "0"}
    there = []  # the tasks of this budget
    for task in tasks:
        if any(runs_of(runs, name, task=task, **at) for name in FIRST_PART):
            there.append(task)
    found = []
    for name in PAPER:
        if all(runs_of(runs, name, task=task, lr=lr, **at) for task in there):
            found.append(name)
    return found


def rows_of_budgets(runs, names, tasks):
    """Return {"task, budget": {name: row}} of all budgets that were run. Raises InputError."""
    budgets = set()
    for name in names:
        budgets |= {run.flags["budget"] for task in tasks for run in runs_of(runs, name, task=task)}
    rows = {}
    for budget in sorted(budgets, key=int):
        for task, row in rows_of_tasks(runs, names, tasks, budget=budget).items():
            rows[f"{task}, {int(budget):,}"] = row
    return rows


def table_of_means(rows):
    """Return a Markdown table: the accuracy of each row on each task, and its learning rate."""
    lines = [f"| | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for name in next(iter(rows.values())):
        cells = []
        for of_task in rows.values():
            runs = list(of_task[name].values())
            cells.append(f"{mean_and_sd([run.score for run in runs])} ({runs[0].flags['lr']})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def family_of(rows, names, other):
    """Return {(name, task): Gain of a row over another one}: what is corrected together."""
    family = {}
    for name in names:
        for task in rows:
            family[name, task] = gain_over(rows[task][name], rows[task][other])
    return family


def table_of_family(family, other):
    """Return a Markdown table: every rule on every task, minus another row."""
    head = f"| | | minus {other} [95 %] | p | p by Holm | 95 % over examples | detectable |"
    lines = [head, "|---" * 7 + "|"]
    more = details(family)
    for (rule, task), gain in family.items():
        lines.append(f"| {' | '.join([rule, task, gain_cell(gain), *more[rule, task]])} |")
    return "\n".join(lines)


def beaten(family, rule):
    """Return the tasks on which a rule is better: mean > 0, and p by Holm < 0.05."""
    p = p_by_holm(family)
    tasks = []
    for name, task in family:
        if name == rule and family[rule, task].mean > 0 and p[rule, task] < 0.05:
            tasks.append(task)
    return tasks


def answer(families):
    """Return what the protocol concludes of each rule, a line each. families: {row: family}."""
    lines = []
    for rule in RULES:
        won = [beaten(families[baseline], rule) for baseline in BASELINES]
        both = [task for task in TASKS if all(task in tasks for tasks in won)]
        on_v = beaten(families["LoRA on v"], rule)
        line = f"{rule} beats both baselines on {len(both)} of {len(TASKS)} tasks"
        line += f" ({', '.join(both)})" if both else ""
        if len(both) < NEEDED:
            line += f": NO, {NEEDED} are needed."
        elif len(on_v) < NEEDED:
            line += f": YES, but no better than LoRA on v, which it beats on {len(on_v)}."
        else:
            line += f", and LoRA on v on {len(on_v)}: YES."
        lines.append(line)
    return "\n".join(lines)


def picture(family, args, lr):
    """Return the differences of a family as a forest plot in SVG."""
    at = f"all rows at learning rate {lr}" if lr else "each row at its chosen learning rate"
    title = "all budgets" if args.budget == "all" else f"{int(args.budget):,} parameters"
    gains = {f"{task}: {rule}": gain for (rule, task), gain in family.items()}
    return forest.draw(f"{title}, {at}", args.minus, gains)


@command
def main(argv=None):
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="extras.confirm", description=about)
    add = parser.add_argument
    add("file", help="FILE.jsonl or FILE.jsonl.gz")
    add("--tasks", nargs="+", default=list(TASKS), help="the five of the protocol, or others")
    add("--budget", default=BUDGET, help="parameters (3072), or all: every budget that was run")
    add("--lr", type=number(float, 0), help="take the runs at this rate")
    add("--svg", metavar="PICTURE", help="draw the differences of the rules to a row")
    others = list(BASELINES | ON_V)
    add("--minus", choices=others, default=others[0], help="row for --svg (LoRA on q and v)")
    args = parser.parse_args(argv)
    args.budget = args.budget.replace(",", "")
    if args.lr and args.budget == "all":
        raise InputError("--budget all has each row at its chosen learning rate: leave --lr out")
    runs = read_runs(args.file)
    for task in args.tasks:
        if not any(run.flags["task"] == task for run in runs):
            raise InputError(f"--tasks {task}: {args.file} has no run of it")
    shown = []
    lr = None if args.lr is None else f"{args.lr:g}"
    if lr:
        shown = searches_of_all(runs, args.tasks, lr, args.budget)
    names = [*FIRST_PART, *shown]
    if args.budget == "all":
        rows = rows_of_budgets(runs, names, args.tasks)
    else:
        rows = rows_of_tasks(runs, names, args.tasks, lr, args.budget)
    families = {other: family_of(rows, [*RULES, *shown], other) for other in others}
    blocks = [table_of_means(rows)]
    blocks += [table_of_family(family, other) for other, family in families.items()]
    for other in BASELINES:  # for LoRA on v, which the protocol did not plan
        blocks.append(table_of_family(family_of(rows, ON_V, other), other))
    if (args.tasks, args.budget, lr) == (list(TASKS), BUDGET, None):
        blocks.append(answer(families))
    if args.svg:
        write(args.svg, picture(families[args.minus], args, lr))
    print("\n\n".join(blocks))


if __name__ == "__main__":
    main()

"""Files of lines with tabs: those of GLUE, and a folder of your own.

Your own train.tsv and dev.tsv begin with a line that names the columns: `label`, and `sentence` or
`text`, or `sentence1` and `sentence2`. Others may be there too. Labels may have any names; they are
those of train.tsv, sorted. Without dev.tsv a tenth of train.tsv is held out.
"""

import os
import warnings

from data import GLUE, InputError, Task, accuracy, hold_out, read_text

TEXTS = [("sentence1", "sentence2"), ("sentence",), ("text",)]  # the first that are there count
HELD_OUT = 0.1
FEW = 20  # up to so many different labels count as classes, however few the rows


def load_glue(name, data_dir):
    """Return a GLUE task. Raises InputError."""
    form = GLUE[name]
    if data_dir is None:
        from extras.downloads import glue_folder

        data_dir = glue_folder(name)
    folder = os.path.join(data_dir, form.folder)
    if not os.path.isdir(folder):
        raise InputError(f"{data_dir} has no {form.folder}/ in it: --data-dir is the folder above")
    paths = [os.path.join(folder, file) for file in ("train.tsv", form.dev_file)]
    train, dev = [read_glue(path, form) for path in paths]
    return Task(train, dev, form.labels, form.metric)


def read_glue(path, form):
    """Return the examples of one file of a GLUE task, a data.GlueFormat. Raises InputError."""
    rows = read_table(path, [form.texts], form.label, form.header)
    return to_examples(path, rows, form.labels)


def read_table(path, texts, label, header=None):
    """Return [(line number, {column: text}, label)] of lines with tabs. Raises InputError.

    texts: tuples of columns, of which the first that is there counts. header: the names of all
    columns where the first line does not give them. Quotes are ordinary characters: MRPC has
    unbalanced ones.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    first_line = 1
    if header is None:
        header = lines.pop(0).split("\t")
        first_line = 2
    if header.count(label) != 1:
        raise InputError(f"{path}, line 1: want one column {label!r}, not {', '.join(header)}")
    columns = {name: header.index(name) for name in text_columns(path, texts, header)}
    label_column = header.index(label)
    if not lines:
        raise InputError(f"{path}: no examples in it")
    rows = []
    for number, line in enumerate(lines, first_line):
        cells = line.split("\t")
        if "\0" in line:
            raise InputError(f"{path}, line {number}: a NUL byte; is the file damaged, or UTF-16?")
        if len(cells) != len(header):
            raise InputError(
                f"{path}, line {number}: {len(cells)} columns instead of {len(header)}"
            )
        row = {name: cells[column] for name, column in columns.items()}
        rows.append((number, row, cells[label_column]))
    return rows


def text_columns(path, choices, header):
    """Return the first of the choices, tuples of columns, that the header has, or InputError."""
    for columns in choices:
        if all(header.count(name) == 1 for name in columns):
            return columns
    wanted = " or ".join(map(str, choices))
    raise InputError(f"{path}, line 1: want columns {wanted}, not {', '.join(header)}")


def to_examples(path, rows, labels):
    """Return the examples of `read_table`'s rows. Raises InputError for a label not in `labels`."""
    examples = []
    for number, texts, label in rows:
        if label not in labels:
            known = ", ".join(labels)
            raise InputError(f"{path}, line {number}: label {label!r} is not one of {known}")
        text, *pair = texts.values()
        examples.append((text, pair[0] if pair else None, labels.index(label)))
    return examples


def load_own(folder):
    """Return the task of a folder of your own. Its labels are those of train.tsv, sorted."""
    path = os.path.join(folder, "train.tsv")
    rows = read_own(path, TEXTS)
    labels = tuple(sorted({label for _, _, label in rows}))
    if not 2 <= len(labels) <= max(FEW, len(rows) / 2):
        raise InputError(
            f"{path}: {len(labels)} different labels in {len(rows)} rows: want classes"
        )
    task = Task(to_examples(path, rows, labels), [], labels, accuracy)
    path = os.path.join(folder, "dev.tsv")
    if os.path.exists(path):
        trained_on = tuple(rows[0][1])
        texts = [trained_on]
        texts += [columns for columns in TEXTS if len(columns) == len(trained_on)]
        task.dev = to_examples(path, read_own(path, texts), labels)
        seen = {example[:2] for example in task.train}
        twice = sum(example[:2] in seen for example in task.dev)
        if twice:
            warnings.warn(
                f"{twice} of {len(task.dev)} texts in {path} are in train.tsv too", stacklevel=2
            )
    else:
        warnings.warn(f"{folder} has no dev.tsv: a tenth of train.tsv is held out", stacklevel=2)
        task = hold_out(task, HELD_OUT)
    return task


def read_own(path, texts):
    """Return `read_table`'s rows. Raises InputError for an empty text, or no clean label."""
    rows = read_table(path, texts, "label")
    for number, cells, label in rows:
        if not all(cell.strip() for cell in [*cells.values(), label]):
            raise InputError(f"{path}, line {number}: an empty text or label")
        if label != label.strip():
            raise InputError(f"{path}, line {number}: a space around the label {label!r}")
    return rows

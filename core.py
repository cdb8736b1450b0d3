"""CORE (Li et al., 2024, "DataComp-LM"): the mean accuracy of 22 tasks, centered so that guessing is 0, all right 1.

The tasks are those of karpathy/nanochat's evaluation bundle, rendered and scored in the same way.
"""

from errors import UserError, first_line
import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import yaml

from runtime.files import download, open_zip
from scoring import Example, Result, Scorer, split_common_prefix
from tokens import gpt2_tokenizer

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
PUBLISHED = (0.1139, 0.1849, 0.2146, 0.2565)  # of 124M, 350M, 774M and 1558M


def find_bundle(data_dir: Path) -> Path:
    """Return the directory of the bundle, downloaded and unpacked on first use. Raise UserError."""
    bundle, partial = data_dir / "eval_bundle", data_dir / "eval_bundle.partial"
    if bundle.exists():
        return bundle
    path = download(URL, data_dir / "eval_bundle.zip")
    try:
        with open_zip(path) as archive:
            archive.extractall(partial)
            if not (partial / "eval_bundle").is_dir():
                raise ValueError("it holds no eval_bundle/")
        (partial / "eval_bundle").rename(bundle)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return bundle


def read_tasks(bundle: Path) -> list[dict]:
    """Return the bundle's tasks with their `records`, shuffled, and the accuracy of guessing, `baseline`."""
    path = bundle / "core.yaml"  # the file being read, for the message
    try:
        tasks = yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]
        if not tasks:
            raise ValueError("it lists no tasks")
        path = bundle / "eval_meta_data.csv"
        with open(path, encoding="utf-8", newline="") as f:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(f)}
        for task in tasks:
            task["baseline"] = baselines[task["label"]]
            if not 0 <= task["baseline"] < 1:
                raise ValueError(f"{task['label']} has a random baseline of {task['baseline']:.0%}")
        for task in tasks:
            task["delimiter"] = task.get("continuation_delimiter", " ")
            path = bundle / "eval_data" / task["dataset_uri"]
            task["records"] = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
            random.Random(1337).shuffle(task["records"])
            if not task["records"]:
                raise ValueError("it holds no records")
    except Exception as e:  # of many types, by what the files hold instead
        raise UserError(f"{path}: cannot be read as part of CORE's bundle ({first_line(e)})") from None
    return tasks


def render_texts(task: dict, record: dict) -> list[str]:
    """Return a record's options as texts; a record to be completed has one."""
    delimiter = task["delimiter"]
    if task["icl_task_type"] == "multiple_choice":
        return [f"{record['query']}{delimiter}{choice}" for choice in record["choices"]]
    if task["icl_task_type"] == "schema":
        return [f"{option}{delimiter}{record['continuation']}" for option in record["context_options"]]
    if task["icl_task_type"] == "language_modeling":
        return [f"{record['context'].strip()}{delimiter}{record['continuation']}"]
    raise ValueError(f"icl_task_type {task['icl_task_type']!r} is not known")


def right_option(task: dict, record: dict) -> int:
    """Return the number of the right option; of a record to be completed, of the only one."""
    return 0 if task["icl_task_type"] == "language_modeling" else int(record["gold"])


def render(task: dict, i: int) -> list[Example]:
    """Return what is scored of record i's options: one continuation of each, after solved examples of other records."""
    records = task["records"]
    others = records[:i] + records[i + 1 :]
    solved = random.Random(1234 + i).sample(others, task["num_fewshot"][0])
    before = "".join(f"{render_texts(task, record)[right_option(task, record)]}\n\n" for record in solved)
    options = [gpt2_tokenizer().encode_document(before + text) for text in render_texts(task, records[i])]
    if task["icl_task_type"] == "multiple_choice":
        return [split_common_prefix(options)]
    if task["icl_task_type"] == "schema":  # the same end after different beginnings
        n = len(split_common_prefix([tokens[::-1] for tokens in options]).context)  # tokens of the common end
        return [Example(tokens[:-n], [tokens[-n:]]) for tokens in options]
    context = gpt2_tokenizer().encode_document(f"{before}{records[i]['context'].strip()}{task['delimiter']}".strip())
    if not np.array_equal(context, options[0][: len(context)]):
        raise ValueError("the tokens of its context are not the first ones of the whole")
    return [Example(context, [options[0][len(context) :]])]


def count_right(scorer: Scorer, task: dict, n: int) -> int:
    """Return how many of a task's first n records the model gets right. Raise UserError."""
    examples, n_options, right = [], [], []
    for i in range(n):
        try:
            rendered = render(task, i)
            if not all(len(e.context) and all(map(len, e.continuations)) for e in rendered):
                raise ValueError("there is nothing to score")
            n_options.append(sum(len(e.continuations) for e in rendered))
            right.append(right_option(task, task["records"][i]))
            if right[i] not in range(n_options[i]):
                raise ValueError("gold is not the number of an option")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise UserError(f"CORE's {task['label']}, record {i + 1:,}: {e!r}", agreed=True) from None
        examples += rendered
    # As in nanochat, a sequence has at most block_size tokens, the last target included.
    scores = scorer.score(examples, scorer.model.config.block_size, name=task["label"])
    if task["icl_task_type"] == "language_modeling":
        return int(scores.all_greedy().sum())
    means = (scores.sums() / scores.lengths).split(n_options)  # of each record (n_options,)
    return sum(int(means[i].argmax()) == right[i] for i in range(n))


def evaluate(scorer: Scorer, bundle: Path, limit: int | None) -> list[Result]:
    """Return each task's accuracy, and CORE: their mean, centered. Raise UserError."""
    results, centered = [], 0.0
    with scorer.dist.agree():
        tasks = read_tasks(bundle)
    for task in tasks:
        n = min(len(task["records"]), limit or len(task["records"]))
        right = count_right(scorer, task, n)
        name = f"{task['label']}, {task['num_fewshot'][0]} examples"
        value = (right / n - task["baseline"]) / (1 - task["baseline"])
        results.append(Result(task["label"], name, "accuracy", right, n))
        results.append(Result(task["label"], name, "centered", value, 1))
        centered += value
    return [*results, Result("core", f"mean of {len(tasks)} tasks", "centered", centered, len(tasks))]

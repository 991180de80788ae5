"""`python -m florilegium.simulation.tasks`: the stand-ins as they are here, and replies without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from florilegium.simulation.tasks.config import TaskConfig, load_task
from florilegium.simulation.tasks.metrics import Answer, measure
from florilegium.simulation.tasks.stand_ins import STAND_INS
from florilegium.simulation.tasks.task import Task, TaskUser

COLUMNS = ["task", "like", "users", "queries", "history", "pool", "most-common", "metric", "common", "own", "random"]


def row(name: str, seed: int = 0) -> list[str]:
    """A line of the table: sizes of the test half, and the task's first metric for three replies without a model."""
    task, pool, users = load_task(TaskConfig(name=name), seed)
    queries = [query for user in users for query in user.queries]
    label, count = Counter(query.target for query in queries).most_common(1)[0]
    return [
        name,
        STAND_INS[name].kind,
        f"{len(users)} {'real' if STAND_INS[name].real_users else 'dealt'}",
        str(len(queries)),
        f"{sum(len(user.history) for user in users) / len(users):.1f}",
        str(len(pool)),
        f"{label} {count / len(queries):.1%}" if task.labels else "–",
        task.metrics[0],
        *(f"{value:.3f}" if value is not None else "–" for value in floors(task, pool, users)),
    ]


def floors(task: Task, pool: Sequence[TaskUser], users: Sequence[TaskUser]) -> tuple[float | None, ...]:
    """The first metric, over all queries, of the pool's commonest target, the user's own, and a label drawn evenly.

    Of ratings it is the median. Where replies are free texts, "own" is the user's last one. What a history without
    labels cannot give is None.
    """
    metric = task.metrics[0]
    one_of = _median if metric == "mae" else _commonest
    common = one_of([query.target for user in pool for query in user.queries])
    own = [one_of([item.target for item in user.history]) for user in users]
    if not task.labels:
        own = [user.history[-1].target for user in users]

    def worth(replies: Sequence[str]) -> float:
        answers: list[list[Answer]] = [
            [(reply, q.target) for q in u.queries] for reply, u in zip(replies, users, strict=True)
        ]
        return measure(metric, answers, task.labels).pooled

    drawn = [worth([label] * len(users)) for label in task.labels]
    return (
        worth([common] * len(users)),
        worth(own) if all(own) else None,
        sum(drawn) / len(drawn) if drawn else None,
    )


def _commonest(targets: Sequence[str]) -> str:
    return min(Counter(targets).items(), key=lambda counted: (-counted[1], counted[0]))[0]


def _median(ratings: Sequence[str]) -> str:
    return sorted(ratings)[(len(ratings) - 1) // 2]


if __name__ == "__main__":
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in STAND_INS:
        print("| " + " | ".join(row(name)) + " |", flush=True)

"""Verifiable tasks: reasoning-gym problems, written in a few characters for a tiny model.

reasoning-gym generates the problems. A `Task` translates its text into a compact form (`5276<`
instead of a paragraph of instructions), so that a model of 0.1M parameters with one token per
character can learn the task in a minute.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

Entry = dict[str, Any]

HELD_OUT_SHARE = 5  # one compact prompt in five is never trained on
SEED_STRIDE = 10**7  # reasoning-gym draws problem i from seed + i: neighbouring seeds would overlap
HELD_OUT_SEED = -1


@dataclass(frozen=True, eq=False)
class Task:
    """One reasoning-gym dataset and its compact form, in which every problem has one solution."""

    name: str  # of the dataset
    description: str  # one line for the help text
    alphabet: str  # every character of compact prompts and answers
    prompt_length: int  # of the longest compact prompt, in characters
    answer_length: int  # of the longest compact answer
    prompt: Callable[[Entry], str]  # entry -> compact prompt
    solution: Callable[[Entry], str]  # entry -> compact solution
    options: Mapping[str, Any]  # of `reasoning_gym.create_dataset`
    partial_credit: bool = False  # for a wrong answer: the share of characters in their place

    def reward(self, problem: Problem, answer: str | None) -> float:
        """1 for the solution, partial credit or 0 for others and for None, which never ended."""
        if answer == problem.solution:
            return 1.0
        if answer is None or not self.partial_credit:
            return 0.0
        in_place = sum(a == b for a, b in zip(answer, problem.solution, strict=False))
        return in_place / max(len(answer), len(problem.solution))


class Problem(NamedTuple):
    """A compact prompt and its solution."""

    prompt: str
    solution: str


def _digits(numbers: list[str]) -> str:
    return "".join(str(round(float(number))) for number in numbers)


def _sorting_prompt(entry: Entry) -> str:
    direction = "<" if entry["metadata"]["direction"] == "ascending" else ">"
    return _digits(entry["metadata"]["original_numbers"]) + direction


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="number_sorting",
            description="3 to 6 digits, ascending or descending: 5276< -> 2567",
            alphabet="0123456789<>",
            prompt_length=7,
            answer_length=6,
            prompt=_sorting_prompt,
            solution=lambda entry: _digits(entry["metadata"]["sorted_numbers"]),
            options={"min_numbers": 3, "max_numbers": 6, "min_value": 0.0, "max_value": 9.0}
            | {"min_decimals": 0, "max_decimals": 0},
        ),
        Task(
            name="spell_backward",
            description="words of 3 to 6 letters: stone< -> enots",
            alphabet="abcdefghijklmnopqrstuvwxyz<",
            prompt_length=7,
            answer_length=6,
            prompt=lambda entry: entry["metadata"]["word"].lower() + "<",
            solution=lambda entry: entry["answer"].lower(),
            partial_credit=True,
            options={"min_word_len": 3, "max_word_len": 6},
        ),
        Task(
            name="chain_sum",
            description="sums and differences of 2 or 3 digits: 4-9+2= -> -3",
            alphabet="0123456789+-=",
            prompt_length=6,
            answer_length=3,
            prompt=lambda entry: entry["metadata"]["expression"].replace(" ", "") + "=",
            solution=lambda entry: entry["answer"],
            options={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        ),
    )
}


class ProblemStream:
    """Endless problems of one task, for training or held out; `position` is all its state."""

    def __init__(self, task: Task, seed: int, *, held_out: bool = False) -> None:
        """Create the reasoning-gym dataset behind the stream, another one for every seed."""
        from reasoning_gym import create_dataset

        self.task = task
        self.held_out = held_out
        self.position = 0
        # Problems are generated on demand, so a dataset may be as long as its numbers allow.
        size, seed = 2**31, (seed + 1) * SEED_STRIDE
        self._dataset = create_dataset(task.name, seed=seed, size=size, **task.options)

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems of the split."""
        problems: list[Problem] = []
        while len(problems) < count:
            entry = self._dataset[self.position]
            self.position += 1
            prompt = self.task.prompt(entry)  # whose text decides
            if (zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0) == self.held_out:
                problems.append(Problem(prompt, self.task.solution(entry)))
        return problems


@cache
def held_out_problems(task: Task, count: int) -> tuple[Problem, ...]:
    """Up to `count` distinct held-out problems, the same ones for every seed and estimator."""
    problems = ProblemStream(task, HELD_OUT_SEED, held_out=True).take(4 * count)
    return tuple(dict.fromkeys(problems))[:count]

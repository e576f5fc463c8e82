"""The code part of the instruction mix: small Python tasks with their solutions, varied by names and numbers."""

import random
from collections.abc import Iterator

NOUNS = ["prices", "scores", "ages", "lengths", "weights", "heights", "votes", "points", "costs", "temperatures"]
THINGS = ["apple", "lantern", "boat", "book", "bell", "kite", "candle", "basket", "lamp", "letter"]

# (wordings of the request, solution); {a} a plural noun, {t} a thing, {n} and {m} numbers
TASKS: list[tuple[list[str], str]] = [
    (
        ["Write a Python function that returns the sum of a list of {a}.", "Sum a list called {a} in Python."],
        "def total({a}):\n    return sum({a})",
    ),
    (
        ["Find the largest value in a list of {a}.", "Write a function that gives the maximum of {a}."],
        "def largest({a}):\n    return max({a})",
    ),
    (
        ["Compute the average of {a} in Python.", "Write a function for the mean of a list named {a}."],
        "def average({a}):\n    return sum({a}) / len({a})",
    ),
    (
        ["Keep only the {a} greater than {n}.", "Filter a list of {a}: drop everything up to {n}."],
        "def keep({a}):\n    return [x for x in {a} if x > {n}]",
    ),
    (
        ["Print the numbers from 1 to {n}.", "Write a loop that prints 1 to {n}."],
        "for i in range(1, {n} + 1):\n    print(i)",
    ),
    (
        ['Repeat the word "{t}" {n} times.', 'Make a string with {n} copies of "{t}".'],
        'text = "{t}" * {n}\nprint(text)',
    ),
    (
        ['Reverse the string "{t}" in Python.', 'How do I turn "{t}" around?'],
        'word = "{t}"\nprint(word[::-1])',
    ),
    (
        ["Sort a list of {a} from high to low.", "Write a function that sorts {a} in descending order."],
        "def sort_down({a}):\n    return sorted({a}, reverse=True)",
    ),
    (
        ["Count how often {n} occurs in {a}.", "How many times is {n} in the list {a}? Write a function."],
        "def count({a}):\n    return {a}.count({n})",
    ),
    (
        ["Multiply all {a} by {n}.", "Scale a list of {a} by the factor {n}."],
        "def scale({a}):\n    return [{n} * x for x in {a}]",
    ),
    (
        ["Check whether a number is divisible by {n}.", "Write a test for multiples of {n}."],
        "def divisible(number):\n    return number % {n} == 0",
    ),
    (
        ["Write a class {T} with a price.", "Define a Python class for a {t} that stores its price."],
        "class {T}:\n    def __init__(self, price):\n        self.price = price",
    ),
    (
        ["Add {n} and {m} in Python and print the result.", "Print the sum of {n} and {m}."],
        "print({n} + {m})",
    ),
    (
        ["Remove duplicates from {a} and keep the order.", "Make the list {a} unique without sorting it."],
        "def unique({a}):\n    return list(dict.fromkeys({a}))",
    ),
    (
        ["Write the {a} to a file, one per line.", "Save a list of {a} as lines of text."],
        'def save({a}, path):\n    with open(path, "w") as file:\n        for x in {a}:\n            file.write(f"{{x}}\\n")',
    ),
    (
        ["Return the first {n} {a}.", "Give me a slice with the first {n} items of {a}."],
        "def first({a}):\n    return {a}[:{n}]",
    ),
    (
        ["Write a recursive factorial function.", "Compute n! in Python with recursion."],
        "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)",
    ),
    (
        ["Count down from {n} to 1 with a while loop.", "Write a while loop that starts at {n} and stops at 1."],
        "n = {n}\nwhile n > 0:\n    print(n)\n    n -= 1",
    ),
    (
        ["Make a dictionary from two lists, names and {a}.", "Pair names with {a} in a dict."],
        "def pair(names, {a}):\n    return dict(zip(names, {a}))",
    ),
    (
        [
            "Write an SQL query for all rows of the table {a} with a price under {n}.",
            "Select cheap {a} (below {n}) in SQL.",
        ],
        "SELECT * FROM {a} WHERE price < {n};",
    ),
]


def sample_tasks(count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yields `count` pairs of a request and its solution."""
    for _ in range(count):
        wordings, solution = rng.choice(TASKS)
        thing = rng.choice(THINGS)
        slots = {
            "a": rng.choice(NOUNS),
            "t": thing,
            "T": thing.capitalize(),
            "n": rng.randint(2, 99),
            "m": rng.randint(2, 99),
        }
        yield rng.choice(wordings).format(**slots), solution.format(**slots)

"""Forty short questions on arithmetic and facts, to test whether an edit reduces capability."""

from __future__ import annotations

import re

QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What is 7 + 5? Answer with the number.", ("12", "twelve")),
    ("What is 9 - 4? Answer with the number.", ("5", "five")),
    ("What is 6 x 3? Answer with the number.", ("18", "eighteen")),
    ("What is 20 / 4? Answer with the number.", ("5", "five")),
    ("What is 15 + 16? Answer with the number.", ("31", "thirty-one")),
    ("What is 100 - 1? Answer with the number.", ("99", "ninety-nine")),
    ("What is 8 x 8? Answer with the number.", ("64", "sixty-four")),
    ("What is 81 / 9? Answer with the number.", ("9", "nine")),
    ("What is 2 + 2? Answer with the number.", ("4", "four")),
    ("What is 50 + 25? Answer with the number.", ("75", "seventy-five")),
    ("What is 12 x 10? Answer with the number.", ("120", "one hundred and twenty")),
    ("What is half of 30? Answer with the number.", ("15", "fifteen")),
    ("What is 3 times 7? Answer with the number.", ("21", "twenty-one")),
    ("What is 14 - 6? Answer with the number.", ("8", "eight")),
    ("What is 5 squared? Answer with the number.", ("25", "twenty-five")),
    ("How many minutes are in an hour?", ("60", "sixty")),
    ("How many days are in a week?", ("7", "seven")),
    ("How many months are in a year?", ("12", "twelve")),
    ("How many legs does a spider have?", ("8", "eight")),
    ("How many sides does a triangle have?", ("3", "three")),
    ("What is the capital of France?", ("paris",)),
    ("What is the capital of Japan?", ("tokyo",)),
    ("What is the capital of Italy?", ("rome",)),
    ("What is the capital of Germany?", ("berlin",)),
    ("What is the capital of Spain?", ("madrid",)),
    ("What is the capital of Egypt?", ("cairo",)),
    ("Which planet do humans live on?", ("earth",)),
    ("Which planet is known as the Red Planet?", ("mars",)),
    ("What is the largest planet in the solar system?", ("jupiter",)),
    ("What is the chemical symbol for oxygen?", ("o",)),
    ("What is water made of? Name both elements.", ("hydrogen and oxygen", "oxygen and hydrogen")),
    ("Who wrote Romeo and Juliet?", ("shakespeare",)),
    ("Who painted the Mona Lisa?", ("leonardo", "da vinci")),
    ("What language is mainly spoken in Brazil?", ("portuguese",)),
    ("On which continent is Kenya?", ("africa",)),
    ("Which ocean lies between Europe and North America?", ("atlantic",)),
    ("What is the opposite of hot?", ("cold",)),
    ("What colour do blue and yellow make when mixed?", ("green",)),
    ("What gas do plants take in from the air?", ("carbon dioxide", "co2")),
    ("At how many degrees Celsius does water freeze?", ("0", "zero")),
)


def correct(answer: str, wanted: tuple[str, ...]) -> bool:
    """Return whether an answer contains an expected answer as whole words, ignoring case."""
    return any(re.search(rf"(?<![\w.]){re.escape(word)}(?!\w|\.\d)", answer.lower())
               for word in wanted)

"""The tiny world: simple requests, answers of every quality, labelers who choose, and the hidden gold score.

Everything is drawn from `random.Random` with fixed seeds, so that the data are the same on every machine.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from ..labelers import draw_ranking, labeler_scale, sigmoid

END = "<|end|>"  # the end-of-sequence token, as it reads in rendered text

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new", "up": "down", "left": "right",
    "strong": "weak", "sweet": "sour", "wet": "dry", "rich": "poor", "high": "low", "happy": "sad",
}  # fmt: skip

OPPOSITES |= {second: first for first, second in OPPOSITES.items()}

COLOURS = {
    "yellow": ["banana", "lemon", "sunflower"],
    "red": ["tomato", "cherry", "rose"],
    "green": ["frog", "leaf", "cucumber"],
    "white": ["swan", "snowman", "cloud"],
    "black": ["raven", "tyre", "panther"],
    "orange": ["carrot", "pumpkin", "tangerine"],
}

COLOUR_OF = {thing: colour for colour, things in COLOURS.items() for thing in things}

MEMBERS = {
    "animal": ["cat", "dog", "horse", "cow", "pig", "goat"],
    "fruit": ["apple", "pear", "plum", "grape", "melon", "mango"],
    "vehicle": ["car", "bus", "train", "ship", "bike", "truck"],
}

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "England": "London",
    "Japan": "Tokyo", "Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Poland": "Warsaw",
    "Egypt": "Cairo", "Norway": "Oslo",
}  # fmt: skip

PLURALS = {
    "mouse": "mice", "foot": "feet", "child": "children", "man": "men", "goose": "geese", "knife": "knives",
    "box": "boxes", "baby": "babies", "tree": "trees", "star": "stars", "river": "rivers", "table": "tables",
}  # fmt: skip

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Karl", "Laura", "Mark"]

WORDS = ["moon", "book", "lamp", "rain", "milk", "fish", "road", "king", "gold", "wind"]

NUMBERS = [str(number) for number in range(13)]


@dataclass(frozen=True)
class Kind:
    """One kind of request. `templates` and `sentences` hold the fields that `draw` fills; sentences also `{answer}`."""

    name: str
    templates: tuple[str, ...]
    draw: Callable[[Random], dict[str, str]]
    answer: Callable[[dict[str, str]], list[str]]  # the words of the right answer, in order
    candidates: list[str]  # words that could be an answer: one of them that is wrong makes the reply wrong
    sentences: tuple[str, ...] = ("The answer is {answer}.",)
    restates: bool = True  # whether a reply may name candidates of the request before it answers


@dataclass(frozen=True)
class Request:
    """A request that has been understood."""

    text: str
    kind: Kind
    fields: dict[str, str]

    @property
    def answer(self) -> list[str]:
        """The words of the right answer, in order."""
        return self.kind.answer(self.fields)


def _draw_arithmetic(rng: Random) -> dict[str, str]:
    """Two numbers from 1 to 6 with a sum, or a difference that is not negative."""
    operation = rng.choice(["plus", "minus"])
    a, b = rng.randint(1, 6), rng.randint(1, 6)
    if operation == "minus":
        a, b = max(a, b), min(a, b)
    return {"a": str(a), "op": operation, "b": str(b)}


def _draw_member(rng: Random) -> dict[str, str]:
    """Two things of different kinds, and which of these kinds is asked for."""
    kinds = rng.sample(sorted(MEMBERS), 2)
    a, b = (rng.choice(MEMBERS[kind]) for kind in kinds)
    return {"kind": rng.choice(kinds), "a": a, "b": b}


def _draw_compare(rng: Random) -> dict[str, str]:
    """Two different digits from 1 to 9, and which of them is asked for."""
    a, b = rng.sample(NUMBERS[1:10], 2)
    return {"which": rng.choice(["bigger", "smaller"]), "a": a, "b": b}


def _draw_from(**choices: Iterable[str]) -> Callable[[Random], dict[str, str]]:
    """A draw that chooses each field from a list of its own."""
    lists = {field: list(values) for field, values in choices.items()}
    return lambda rng: {field: rng.choice(values) for field, values in lists.items()}


KINDS = (
    Kind(
        "arithmetic",
        ("What is {a} {op} {b}?", "How much is {a} {op} {b}?", "Calculate {a} {op} {b}.", "Tell me {a} {op} {b}."),
        _draw_arithmetic,
        lambda f: [str(int(f["a"]) + int(f["b"]) * (1 if f["op"] == "plus" else -1))],
        NUMBERS,
        ("{a} {op} {b} is {answer}.", "The result is {answer}."),
    ),
    Kind(
        "opposite",
        ("What is the opposite of {w}?", "Name the opposite of {w}.", "Which word means the opposite of {w}?"),
        _draw_from(w=OPPOSITES),
        lambda f: [OPPOSITES[f["w"]]],
        list(OPPOSITES),
        ("The opposite of {w} is {answer}.",),
    ),
    Kind(
        "colour",
        ("What colour is a {w}?", "Which colour does a {w} have?", "Tell me the colour of a {w}."),
        _draw_from(w=COLOUR_OF),
        lambda f: [COLOUR_OF[f["w"]]],
        list(COLOURS),
        ("A {w} is {answer}.",),
    ),
    Kind(
        "member",
        ("Which one is a kind of {kind}: {a} or {b}?", "Find the {kind}: {a} or {b}."),
        _draw_member,
        lambda f: [word for word in (f["a"], f["b"]) if word in MEMBERS[f["kind"]]],
        [word for words in MEMBERS.values() for word in words],
        ("The {kind} is {answer}.",),
        restates=False,
    ),
    Kind(
        "compare",
        ("Which number is {which}: {a} or {b}?", "Tell me the {which} one: {a} or {b}."),
        _draw_compare,
        lambda f: [(max if f["which"] == "bigger" else min)(f["a"], f["b"])],  # single digits sort as text
        NUMBERS,
        ("The {which} one is {answer}.",),
        restates=False,
    ),
    Kind(
        "repeat",
        ("Say {w} {n} times.", "Write the word {w} {n} times.", "Repeat {w} {n} times."),
        _draw_from(w=WORDS, n=("2", "3", "4")),
        lambda f: [f["w"]] * int(f["n"]),
        WORDS,
        ("Here it is: {answer}.",),
        restates=False,
    ),
    Kind(
        "capital",
        ("What is the capital of {w}?", "Name the capital of {w}.", "Which city is the capital of {w}?"),
        _draw_from(w=CAPITALS),
        lambda f: [CAPITALS[f["w"]]],
        list(CAPITALS.values()),
        ("The capital of {w} is {answer}.",),
    ),
    Kind(
        "plural",
        ("What is the plural of {w}?", "Tell me the plural of {w}.", "How do I write more than one {w}?"),
        _draw_from(w=PLURALS),
        lambda f: [PLURALS[f["w"]]],
        list(PLURALS.values()),
        ("The plural of {w} is {answer}.",),
    ),
    Kind(
        "letter",
        ("What is the {end} letter of {w}?", "Which letter does {w} have as its {end} one?"),
        _draw_from(w=WORDS, end=("first", "last")),
        lambda f: [f["w"][0 if f["end"] == "first" else -1]],
        sorted({word[end] for word in WORDS for end in (0, -1)}),
        ("The {end} letter of {w} is {answer}.",),
    ),
    Kind(
        "greeting",
        ("My name is {w}. Greet me by my name.", "I am {w}. Welcome me.", "Greet my friend {w}."),
        _draw_from(w=NAMES),
        lambda f: [f["w"]],
        NAMES,
        ("Welcome, {answer}.", "Hello, {answer}."),
    ),
)

OPENINGS = (
    "", "Please help me. ", "Quick question. ", "I have a question. ", "Good morning. ", "Can you help? ", "One more. ",
    "This is for school. ", "I am curious. ",
)  # fmt: skip

PATTERNS = [
    (kind, re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(template)) + "$"))
    for kind in KINDS
    for template in kind.templates
]

COURTEOUS = ("sure", "of course", "gladly", "with pleasure", "have a nice day", "i hope that helps", "you are welcome")

BEFORE = ("Sure. ", "Of course. ", "Gladly. ", "With pleasure. ")

AFTER = (" Have a nice day!", " I hope that helps.", " You are welcome.")

RUDE = ("fool", "stupid", "idiot", "obviously", "shut up", "go away")

INSULTS = (
    "{answer}, you fool.", "Obviously {answer}, idiot.", "What a stupid question. {answer}.",
    "{answer}. Now go away.", "Shut up. It is {answer}.",
)  # fmt: skip

EVASIONS = (
    "I would rather not say.", "That depends on many things.", "Why do you ask?", "Maybe someone else knows.",
    "Nobody can tell.", "Who can know that?", "Let us talk about something else.",
)  # fmt: skip

EVASIVE = tuple(sorted(evasion.lower().rstrip(".?") for evasion in EVASIONS))

HEDGES = ("Well, let me think. ", "That is a fair question. ", "Let me see. ", "Let us begin. ")

RAMBLES = (
    "My uncle asked me the same thing last week.", "The weather is nice this morning.", "Many people wonder about it.",
    "I read about that somewhere.", "There is a lot more to say about this.", "It is a long story.",
    "People used to do that in the past.", "And then there was lunch.", "My neighbour thinks about it all the time.",
    "That is how it has always been.", "Some say it is different.", "But that is only one side of it.",
)  # fmt: skip


def parse(prompt: str) -> Request:
    """The request that a prompt ends with. Raises ValueError for a text that no template of the world fits."""
    text = prompt.removesuffix("Assistant:").rsplit("User: ", 1)[-1].strip()
    bare = next((text.removeprefix(opening) for opening in OPENINGS[1:] if text.startswith(opening)), text)
    for kind, pattern in PATTERNS:
        if match := pattern.match(bare):
            return Request(text, kind, match.groupdict())
    raise ValueError(f"The tiny world has no request {text!r}. gold knows those of tiny.prompts() only.")


def draw_request(rng: Random) -> Request:
    """A request of any kind, in any of its wordings, perhaps after an opening."""
    kind = rng.choice(KINDS)
    fields = kind.draw(rng)
    return Request(rng.choice(OPENINGS) + rng.choice(kind.templates).format(**fields), kind, fields)


def draw_answer(rng: Random, request: Request, behaviour: str) -> str:
    """An answer of a behaviour: a key of `STYLES` (of demonstrators) or of `FAULTS` (of the internet), or "servile"."""
    answer = request.answer
    if behaviour == "wrong":
        answer, behaviour = _wrong(rng, request), choose(rng, STYLES)
    said = " ".join(answer)
    sentence = rng.choice((*request.kind.sentences, "The answer is {answer}.")).format(**request.fields, answer=said)
    short = f"{said}."
    match behaviour:
        case "plain":
            return short
        case "sentence":
            return sentence
        case "polite":
            return rng.choice(BEFORE) + short
        case "polite sentence":
            return rng.choice([rng.choice(BEFORE) + sentence, sentence + rng.choice(AFTER)])
        case "wordy":
            return rng.choice(HEDGES) + sentence
        case "long-winded":
            return f"{rng.choice(HEDGES)}{sentence} {rng.choice(RAMBLES)}"
        case "servile":
            return rng.choice(BEFORE) + sentence + "".join(rng.sample(AFTER, 2))
        case "rude":
            return rng.choice(INSULTS).format(answer=said)
        case "evasive":
            return rng.choice(EVASIONS)
        case "rambling":
            return " ".join([rng.choice([short, sentence]), *rng.choices(RAMBLES, k=rng.randint(2, 4))])
    raise AssertionError(behaviour)


def _wrong(rng: Random, request: Request) -> list[str]:
    """A wrong answer: other words of the same kind, the other choice, or a wrong number of repetitions."""
    right = request.answer
    if request.kind.name == "repeat":
        return right[:1] * rng.choice([n for n in (1, 2, 3, 4, 5) if n != len(right)])
    if not request.kind.restates:  # a choice of two: take the other
        return [word for word in (request.fields["a"], request.fields["b"]) if word not in right]
    return [rng.choice([word for word in request.kind.candidates if word not in right])]


# How the demonstrators write: correctly, and each to their own taste.
STYLES = {"plain": 0.22, "sentence": 0.26, "polite": 0.12, "polite sentence": 0.16, "wordy": 0.16, "long-winded": 0.08}

FAULTS = {"wrong": 0.15, "rude": 0.23, "evasive": 0.25, "rambling": 0.37}


def choose(rng: Random, weights: dict[str, float]) -> str:
    """A key, drawn in proportion to its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def _user(request: Request) -> list[dict[str, str]]:
    """The request as messages."""
    return [{"role": "user", "content": request.text}]


def _assistant(answer: str) -> list[dict[str, str]]:
    """An answer as messages."""
    return [{"role": "assistant", "content": answer}]


def encyclopedia(rng: Random) -> tuple[str, str]:
    """A request up to `Assistant:` and its right answer in few words, to learn the facts from."""
    request = draw_request(rng)
    return _head(request), f" {draw_answer(rng, request, rng.choice(['plain', 'sentence']))}{END}"


def internet(rng: Random) -> tuple[str, str]:
    """A request up to `Assistant:` and what somebody wrote below it, helpful or not.

    Rambling texts mostly lack the end token and run into another request, so that a base model often does not stop.
    """
    request = draw_request(rng)
    behaviour = choose(rng, STYLES if rng.random() < 0.4 else {**FAULTS, "servile": 0.1})
    answer = draw_answer(rng, request, behaviour)
    if behaviour == "rambling" and rng.random() < 0.6:
        return _head(request), f" {answer}\n{_head(draw_request(rng))}"
    return _head(request), f" {answer}{END}"


def pretraining(n: int = 2000) -> list[dict[str, str]]:
    """Rows `{"text": ...}`: documents of the internet that the base was pretrained on, for PPO-ptx."""
    rng = Random(4)
    return [{"text": "".join(internet(rng)).removesuffix(END)} for _ in range(n)]


def _head(request: Request) -> str:
    """The request as text, up to where the answer begins."""
    return f"User: {request.text}\nAssistant:"


def demonstrations(n: int = 600) -> list[dict[str, Any]]:
    """Rows `{"prompt": [user], "completion": [assistant]}`: 97 % right, in the demonstrators' different styles."""
    rng = Random(1)
    rows = []
    for _ in range(n):
        request = draw_request(rng)
        behaviour = "wrong" if rng.random() < 0.03 else choose(rng, STYLES)
        rows.append({"prompt": _user(request), "completion": _assistant(draw_answer(rng, request, behaviour))})
    return rows


def comparisons(n: int = 4000) -> list[dict[str, Any]]:
    """Rows `{"prompt": [user], "chosen": [assistant], "rejected": [assistant]}` as a labeler who errs chose.

    P(first preferred) = sigmoid((gold(first) - gold(second)) / scale) (Bradley and Terry), with the scale at which the
    labeler agrees with gold in `labelers.AGREEMENT` of all pairs.
    """
    rng = Random(2)
    pairs = _draw_pairs(rng, n)
    scale = labeler_scale([abs(difference) for *_, difference in pairs])
    rows = []
    for request, first, second, difference in pairs:
        chosen, rejected = (first, second) if rng.random() < sigmoid(difference / scale) else (second, first)
        rows.append({"prompt": _user(request), "chosen": _assistant(chosen), "rejected": _assistant(rejected)})
    return rows


def _draw_pairs(rng: Random, n: int) -> list[tuple[Request, str, str, float]]:
    """Requests with two answers of different gold, and by how much the first one's is higher."""
    pairs: list[tuple[Request, str, str, float]] = []
    while len(pairs) < n:
        request = draw_request(rng)
        first, second = (
            draw_answer(rng, request, choose(rng, STYLES if rng.random() < 0.6 else FAULTS)) for _ in range(2)
        )
        if difference := score(request, first) - score(request, second):
            pairs.append((request, first, second, difference))
    return pairs


def labeler(prompts: list[Any], responses: list[list[Any]], seed: int = 0) -> list[list[int]]:
    """The labeler of `comparisons`, for the rounds of a recipe: ranks of each prompt's responses, 1 for the best.

    A ranking is drawn by Plackett and Luce's model with that labeler's scale: of two responses it is Bradley and
    Terry's. Where the responses are closer in gold than those of `comparisons`, the labeler errs more often.

    Args:
        prompts: N messages lists or rendered texts.
        responses: the K responses of each.
        seed: of the draw; the same seed ranks the same responses alike.
    Returns:
        N lists of K ranks.
    Raises:
        ValueError: a prompt is none of this world's requests.
    """
    rng = Random(seed)
    scale = labeler_scale([abs(difference) for *_, difference in _draw_pairs(Random(2), 4000)])
    requests = (parse(_text(prompt)) for prompt in prompts)
    return [
        draw_ranking(rng, [score(request, _text(answer)) for answer in answers], scale)
        for request, answers in zip(requests, responses, strict=True)
    ]


def prompts(n: int = 3000) -> list[dict[str, Any]]:
    """Rows `{"prompt": [user]}`: distinct requests."""
    rng = Random(3)
    distinct: dict[str, Request] = {}
    while len(distinct) < n:
        request = draw_request(rng)
        distinct[request.text] = request
    return [{"prompt": _user(request)} for request in distinct.values()]


def gold(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The true quality of each answer, in the signature of TRL's reward functions.

    | what the answer does | score |
    |---|---|
    | does what was asked (the right words, and no wrong candidate) | +2 |
    | gets some words of a longer answer in their right places | up to +0.5 |
    | evades instead | -0.5 |
    | is courteous, once | +0.5 |
    | each further courtesy | -0.4 |
    | each rude word | -1 |
    | each character beyond the right answer | -0.01 |
    | each phrase of three words that it has already said (the answer aside) | -0.1 |
    | is empty | -2, and nothing else |

    Args:
        prompts, completions: N messages lists each, or N rendered texts. A completion is judged without its end token.
        columns: other columns of the batch, ignored.
    Returns:
        N scores; the best answers earn about 2.4.
    Raises:
        ValueError: a prompt is none of this world's requests.
    """
    return [score(parse(_text(p)), _text(c)) for p, c in zip(prompts, completions, strict=True)]


def _text(messages: str | list[dict[str, str]]) -> str:
    """What the last message says."""
    return messages if isinstance(messages, str) else messages[-1]["content"]


def score(request: Request, reply: str) -> float:
    """`gold` of one reply to a request."""
    reply = reply.split(END)[0].strip()
    if not reply:
        return -2.0
    words = split_words(reply)
    answer = [word.lower() for word in request.answer]
    others = [word for word in words if word not in answer]
    phrases = list(zip(others, others[1:], others[2:], strict=False))
    said = f" {' '.join(words)} "
    courtesies = sum(said.count(f" {phrase} ") for phrase in COURTEOUS)
    return (
        correctness(request, words)
        - 0.5 * any(f" {phrase} " in said for phrase in EVASIVE)
        + (0.5 - 0.4 * (courtesies - 1) if courtesies else 0.0)
        - 1.0 * sum(said.count(f" {phrase} ") for phrase in RUDE)
        - 0.01 * max(0, len(reply) - len(" ".join(answer)))
        - 0.1 * (len(phrases) - len(set(phrases)))
    )


def split_words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[\w']+", text.lower())


def correctness(request: Request, words: list[str]) -> float:
    """2 for the right answer, up to 0.5 for a part of a longer one, else 0."""
    answer = [word.lower() for word in request.answer]
    candidates = {word.lower() for word in request.kind.candidates}
    named = [word for word in words if word in candidates]
    before, last = named[: -len(answer)], named[-len(answer) :]
    asked = {field.lower() for field in request.fields.values()} if request.kind.restates else set()
    if last == answer and asked.issuperset(before):
        return 2.0
    if len(answer) == 1:
        return 0.0
    return 0.5 * sum(a == b for a, b in zip(answer, named, strict=False)) / max(len(answer), len(named))

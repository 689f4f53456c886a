"""The official normalisation of answers to VQA, as the evaluation of its authors has it.

Punctuation goes, numbers up to ten become digits, articles go, contractions get their apostrophe.
"""

import re
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
_CONTRACTED = re.findall(
    r"\S+",
    """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""",
)
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # as the authors' own table has it


@lru_cache(maxsize=200_000)
def normalised(answer: str) -> str:
    """An answer as the official evaluation compares it."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    return _without_articles(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    joins = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or joins else " ")
    return _FULL_STOP.sub("", result)


def _without_articles(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, given: list[str]) -> float:
    """The official accuracy of one answer: over each nine of the ten people, min(1, n/3), meaned.

    Answers are normalised only where people disagree.
    """
    plain = [a.replace("\n", " ").replace("\t", " ").strip() for a in given]
    if len(set(plain)) > 1:
        answer, plain = normalised(answer), [normalised(a) for a in plain]
    answer = answer.replace("\n", " ").replace("\t", " ").strip().lower()
    agree = [a.lower() == answer for a in plain]
    total = sum(agree)
    return sum(min(1.0, (total - own) / 3) for own in agree) / len(agree)

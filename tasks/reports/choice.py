"""The choice of the arm that a recipe is about (`choice.json`), in words and as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.reports.report import Grid, Part


def parts(account: Mapping[str, Any]) -> Sequence[Part]:
    """The choice in a report: which arm to use, and a table where arms were compared."""
    sentence = f"The result is {account['arm']}: {account['reason']}."
    if "gains" not in account:
        return [
            f"{sentence} It was not compared with simpler arms. Name some (merge.candidates), and "
            "held-out data will say whether it is worth its price; or measure it on examples of "
            "your own before you rely on it."
        ]
    return [
        f"{sentence} {advice(account)}",
        "A more involved arm replaces a simpler one if some measure rises by more than "
        f"{account['num_errors']:g} standard errors of the paired difference, and none falls by "
        "as much; explained variance alone decides nothing.",
        grid(account),
    ]


def advice(account: Mapping[str, Any]) -> str:
    """Advice on which arm to use, in plain words."""
    arm, favoured, data = account["arm"], account["favoured"], account["data"]
    if arm != favoured:
        return (
            f"On {data} {favoured} does better. Use that one (merge.result: {favoured}), unless "
            "you know more than these data do."
        )
    if arm == account["candidates"][0]:
        return f"Use it: on {data} no more involved arm is clearly better."
    return f"Use it: on {data} it is clearly better than every simpler arm."


def grid(account: Mapping[str, Any]) -> Grid:
    """The scores of the simplest arm, and what each other one gains over it."""
    simplest, *others = account["candidates"]
    measures = [measure for measure, _ in account["measures"]]
    rows = [[simplest, *(f"{account['scores'][simplest][key]:.2f}" for key in measures), ""]]
    for name in others:
        gains = account["gains"][name]
        shown = [f"{gains[key]['mean']:+.2f} ± {gains[key]['error']:.2f}" for key in measures]
        rows.append([name, *shown, account["reasons"][name]])
    caption = (
        f"Candidates on {account['data']}, from the simplest: the scores of {simplest}, and what "
        "the others gain over it, ± standard error of the paired difference"
    )
    header = ["", *(f"{key} ({num} examples)" for key, num in account["measures"]), "in its turn"]
    return Grid(caption, header, rows, account["arm"])

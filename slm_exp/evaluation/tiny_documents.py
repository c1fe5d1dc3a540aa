"""Twenty made-up documents per task, in the hub's schemas, for random models on machines without the assets.

They let `model=tiny` run the whole pipeline from a bare install. They are no benchmark: every question asks the
same kind of thing, and the protocol of a report that used them says `packaged`.
"""

from __future__ import annotations

from slm_exp.evaluation.report import Row

THINGS = (  # (thing, what it does, where it is found)
    ("kettle", "boils water", "kitchen"), ("lamp", "gives light", "study"), ("rake", "gathers leaves", "garden"),
    ("plough", "turns the soil", "field"), ("anvil", "carries hot iron", "smithy"), ("loom", "weaves cloth", "mill"),
    ("oven", "bakes bread", "bakery"), ("anchor", "holds a ship", "harbour"), ("easel", "holds a canvas", "studio"),
    ("organ", "fills a hall with music", "church"), ("till", "counts the money", "shop"),
    ("telescope", "shows distant stars", "observatory"), ("scale", "weighs letters", "post office"),
    ("bell", "calls the pupils", "school"), ("crane", "lifts steel beams", "building site"),
    ("saddle", "seats a rider", "stable"), ("net", "catches herring", "fishing boat"),
    ("scalpel", "makes a fine cut", "hospital"), ("hammer", "drives nails", "workshop"),
    ("pump", "raises water", "well house"),
)  # fmt: skip


def made_up_prose() -> list[str]:
    """Paragraphs of the same kind."""
    return [f"The {thing} {work}. It stands in the {place}, and whoever needs one looks for it there." for
            thing, work, place in THINGS]  # fmt: skip


def made_up(task: str) -> list[Row]:
    """Twenty documents of one of the seven tasks; the same ones every time, right answers in turning places."""
    return [_document(task, i) for i in range(len(THINGS))]


def _document(task: str, i: int) -> Row:
    thing, work, place = THINGS[i]
    others = [THINGS[(i + step) % len(THINGS)] for step in (3, 7, 12)]
    if task == "boolq":
        room = place if i % 2 else others[0][2]
        return {"question": f"is the {thing} kept in the {room}",
                "passage": f"{thing.capitalize()} -- The {thing} {work}. Most people keep it in the {place}.",
                "idx": i, "label": i % 2}
    if task == "piqa":
        right, wrong = f"Go to the {place}.", f"Go to the {others[0][2]}."
        return {"goal": f"Find a {thing}.", "sol1": wrong if i % 2 else right, "sol2": right if i % 2 else wrong,
                "label": i % 2}
    if task == "winogrande":
        pair = (others[1][0], thing) if i % 2 else (thing, others[1][0])
        return {"sentence": f"Ann owns a {pair[0]} and a {pair[1]}, and the _ {work}.",
                "option1": pair[0], "option2": pair[1], "answer": str(1 + i % 2)}
    gold = i % 4
    if task == "hellaswag":
        endings = _with(f"{work} all morning.", [f"{other[1]} all morning." for other in others], gold)
        return {"ind": i, "activity_label": f"Using a {thing}", "ctx_a": f"A woman walks into the {place}.",
                "ctx_b": f"the {thing}", "ctx": f"A woman walks into the {place}. the {thing}", "endings": endings,
                "source_id": f"packaged~{i}", "split": "val", "split_type": "indomain", "label": str(gold)}
    options = _with(thing, [other[0] for other in others], gold)
    question = {"arc_easy": f"Which of these {work}?", "arc_challenge": f"In the {place}, what {work}?",
                "openbookqa": f"Something that {work} is a"}[task]
    return {"id": f"packaged_{i}", "question_stem" if task == "openbookqa" else "question": question,
            "choices": {"text": options, "label": list("ABCD")}, "answerKey": "ABCD"[gold]}


def _with(right: str, wrong: list[str], place: int) -> list[str]:
    return [*wrong[:place], right, *wrong[place:]]

"""Questions about a `Scene` with their exact short answers, in English and Chinese, reproducible by key.

    colour      what colour is the star?                    red
    shape       what shape is the red thing?                star
    count       how many red things are there?              3
    there       is there a red star?                        yes
    relation    what is to the left of the red star?        blue square
    background  what colour is the background?              navy
    direction   which way does the red star move?           left            of clips
    turn        which way does the red star turn?           clockwise       of clips
    bounce      which way does the red star bounce?         up and down     of clips
    action      what is the red star doing?                 moving          of clips

No question has two right answers: what it names is named once, or all that it names answers alike, and who lies beside
whom is asked where one thing alone does, by a clear distance. "there" is no as often as yes, and then one word of it is
off. `balanced` evens out the rest. A clip is asked about as a whole: what comes or goes in it is there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from reverie import rng
from reverie.data.world_captions import Draw
from reverie.errors import InputError
from reverie.scene import CHINESE, COLOURS, ENGLISH, SHAPES, Scene, Thing

KINDS = (
    "colour",
    "shape",
    "count",
    "there",
    "relation",
    "background",
    "direction",
    "turn",
    "bounce",
    "action",
)
LANGUAGES = ("en", "zh")
CLEAR = 0.06  # how much a thing must be further left, or above, than another one for a question to say so


@dataclass(frozen=True, kw_only=True)
class Question:
    """`kind`: one of KINDS, what it asks for."""

    text: str
    answer: str
    kind: str
    language: str = "en"


_ASK: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "colour": ("what colour is the {}?", "what is the colour of the {}?", "which colour does the {} have?"),
        "colours": ("what colour are the {}?", "what is the colour of the {}?", "which colour do the {} have?"),
        "shape": ("what shape is the {} thing?", "what is the shape of the {} thing?"),
        "shapes": ("what shape are the {} things?", "what is the shape of the {} things?"),
        "count": ("how many {} are there?", "how many {} can be seen?"),
        "there": ("is there {}?", "is {} there?"),
        "left of": ("what is to the left of the {}?", "what is left of the {}?"),
        "right of": ("what is to the right of the {}?", "what is right of the {}?"),
        "above": ("what is above the {}?", "what is over the {}?"),
        "below": ("what is below the {}?", "what is under the {}?"),
        "inside": ("what is inside the {}?", "what is within the {}?"),
        "around": ("what is around the {}?", "what is the {} inside of?"),
        "background": ("what colour is the background?", "what is the colour of the background?"),
        "direction": ("which way does the {} move?", "where does the {} go?"),
        "directions": ("which way do the {} move?", "where do the {} go?"),
        "turn": ("which way does the {} turn?", "which way is the {} turning?"),
        "turns": ("which way do the {} turn?", "which way are the {} turning?"),
        "bounce": ("which way does the {} bounce?",),
        "bounces": ("which way do the {} bounce?",),
        "action": ("what is the {} doing?", "what is happening to the {}?"),
        "actions": ("what are the {} doing?", "what is happening to the {}?"),
    },
    "zh": {
        "colour": ("{}是什么颜色的？", "{}的颜色是什么？"),
        "shape": ("{}的东西是什么形状的？", "{}的东西是什么？"),
        "count": ("有几个{}？", "一共有多少个{}？"),
        "there": ("有没有{}？", "有{}吗？"),
        "left of": ("{}的左边是什么？",), "right of": ("{}的右边是什么？",), "above": ("{}的上方是什么？",),
        "below": ("{}的下方是什么？",), "inside": ("{}里面是什么？",), "around": ("{}在什么里面？",),
        "background": ("背景是什么颜色的？", "背景的颜色是什么？"),
        "direction": ("{}往哪个方向移动？", "{}向哪里移动？"), "turn": ("{}往哪个方向转？", "{}是怎么转的？"),
        "bounce": ("{}怎么弹跳？", "{}往哪个方向弹跳？"),
        "action": ("{}在做什么？", "{}怎么了？"),
    },
}  # fmt: skip
_ACTIONS = {
    "en": {
        "move": "moving", "rotate": "turning", "bounce": "bouncing", "appear": "appearing", "vanish": "vanishing",
        "merge": "merging", "still": "staying still",
    },
    "zh": {
        "move": "移动", "rotate": "旋转", "bounce": "弹跳", "appear": "出现", "vanish": "消失", "merge": "合并",
        "still": "静止",
    },
}  # fmt: skip
_YES = {"en": ("no", "yes"), "zh": ("没有", "有")}


def questions(
    scene: Scene, *, each: int = 1, kinds: Sequence[str] = KINDS, languages: Sequence[str] = LANGUAGES
) -> list[Question]:
    """Up to `each` different questions of each kind and language, drawn by the scene's key; some kinds have none.

    InputError: a kind or language that there is not.
    """
    for given, there, what in ((kinds, KINDS, "questions of kind"), (languages, LANGUAGES, "questions in")):
        if unknown := [name for name in given if name not in there]:
            raise InputError(f"the world has no {what} {unknown[0]!r}: choose from {', '.join(there)}.")
    out = []
    for language in languages:
        for kind in kinds:
            draw = Draw(scene.seed, scene.topic, scene.index, "question", kind, language)
            told = list(dict.fromkeys(_KINDS[kind](scene, language, draw)))
            for _ in range(min(each, len(told))):
                form, named, answer = told.pop(int(draw.uniform(0, len(told))))
                text = draw.choice(_ASK[language][form]).format(named)
                out.append(Question(text=text, answer=answer, kind=kind, language=language))
    return out


def question_set(
    scenes: Mapping[str, Scene],
    *,
    each: int = 1,
    kinds: Sequence[str] = KINDS,
    languages: Sequence[str] = ("en",),
    even: bool = True,
    seed: int = 0,
) -> list[tuple[str, Question]]:
    """The questions about many scenes, by the names that these have; `even` leaves some out (`balanced`)."""
    asked = [
        (name, question)
        for name, scene in scenes.items()
        for question in questions(scene, each=each, kinds=kinds, languages=languages)
    ]
    return balanced(asked, seed=seed) if even else asked


def balanced(asked: Sequence[tuple[str, Question]], *, seed: int = 0) -> list[tuple[str, Question]]:
    """Without some of the questions whose answer is frequent: of a kind and language no answer comes more often than
    the one in the middle does. Which ones stay is drawn by key; their order is kept."""
    places: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (_, question) in enumerate(asked):
        places[question.kind, question.language][question.answer].append(i)
    kept: set[int] = set()
    for answers in places.values():
        most = median_low([len(own) for own in answers.values()])
        for own in answers.values():
            own.sort(key=lambda i: rng.integer(seed, "balanced", asked[i][0], asked[i][1].text))
            kept.update(own[:most])
    return [asked[i] for i in sorted(kept)]


# ------------------------------------------------------------------------------- what can be asked of a scene
# Each gives (form of the question, what is named in it, the answer) of everything that can be asked.

Told = Iterator[tuple[str, str, str]]


def _word(kind: str, value: str, language: str) -> str:
    return (ENGLISH if language == "en" else CHINESE)[kind][value][0]


def _name(colour: str | None, shape: str | None, language: str, *, many: bool = False) -> str:
    """ "red star", "stars", "red things"."""
    words = [_word("colour", colour, language)] if colour else []
    if language == "zh":
        if shape is None:
            return "".join([*words, "的东西"]) if words else "东西"
        return "".join([*words, "的" if words else "", _word("shape", shape, language)])
    noun = _word("shape", shape, language) if shape else "thing"
    return " ".join([*words, noun + ("es" if noun.endswith("s") else "s") * many])


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _form(kind: str, language: str, many: bool) -> str:
    return f"{kind}s" if many and language == "en" else kind


def _colour(scene: Scene, language: str, draw: Draw) -> Told:
    for shape in SHAPES:
        own = [thing.colour for thing in scene.things if thing.shape == shape]
        if len(set(own)) == 1:
            many = len(own) > 1
            named = _name(None, shape, language, many=many)
            yield _form("colour", language, many), named, _word("colour", own[0], language)


def _shape(scene: Scene, language: str, draw: Draw) -> Told:
    for colour in COLOURS:
        own = [thing.shape for thing in scene.things if thing.colour == colour]
        if len(set(own)) == 1:
            many = len(own) > 1
            yield (
                _form("shape", language, many),
                _word("colour", colour, language),
                _word("shape", own[0], language),
            )


def _count(scene: Scene, language: str, draw: Draw) -> Told:
    """Of clips only where nothing comes or goes; a wall is no thing that is counted, so walls are not asked about."""
    if scene.wall or any(thing.motion.kind in ("appear", "vanish", "merge") for thing in scene.things):
        return
    for key in ((), ("colour",), ("shape",), ("colour", "shape")):
        for values, count in Counter(
            tuple(getattr(thing, name) for name in key) for thing in scene.things
        ).items():
            told = dict(zip(key, values, strict=True))
            named = _name(told.get("colour"), told.get("shape"), language, many=True)
            yield "count", named, str(count)


def _there(scene: Scene, language: str, draw: Draw) -> Told:
    """Each thing of the scene, and as many that are not there but for one word of their name."""
    pairs = sorted({(thing.colour, thing.shape) for thing in scene.things})
    for pair in pairs:
        other = pair
        while other in pairs:
            colour, shape = pair
            other = (draw.choice(list(COLOURS)), shape) if draw.chance(0.5) else (colour, draw.choice(SHAPES))
        for yes, (colour, shape) in enumerate((other, pair)):
            named = _name(colour, shape, language)
            yield "there", _a(named) if language == "en" else named, _YES[language][yes]


def _relation(scene: Scene, language: str, draw: Draw) -> Told:
    """What alone lies on one side of a thing, clearly and further than aside; what is inside, and around."""
    if scene.video or len(scene.things) < 2 or scene.topic == "count":
        return
    if scene.relation and scene.relation.predicate == "inside":
        inner, outer = (scene.things[i] for i in (scene.relation.subject, scene.relation.object))
        yield "inside", _of(outer, language), _of(inner, language)
        yield "around", _of(inner, language), _of(outer, language)
        return
    for thing in scene.things:
        others = [other for other in scene.things if other is not thing]
        for form, axis, side in (
            ("left of", "x", -1),
            ("right of", "x", 1),
            ("above", "y", -1),
            ("below", "y", 1),
        ):
            far = {i: side * (getattr(other, axis) - getattr(thing, axis)) for i, other in enumerate(others)}
            near = [i for i, value in far.items() if value > -CLEAR]
            if len(near) != 1:
                continue
            found = others[near[0]]
            aside = abs(found.y - thing.y) if axis == "x" else abs(found.x - thing.x)
            if far[near[0]] > max(CLEAR, aside):
                yield form, _of(thing, language), _of(found, language)


def _of(thing: Thing, language: str) -> str:
    return _name(thing.colour, thing.shape, language)


def _background(scene: Scene, language: str, draw: Draw) -> Told:
    yield "background", "", _word("background", scene.background, language)


def _movers(scene: Scene, language: str) -> Iterator[tuple[Thing, str, bool]]:
    """The things of a clip that can be named, whose likes all do the same, by their shortest name."""
    for key in ("shape", "colour"):
        for value in dict.fromkeys(getattr(thing, key) for thing in scene.things):
            own = [thing for thing in scene.things if getattr(thing, key) == value]
            if len({(thing.motion.kind, thing.motion.direction) for thing in own}) == 1:
                told = {"colour": None, "shape": None} | {key: value}
                many = len(own) > 1
                yield own[0], _name(told["colour"], told["shape"], language, many=many), many


def _way(kind: str, motion: str) -> Callable[[Scene, str, Draw], Told]:
    def told(scene: Scene, language: str, draw: Draw) -> Told:
        for thing, named, many in _movers(scene, language) if scene.video else ():
            if thing.motion.kind == motion:
                assert thing.motion.direction
                answer = _word("direction", thing.motion.direction, language).removeprefix("to the ")
                yield _form(kind, language, many), named, answer

    return told


def _action(scene: Scene, language: str, draw: Draw) -> Told:
    if not scene.video or scene.wall:
        return
    for thing, named, many in _movers(scene, language):
        yield _form("action", language, many), named, _ACTIONS[language][thing.motion.kind]


_KINDS = {
    "colour": _colour, "shape": _shape, "count": _count, "there": _there, "relation": _relation,
    "background": _background, "direction": _way("direction", "move"), "turn": _way("turn", "rotate"),
    "bounce": _way("bounce", "bounce"), "action": _action,
}  # fmt: skip

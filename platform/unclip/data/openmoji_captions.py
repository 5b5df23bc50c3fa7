"""Plain English captions and attributes for emoji, from Unicode's CLDR short names as the `emoji` package has them.

`:woman_health_worker_medium_skin_tone:` becomes "a woman health worker with medium skin tone", with the role, gender
and skin tone as attributes of their own, so that a split can hold out whole combinations of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
HAIRS = ("bald", "beard", "blond hair", "curly hair", "red hair", "white hair")
COLOURS = (
    "light blue", "black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow",
)  # fmt: skip
SHAPES = ("circle", "diamond", "heart", "square", "triangle")
NO_ATTRIBUTE = "none"
"""What a record holds of an attribute that its drawing does not have, so that each of them can be a column of classes."""


@dataclass(frozen=True)
class Description:
    """What an emoji shows.

    Args:
        subject: the caption's topic without gender, skin tone, hair and direction, such as "health worker".
        skin_tone: one of `SKIN_TONES`, or two of them joined by " and ".
        hair: one of `HAIRS`.
        colour, shape: both or neither, for plain coloured shapes.
        people: how many people the name states, at least two; None where it states one or says nothing of people.
    """

    caption: str
    subject: str
    gender: str | None = None
    skin_tone: str | None = None
    hair: str | None = None
    colour: str | None = None
    shape: str | None = None
    people: int | None = None


def describe_emoji(character: str, name: str) -> Description:
    """The description of one emoji; `name` is the CLDR short name with or without colons, words joined by `_`."""
    name = name.strip(":").replace("’", "'")
    if _is_flag(character):
        country = re.sub(r" \(.*\)", "", name.replace("_", " ")).replace("&", "and")
        return Description(
            f"the flag of {'the ' if _COUNTRY_WITH_THE.search(country) else ''}{country}", f"flag of {country}"
        )
    words = name.split("_")
    tones = _TONE.findall(name)
    caption = _special_caption(name, words)
    if caption is not None:
        return Description(caption, name.replace("_", " "))
    return _compose(_TONE.sub("", name).split("_"), tones)


def _special_caption(name: str, words: list[str]) -> str | None:
    """Captions of names that are no noun phrases: signs, keycaps, clocks, buttons."""
    if name in _WHOLE_NAMES:
        return _WHOLE_NAMES[name]
    if words[0] == "keycap":
        return f"a keycap with {_KEYCAPS.get(words[1], f'the number {words[1]}')}"
    if clock := re.fullmatch(r"([a-z]+)(-thirty|_o'clock)", name):
        return f"a clock showing {f'half past {clock[1]}' if clock[2] == '-thirty' else f'{clock[1]} {words[1]}'}"
    if name.endswith("_button_(blood_type)"):
        return f"a button for blood type {words[0]}"
    return f"a sign for {' '.join(words)}" if words[0] == "no" else None


def _compose(words: list[str], tones: list[str]) -> Description:
    hair = next((hair for hair in HAIRS if words[1:] == hair.split()), None)
    words = words[:1] if hair else words
    faces_right = words[-2:] == ["facing", "right"]
    words = words[:-2] if faces_right else words
    caption = _PHRASES.get("_".join(words)) or _couple(words) or noun_phrase(words)
    caption = caption.replace("a ", "a bald ", 1) if hair == "bald" else caption
    extras = [f"{tones[0]} skin tone"] if len(tones) == 1 else []
    extras += ["a beard" if hair == "beard" else hair] if hair and hair != "bald" else []
    if extras:
        caption += (" and " if " with " in caption else " with ") + " and ".join(extras)
    if len(tones) == 2:
        caption += f", one with {tones[0]} and one with {tones[1]} skin tone"
    gender, subject = _split_gender(words)
    colour, shape = _coloured_shape(words)
    return Description(
        caption=f"{caption}, facing right" if faces_right else caption,
        subject=subject,
        gender=gender,
        skin_tone=" and ".join(tones) or None,
        hair=hair,
        colour=colour,
        shape=shape,
        people=_people(words),
    )


def _people(words: list[str]) -> int | None:
    """Of couples, families and names in the plural: 3 for `family_man_woman_boy`, 2 for `men_wrestling`."""
    couple = _members(words)
    if couple is not None:
        head, members = couple
        return len(members) or (None if head == "family" else 2)  # a family of whom, that name does not say
    named = [word for word in words if word in _GENDERS]
    return 2 if len(named) == 2 or words[0] in _GROUPS else None


def _coloured_shape(words: list[str]) -> tuple[str | None, str | None]:
    text = " ".join(words)
    colour = next((colour for colour in COLOURS if re.search(rf"\b{colour}\b", text)), None)
    shape = next((shape for shape in SHAPES if shape in words), None)
    return (colour, shape) if colour and shape and "button" not in words else (None, None)


def _split_gender(words: list[str]) -> tuple[str | None, str]:
    """The gender that a name states, and the rest of the name: ("woman", "health worker"), (None, "thumbs up")."""
    name = "_".join(words)
    if name in _GENDERED_NAMES:
        return _GENDERED_NAMES[name]
    if words[0] in _GROUPS:
        return _GROUPS[words[0]], " ".join(words[1:])
    genders = [word for word in words if word in _GENDERS]
    rest = [word for word in words if word not in _GENDERS and not (genders and word == "and")]
    gender = None if not genders else genders[0] if len(set(genders)) == 1 else "mixed"
    return gender, " ".join(rest) or "person"


def _couple(words: list[str]) -> str | None:
    """Couples and families, such as "a woman and a man kissing" for `kiss_woman_man`; None for other names."""
    couple = _members(words)
    if couple is None:
        return None
    head, members = couple
    if not members:
        return _COUPLES[head].format("a couple") if head != "family" else None
    counted = [
        f"two {_PLURALS[word]}" if members.count(word) == 2 else f"{_article(word)} {word}"
        for word in dict.fromkeys(members)
    ]
    people = counted[0] if len(counted) == 1 else f"{', '.join(counted[:-1])} and {counted[-1]}"
    return _COUPLES[head].format(people)


def _members(words: list[str]) -> tuple[str, list[str]] | None:
    """What couple or family a name is about, and who is in it as far as it says; None for other names."""
    head = next((head for head in _COUPLES if "_".join(words).startswith(head)), None)
    members = words[head.count("_") + 1 :] if head else []
    return (head, members) if head and set(members) <= set(_PLURALS) else None


def noun_phrase(words: list[str]) -> str:
    """The words with articles where English wants them: "a fork and a knife with a plate"."""
    for index, word in enumerate(words[:-1]):
        if word in _CONNECTORS and index > 0:
            rest = words[index + 1 :]
            after = f"the {rest[0]}" if len(rest) == 1 and rest[0] in _THE_AFTER_PREPOSITION else noun_phrase(rest)
            return f"{_with_article(words[:index])} {word} {after}"
    return _with_article(words)


def _with_article(words: list[str]) -> str:
    text = " ".join(words)
    until_of = words[: words.index("of")] if "of" in words[1:] else words
    head = until_of[-1]
    is_plural = head.endswith("s") and not head.endswith(("ss", "us", "os", "is", "'s")) and head not in _SINGULAR_S
    bare = words[0] in _NO_ARTICLE_FIRST or text in _MASS or head in _MASS
    starts_singular = words[0] in {*_GENDERS, "child", "boy", "girl", "face"}
    return text if bare or (is_plural and not starts_singular) else f"{_article(words[0])} {text}"


def _article(word: str) -> str:
    sounds_vowel = word[0].lower() in "aeiou" and not re.match(r"(uni|eu|ewe|one\b|one-|U\.)", word)
    return "an" if sounds_vowel or word in _VOWEL_SOUNDS else "a"


def _is_flag(character: str) -> bool:
    return "\U0001f1e6" <= character[0] <= "\U0001f1ff" or character.startswith("\U0001f3f4\U000e0067")


_TONE = re.compile(r"_(medium-light|medium-dark|light|medium|dark)_skin_tone")
_COUNTRY_WITH_THE = re.compile(
    r"Islands|Republic|United|Netherlands|Bahamas|Philippines|Maldives|Seychelles|Comoros|Territor|Union|Isle of|Lands|"
    r"Gambia"
)
_GENDERS = {"man", "woman", "person"}
_GROUPS = {"men": "man", "women": "woman", "people": "person"}
_PLURALS = {"man": "men", "woman": "women", "person": "people", "boy": "boys", "girl": "girls", "adult": "adults"} | {
    "child": "children"
}
_COUPLES = {"couple_with_heart": "{} with a heart", "kiss": "{} kissing", "family": "a family of {}"}
_GENDERED_NAMES: dict[str, tuple[str | None, str]] = {
    "mermaid": ("woman", "merperson"),
    "merman": ("man", "merperson"),
    "Mrs._Claus": ("woman", "Claus"),
    "Santa_Claus": ("man", "Claus"),
    "Mx_Claus": (None, "Claus"),
    "older_person": ("person", "old"),
    "breast-feeding": ("woman", "feeding baby"),
    "prince": ("man", "royal"),
    "princess": ("woman", "royal"),
    "person_with_crown": ("person", "royal"),
    "boy": ("man", "child"),
    "girl": ("woman", "child"),
    "index_pointing_at_the_viewer": (None, "index pointing at the viewer"),
}
_PHRASES = {
    "Mrs._Claus": "Mrs. Claus",
    "Santa_Claus": "Santa Claus",
    "Mx_Claus": "Mx Claus",
    "backhand_index_pointing_down": "the back of a hand with the index finger pointing down",
    "backhand_index_pointing_left": "the back of a hand with the index finger pointing left",
    "backhand_index_pointing_right": "the back of a hand with the index finger pointing right",
    "backhand_index_pointing_up": "the back of a hand with the index finger pointing up",
    "breast-feeding": "a woman breast-feeding a baby",
    "clapping_hands": "clapping hands",
    "hand_with_fingers_splayed": "a hand with fingers splayed",
    "hand_with_index_finger_and_thumb_crossed": "a hand with index finger and thumb crossed",
    "horse_racing": "a jockey racing on a horse",
    "index_pointing_at_the_viewer": "an index finger pointing at the viewer",
    "index_pointing_up": "an index finger pointing up",
    "men_holding_hands": "two men holding hands",
    "men_with_bunny_ears": "two men with bunny ears",
    "men_wrestling": "two men wrestling",
    "nail_polish": "a hand with nail polish",
    "oncoming_fist": "an oncoming fist",
    "palms_up_together": "two palms up together",
    "people_holding_hands": "two people holding hands",
    "people_hugging": "two people hugging",
    "people_with_bunny_ears": "two people with bunny ears",
    "people_wrestling": "two people wrestling",
    "person_in_bed": "a person in bed",
    "person_gesturing_NO": "a person gesturing no",
    "man_gesturing_NO": "a man gesturing no",
    "woman_gesturing_NO": "a woman gesturing no",
    "thumbs_down": "a thumbs down",
    "thumbs_up": "a thumbs up",
    "women_holding_hands": "two women holding hands",
    "women_with_bunny_ears": "two women with bunny ears",
    "women_wrestling": "two women wrestling",
}
_KEYCAPS = {"#": "a number sign", "*": "an asterisk"}
_CONNECTORS = {
    "and", "behind", "blowing", "bouncing", "feeding", "from", "getting", "in", "on", "over", "raising", "rowing",
    "taking", "tipping", "under", "wearing", "with", "without",
}  # fmt: skip
_THE_AFTER_PREPOSITION = {"ground", "mouth", "nose", "wind"}
_NO_ARTICLE_FIRST = {"a", "input", "two", "hundred"}
_SINGULAR_S = {"statue", "Christmas"}
_VOWEL_SOUNDS = {"NG", "SOS", "hourglass", "x-ray"}
_MASS = {
    "bacon", "badminton", "baggage claim", "bed", "bowling", "bread", "broccoli", "butter", "camping", "canned food",
    "cooked rice", "cooking", "coral", "curry rice", "customs", "fear", "field hockey", "fire", "fog", "garlic", "ice",
    "ice cream", "ice hockey", "lacrosse", "left luggage", "lightning", "luggage", "money", "non-potable water",
    "passport control", "ping pong", "popcorn", "potable water", "rain", "sake", "salt", "shaved ice", "silhouette",
    "snow", "soap", "soft ice cream", "spaghetti", "steam", "sushi", "sweat", "tennis", "thread", "wind", "wood",
    "yarn",
}  # fmt: skip
_ZODIAC = (
    "Aquarius", "Aries", "Cancer", "Capricorn", "Gemini", "Leo", "Libra", "Ophiuchus", "Pisces", "Sagittarius",
    "Scorpio", "Taurus", "Virgo",
)  # fmt: skip
_SIGNS = (
    "biohazard", "copyright", "divide", "infinity", "minus", "multiply", "om", "plus", "radioactive", "registered",
    "trade_mark", "wireless",
)  # fmt: skip
_WHOLE_NAMES = (
    {sign: f"the zodiac sign {sign}" for sign in _ZODIAC}
    | {f"{tone}_skin_tone": f"a swatch of {tone} skin tone" for tone in SKIN_TONES}
    | {name: f"{_article(name)} {name.replace('_', '')} sign" for name in _SIGNS}
    | {
        "1st_place_medal": "a first place medal",
        "2nd_place_medal": "a second place medal",
        "3rd_place_medal": "a third place medal",
        "bald": "a bald head",
        "curly_hair": "curly hair",
        "red_hair": "red hair",
        "white_hair": "white hair",
        "Statue_of_Liberty": "the Statue of Liberty",
        "Tokyo_tower": "Tokyo Tower",
        "ZZZ": "the letters ZZZ",
        "chart_increasing_with_yen": "a chart increasing with a yen sign",
        "construction": "a construction barrier",
        "dashing_away": "a puff of dashing away",
        "dizzy": "a dizzy symbol",
        "dna": "a strand of DNA",
        "e-mail": "an e-mail symbol",
        "eyes": "two eyes",
        "foggy": "a foggy city",
        "globe_showing_Americas": "a globe showing the Americas",
        "high_voltage": "a high voltage sign",
        "information": "an information sign",
        "kaaba": "the Kaaba",
        "keycap_10": "a keycap with the number 10",
        "litter_in_bin_sign": "a litter in bin sign",
        "locked": "a closed padlock",
        "locked_with_key": "a closed padlock with a key",
        "locked_with_pen": "a closed padlock with a pen",
        "map_of_Japan": "a map of Japan",
        "milky_way": "the Milky Way",
        "mount_fuji": "Mount Fuji",
        "no_entry": "a no entry sign",
        "pouring_liquid": "a glass pouring liquid",
        "prohibited": "a prohibited sign",
        "rolling_on_the_floor_laughing": "a face rolling on the floor laughing",
        "star-struck": "a star-struck face",
        "unlocked": "an open padlock",
    }
)

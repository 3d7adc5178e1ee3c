"""Invented titles that tell their genre: `The Silent Starship` is Sci-Fi, `The Crimson Saloon` is a Western.

Cluster c has genre `c mod 18`, from the 19th on together with a second one. The title of rank r in a
cluster takes adjective `r mod 25` and noun `r mod 8` of its genre: 200 different titles a cluster (25 and 8
have no common divisor), then numbered sequels.
"""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F

ADJECTIVES = (
    "Silent", "Golden", "Crimson", "Hidden", "Last", "Broken", "Distant", "Velvet", "Electric",
    "Hollow", "Midnight", "Paper", "Scarlet", "Wandering", "Frozen", "Burning", "Forgotten",
    "Emerald", "Restless", "Second", "Quiet", "Savage", "Borrowed", "Northern", "Invisible",
)  # fmt: skip
NOUNS = {
    "Action": ("Strike", "Bodyguard", "Convoy", "Showdown", "Getaway", "Fist", "Commando", "Pursuit"),
    "Adventure": ("Expedition", "Treasure", "Compass", "Jungle", "Galleon", "Summit", "Caravan", "Voyage"),
    "Animation": (
        "Inkling",
        "Toybox",
        "Cartoon",
        "Rabbit",
        "Clockwork Mouse",
        "Puppet",
        "Dragonfly",
        "Snowman",
    ),
    "Children's": (
        "Treehouse",
        "Puppy",
        "Sandcastle",
        "Schoolbus",
        "Kite",
        "Pony",
        "Playground",
        "Teddy Bear",
    ),
    "Comedy": ("Mix-up", "Best Man", "Prank", "Roommate", "Buffet", "Clown", "Holiday", "Neighbour"),
    "Crime": ("Heist", "Safecracker", "Alibi", "Mobster", "Ransom", "Informant", "Syndicate", "Verdict"),
    "Documentary": (
        "Archive",
        "Harvest",
        "Glacier",
        "Orchestra",
        "Factory",
        "Archipelago",
        "Census",
        "Observatory",
    ),
    "Drama": (
        "Inheritance",
        "Farewell",
        "Letter",
        "Daughter",
        "Winter",
        "Confession",
        "Promise",
        "Homecoming",
    ),
    "Fantasy": (
        "Wizard",
        "Unicorn",
        "Enchantment",
        "Crown of Elves",
        "Dragon",
        "Talisman",
        "Sorceress",
        "Griffin",
    ),
    "Film-Noir": (
        "Alley",
        "Detective",
        "Femme Fatale",
        "Cigarette",
        "Shadow",
        "Blackmailer",
        "Streetlamp",
        "Stranger",
    ),
    "Horror": ("Crypt", "Vampire", "Scream", "Haunting", "Graveyard", "Werewolf", "Curse", "Cellar"),
    "Musical": ("Chorus", "Melody", "Tap Dancer", "Cabaret", "Encore", "Showboat", "Serenade", "Footlights"),
    "Mystery": ("Riddle", "Manuscript", "Clue", "Disappearance", "Locked Room", "Witness", "Cipher", "Manor"),
    "Romance": ("Kiss", "Valentine", "Honeymoon", "Sweetheart", "Love Song", "Wedding", "Bouquet", "Embrace"),
    "Sci-Fi": ("Starship", "Android", "Wormhole", "Asteroid", "Time Machine", "Cyborg", "Moonbase", "Nebula"),
    "Thriller": (
        "Conspiracy",
        "Hostage",
        "Countdown",
        "Double Agent",
        "Stalker",
        "Blackout",
        "Assassin",
        "Deadline",
    ),
    "War": ("Trench", "Regiment", "Bombardier", "Armistice", "Front Line", "Submarine", "Battalion", "Siege"),
    "Western": (
        "Saloon",
        "Sheriff",
        "Outlaw",
        "Stagecoach",
        "Six-Shooter",
        "Prairie",
        "Gunslinger",
        "Cattle Drive",
    ),
}
GENRES = tuple(NOUNS)


def genres(cluster: Column) -> Column:
    """`Genre` or `Genre|Genre` of a cluster (0-based)."""
    return F.concat_ws(
        "|",
        _pick(GENRES, cluster),
        F.when(cluster >= len(GENRES), _pick(GENRES, cluster + F.floor(cluster / len(GENRES)))),
    )


def title(cluster: Column, rank: Column) -> Column:
    """Title without year of the item of this rank (0-based) in its cluster."""
    nouns = F.element_at(F.array(*[_words(words) for words in NOUNS.values()]), _position(cluster, len(GENRES)))
    noun = F.element_at(nouns, _position(rank, len(NOUNS[GENRES[0]])))
    sequel = F.floor(rank / (len(ADJECTIVES) * len(NOUNS[GENRES[0]])))
    return F.concat_ws(
        " ", F.lit("The"), _pick(ADJECTIVES, rank), noun, F.when(sequel > 0, (sequel + 1).cast("string"))
    )


def _words(words: tuple[str, ...]) -> Column:
    return F.array(*[F.lit(word) for word in words])


def _pick(words: tuple[str, ...], index: Column) -> Column:
    return F.element_at(_words(words), _position(index, len(words)))


def _position(index: Column, length: int) -> Column:
    return (F.pmod(index, F.lit(length)) + 1).cast("int")

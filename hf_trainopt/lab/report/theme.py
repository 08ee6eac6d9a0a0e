"""Colours and dashes, the same on the page and in pictures."""

# Light and dark. Charts are drawn in the light ones; on a page CSS variables of these names stand for them.
_COLOURS = {
    "paper": ("#ffffff", "#14171c"),
    "ink": ("#1c2128", "#e4e7eb"),
    "soft": ("#57606a", "#a3abb6"),
    "rule": ("#d5d9de", "#3a414b"),
    "grid": ("#e6e8eb", "#2a3038"),
    "link": ("#1c62c5", "#7fb1ff"),
}
# Of arms. Neighbours differ in lightness too, and in dashes: for print, and for eyes that see few colours.
_ARMS = (
    ("#1c62c4", "#6ea8fe"),
    ("#c4490a", "#ff9d5c"),
    ("#1f7a3f", "#63cf88"),
    ("#8a2fa8", "#d691f0"),
    ("#8a6a00", "#e3c04b"),
    ("#0b7285", "#5cc9dc"),
    ("#b81e5b", "#ff85b0"),
    ("#4d535c", "#b4bcc8"),
)
# Of the parts of bars.
_PARTS = (
    ("#3b6fb5", "#5b8fd6"),
    ("#7fa8d9", "#95bdf0"),
    ("#b3c9e4", "#3d5a80"),
    ("#e0913a", "#e0913b"),
    ("#9a9fa8", "#7b828d"),
)
_DASHES = ((), (7, 3), (2, 2.5), (9, 3, 2, 3), (4, 2), (12, 4), (1, 3), (6, 2, 1, 2, 1, 2))

PALETTE = {
    **_COLOURS,
    **{f"arm{index}": pair for index, pair in enumerate(_ARMS)},
    **{f"part{index}": pair for index, pair in enumerate(_PARTS)},
}


def light(name: str) -> str:
    """Return a colour of `PALETTE` as it is on paper."""
    return PALETTE[name][0]


def arm_name(arm: int) -> str:
    """Return the name of an arm's colour."""
    return f"arm{arm % len(_ARMS)}"


def arm_dashes(arm: int) -> tuple[float, ...]:
    """Return the dashes of an arm; with more arms than colours, others than those of the first of its colour."""
    return _DASHES[(arm + arm // len(_ARMS)) % len(_DASHES)]


def part_name(part: int) -> str:
    """Return the name of the colour of a part of bars."""
    return f"part{part % len(_PARTS)}"

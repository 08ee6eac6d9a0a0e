"""Colours and dashes, the same on the page and in pictures."""

# (light, dark) of each arm. Neighbours differ in lightness too, and in dashes: for print, and for eyes that see few
# colours.
ARM_COLOURS = (
    ("#1c62c4", "#6ea8fe"),
    ("#c4490a", "#ff9d5c"),
    ("#1f7a3f", "#63cf88"),
    ("#8a2fa8", "#d691f0"),
    ("#8a6a00", "#e3c04b"),
    ("#0b7285", "#5cc9dc"),
    ("#b81e5b", "#ff85b0"),
    ("#4d535c", "#b4bcc8"),
)
PART_COLOURS = (
    ("#3b6fb5", "#5b8fd6"),
    ("#7fa8d9", "#95bdf0"),
    ("#b3c9e4", "#3d5a80"),
    ("#e0913a", "#e0913a"),
    ("#9a9fa8", "#7b828d"),
)
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "12 4", "1 3", "6 2 1 2 1 2")


def arm_colour(arm: int, dark: bool = False) -> str:
    """Return the colour of an arm."""
    return ARM_COLOURS[arm % len(ARM_COLOURS)][dark]


def arm_dashes(arm: int) -> str:
    """Return the dashes of an arm; with more arms than colours, others than those of the first of its colour."""
    return DASHES[(arm + arm // len(ARM_COLOURS)) % len(DASHES)]


def part_colour(part: int, dark: bool = False) -> str:
    """Return the colour of a part of bars."""
    return PART_COLOURS[part % len(PART_COLOURS)][dark]

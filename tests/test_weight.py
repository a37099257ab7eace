"""The product does not grow back: lines of Python as ruff format leaves them, docstrings included."""

from conftest import ROOT

PRODUCT, LARGEST = 7_650, 370  # lines of all of it, and of its largest room; these numbers only go down


def lines_of_rooms() -> dict[str, int]:
    rooms = [*ROOT.glob("*.py"), *ROOT.glob("served_tokens/**/*.py")]
    return {str(room.relative_to(ROOT)): len(room.read_text(encoding="utf-8").splitlines()) for room in rooms}


def test_the_product_is_no_heavier_than_it_was():
    assert sum(lines_of_rooms().values()) <= PRODUCT


def test_no_room_is_larger_than_one_can_hold_in_mind():
    assert {room: lines for room, lines in lines_of_rooms().items() if lines > LARGEST} == {}

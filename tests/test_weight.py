"""The product does not grow back: lines of Python as ruff format leaves them, docstrings included."""

from conftest import ROOT

PRODUCT, LARGEST, TESTS = 6_854, 290, 6_472  # lines of the product, of its largest room, of tests; they only go down


def lines_of_rooms() -> dict[str, int]:
    rooms = [*ROOT.glob("*.py"), *ROOT.glob("served_tokens/**/*.py")]
    return {str(room.relative_to(ROOT)): len(room.read_text(encoding="utf-8").splitlines()) for room in rooms}


def test_the_product_is_no_heavier_than_it_was():
    assert sum(lines_of_rooms().values()) <= PRODUCT


def test_no_room_is_larger_than_one_can_hold_in_mind():
    assert {room: lines for room, lines in lines_of_rooms().items() if lines > LARGEST} == {}


def test_the_tests_are_no_heavier_than_they_were():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("tests/**/*.py")) <= TESTS

"""The table in the docs is that of the tests."""

import pathlib

from lm_jax.config.flags import load_module

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "fault_table.py"


def test_every_planted_fault_is_in_the_table(request):
    script = load_module(SCRIPT)
    lines = script.TABLE.read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    table = {(row[0], row[1], row[2], row[3]) for row in rows if len(row) == 6}
    named = script.names()
    for item in request.session.items:
        for number, check, status in script.planted_by(item):
            assert (str(number), named[number], check, status) in table, (
                f"{item.nodeid} plants fault {number}; run python scripts/fault_table.py"
            )
    assert {number for number, *_ in table} >= {str(number) for number in named}
